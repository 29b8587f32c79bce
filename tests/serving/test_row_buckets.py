"""Engines that only run certain numbers of rows, tested with a real bundle: shapes of calls, and equal pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from bundles import ExportedBundle
from imprompt_serving.backends import Engine, get_backend
from imprompt_serving.denoiser import warm_up as denoiser_warm_up
from imprompt_serving.denoiser.answers import Outcome
from imprompt_serving.denoiser.assembly import assemble
from imprompt_serving.denoiser.batch import Batcher
from imprompt_serving.denoiser.conditioning import Conditioner
from imprompt_serving.denoiser.job import Job
from imprompt_serving.denoiser.loop import Denoiser
from imprompt_serving.denoiser.networks import StepNetworks
from imprompt_serving.job_request import AdapterOptions, ControlOptions
from imprompt_serving.specs import Bundle
from jobs import job_request

CPU = torch.device("cpu")
NAMES = ("unet", "motion_unet", "controlnet_depth", "controlnet_canny", "controlnet_embedding_depth")


class Counting:
    """An engine that records the shape of the first input of each call."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: list[tuple[int, ...]] = []

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        first = min(tensors)
        name = "sample" if "sample" in tensors else first
        self.shapes.append(tensors[name].shape)
        return self.engine.run(tensors)


class Bucketed:
    """The denoiser of a bundle on the CPU, with or without buckets of rows."""

    def __init__(self, made: ExportedBundle, *, bucketed: bool) -> None:
        folder = made.repository / "control_denoiser/1"
        self.bundle = Bundle.load(folder)
        self.engines: dict[str, Counting] = {}
        self.call_rows = self.bundle.shapes.call_rows(bucketed=bucketed)
        self.parts: tuple[Conditioner, StepNetworks] = assemble(
            self.bundle, lambda name: self._engine(folder / name), CPU, self.call_rows
        )

    def _engine(self, path: Any) -> Counting:
        self.engines[path.name] = Counting(get_backend("onnxruntime").load(path, threads=1))
        return self.engines[path.name]

    def rows(self) -> dict[str, set[int]]:
        return {name: {shape[0] for shape in engine.shapes} for name, engine in self.engines.items()}

    def jobs(self) -> list[Job]:
        """Make jobs for a guided picture with image prompt and ControlNet, three unguided pictures, and one more."""
        conditioner, _ = self.parts
        controls = (ControlOptions(name="depth"), ControlOptions(name="sketch"))
        cases: list[dict[str, Any]] = [
            {"adapters": (AdapterOptions(name="plain"),), "controls": controls},
            {"num_images_per_prompt": 3, "guidance_scale": 1.0, "seeds": (1, 2, 3)},
            {"guidance_scale": 1.0, "controls": controls[:1]},
        ]
        made = []
        for index, case in enumerate(cases):
            request = job_request(id=str(index), **case)
            tensors = denoiser_warm_up._tensors(denoiser_warm_up.WarmUpJob(size=(64, 64)), self.bundle)
            tensors = {
                name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index))
                for name, tensor in tensors.items()
            }
            made.append(Job(request, self.bundle, conditioner(request, tensors), tensors))
        return made

    def run(self, jobs: list[Job]) -> list[torch.Tensor]:
        """Return the latents of `jobs`, which share calls."""
        denoiser = Denoiser(self.parts[1], Batcher(self.bundle, self.call_rows), self.call_rows)
        outcomes = [Outcome() for _ in jobs]
        for job, outcome in zip(jobs, outcomes, strict=True):
            denoiser.submit(job, outcome)
        for outcome in outcomes:
            assert outcome.ended.wait(120)
            assert outcome.error is None
        denoiser.stop()
        return [job.result() for job in jobs]


@pytest.fixture(scope="module")
def made(bundle: Callable[[str], ExportedBundle]) -> ExportedBundle:
    return bundle("control")


def test_padding_does_not_change_pictures(made: ExportedBundle) -> None:
    """Jobs of one, two, and three rows, alone and together: six rows are padded to eight, or run as four and two."""
    plain, bucketed = (Bucketed(made, bucketed=value) for value in (False, True))
    expected = [plain.run([job])[0] for job in plain.jobs()]
    assert 3 in plain.rows()["unet"]
    alone = [bucketed.run([job])[0] for job in bucketed.jobs()]
    together = bucketed.run(bucketed.jobs())
    for wanted, *found in zip(expected, alone, together, strict=True):
        for latents in found:
            torch.testing.assert_close(latents, wanted, atol=1e-3, rtol=1e-3)
    assert all(rows <= set(bucketed.call_rows.buckets) for rows in bucketed.rows().values())


def test_every_bucket_is_warmed_up(made: ExportedBundle) -> None:
    """At the default size, in every network, so that later calls have shapes that have run before."""
    room = Bucketed(made, bucketed=True)
    denoiser_warm_up.warm_up(room.bundle, *room.parts, CPU, room.call_rows)
    size = room.bundle.default_height // room.bundle.vae_scale_factor
    for name in NAMES[:1] + NAMES[2:4]:
        usual = {shape[0] for shape in room.engines[name].shapes if shape[-1] == size}
        assert usual == {1, 2, 4, 8}, name
    assert {shape[0] for shape in room.engines["t2i_adapter_sketch"].shapes} == {1, 2, 4, 8}
    assert {shape[0] for shape in room.engines["controlnet_embedding_depth"].shapes} == {1, 2, 4, 8}
    assert {shape[0] for shape in room.engines["motion_unet"].shapes} == {1}


def test_engines_without_buckets_are_warmed_up_once(made: ExportedBundle) -> None:
    room = Bucketed(made, bucketed=False)
    denoiser_warm_up.warm_up(room.bundle, *room.parts, CPU, room.call_rows)
    assert len(room.engines["unet"].shapes) == 1
    assert not room.engines["motion_unet"].shapes
