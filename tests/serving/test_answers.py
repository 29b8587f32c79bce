"""Seeds, warnings, and timings in a response; and errors that only the denoiser finds."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from imprompt import InvalidRequest
from imprompt_serving.metrics import STAGES
from parity import MAX_LEVELS, MEAN_LEVELS, assert_different, assert_same
from served import Served
from tiny import oracle
from tiny.oracle import picture_distance

TYPES = {"INT32": np.int32, "INT64": np.int64, "FP64": np.float64}
SMALL: dict[str, Any] = {"prompt": "a photo of a cat", "num_inference_steps": 4}


def answer(served: Served, **values: tuple[str, list[Any]]) -> dict[str, np.ndarray]:
    """Call the server with tritonclient, and return all tensors of the response. Values have their KServe types."""
    inputs = []
    for name, (dtype, items) in values.items():
        array = np.array(items, TYPES.get(dtype, object))
        inputs.append(triton.InferInput(name, list(array.shape), dtype))
        inputs[-1].set_data_from_numpy(array)
    client = triton.InferenceServerClient(served.server.grpc_address)
    found = client.infer(served.bundle.name, inputs)
    return {output.name: found.as_numpy(output.name) for output in found.get_response().outputs}


def small(prompt: str = "a cat", **values: tuple[str, list[Any]]) -> dict[str, tuple[str, list[Any]]]:
    given: dict[str, tuple[str, list[Any]]] = {
        "prompt": ("BYTES", [prompt.encode()]),
        "num_inference_steps": ("INT32", [2]),
    }
    return given | values


def test_reported_seeds_reproduce_their_pictures(sd15: Served) -> None:
    several = {"num_images_per_prompt": ("INT32", [2])}
    assert answer(sd15, **small(**several, seed=("INT64", [7])))["seeds"].tolist() == []
    assert answer(sd15, **small(seed=("INT64", [7])))["seeds"].tolist() == [7]
    drawn = answer(sd15, **small(**several))
    assert len(set(drawn["seeds"].tolist())) == 2
    assert max(drawn["seeds"]) < 2**32
    for index, seed in enumerate(drawn["seeds"]):
        again = answer(sd15, **small(seed=("INT64", [int(seed)])))["images"][0]
        assert np.abs(again.astype(int) - drawn["images"][index]).max() <= 2


def test_truncated_prompts_give_warnings(sd15: Served) -> None:
    assert "warnings" not in answer(sd15, **small("a cat"))
    long = "a cat " * 50 + "and a Dog"
    found = answer(sd15, **small(long, negative_prompt=("BYTES", [b"rain " * 90])))["warnings"]
    negative, positive = sorted(line.decode() for line in found)
    assert positive.startswith("prompt: truncated to 77 tokens; cut off: ")
    assert positive.endswith("and a Dog")
    assert negative.startswith("negative_prompt: truncated to 77 tokens; cut off: rain ")
    assert len(negative) < 300


def test_warnings_name_the_second_prompt_of_sdxl(served: Any) -> None:
    values = small("a cat " * 50)
    sdxl = served("sdxl")
    (line,) = answer(sdxl, **values)["warnings"]
    assert line.startswith(b"prompt: ")
    (line,) = answer(sdxl, **small(), prompt_2=("BYTES", [b"a dog " * 50]))["warnings"]
    assert line.startswith(b"prompt_2: ")


def test_timings_have_documented_stages(sd15: Served) -> None:
    seconds = json.loads(answer(sd15, **small())["timings"][0])
    assert set(seconds) <= set(STAGES)
    assert {"admission", "text_encoder", "queue", "denoise", "vae_decoder", "total"} <= set(seconds)
    assert all(0 <= value <= seconds["total"] for value in seconds.values())


def test_complete_scheduler_configuration_from_diffusers(sd15: Served) -> None:
    """A configuration passed unchanged, with infinities and private keys, gives the same picture as diffusers."""
    pipe = oracle.pipeline(sd15.bundle.checkpoints / "base", scheduler="DPMSolverMultistepScheduler")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, use_karras_sigmas=True)
    expected = oracle.generate(pipe, prompt="a cat", num_inference_steps=4)
    config = json.dumps(dict(pipe.scheduler.config))
    assert "-Infinity" in config
    values = small(num_inference_steps=("INT32", [4]), seed=("INT64", [0]))
    pictures = answer(sd15, **values, scheduler_config=("BYTES", [config.encode()]))["images"]
    largest, mean = picture_distance(pictures, expected)
    assert largest <= MAX_LEVELS
    assert mean <= MEAN_LEVELS
    assert_different(pictures, answer(sd15, **values)["images"])


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverSDEScheduler"])
def test_large_and_negative_seeds_are_accepted(sd15: Served, scheduler: str) -> None:
    for seed in (2**63 + 5, -1):
        assert sd15.generate(**SMALL, scheduler=scheduler, seed=seed).images


@pytest.mark.parametrize(
    ("parameter", "arguments"),
    [
        ("scheduler_config", {"scheduler": "DDPMScheduler", "scheduler_config": {"variance_type": "fixed_large_log"}}),
        (
            "scheduler_config",
            {"scheduler": "UniPCMultistepScheduler", "scheduler_config": {"solver_type": "none such"}},
        ),
        ("scheduler_config", {"scheduler_config": {"prediction_type": "none such"}}),
        ("scheduler_config", {"scheduler_config": {"trained_betas": [0.1] * 10}}),
    ],
)
def test_failing_job_does_not_affect_its_neighbors(sd15: Served, parameter: str, arguments: dict[str, Any]) -> None:
    async def together() -> list[Any]:
        good = [asyncio.to_thread(sd15.generate, **{**SMALL, "num_inference_steps": 8}, seed=seed) for seed in range(3)]
        bad = asyncio.to_thread(sd15.generate, **SMALL, **arguments)
        return await asyncio.gather(bad, *good, return_exceptions=True)

    failed, *results = asyncio.run(together())
    assert isinstance(failed, InvalidRequest)
    assert failed.parameter == parameter
    for seed, result in enumerate(results):
        assert_same(result, sd15.generate(**{**SMALL, "num_inference_steps": 8}, seed=seed).images)
