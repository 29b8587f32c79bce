"""Which rows of a batch each ControlNet affects, and how much a step with ControlNets copies. Without engines."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from imprompt_bench.rig import sd15
from imprompt_serving.denoiser.batch import Batcher, RowSlice
from imprompt_serving.denoiser.conditioning import Conditioning
from imprompt_serving.denoiser.control import PreparedControlNet
from imprompt_serving.denoiser.job import Job
from imprompt_serving.denoiser.networks import StepNetworks
from imprompt_serving.denoiser.precision import DTYPES
from imprompt_serving.job_request import ContextWindow
from imprompt_serving.specs import Bundle, ControlNet, Motion, Residual, level_size
from jobs import job_request
from traffic import Traffic

SD15 = (
    *(Residual(320, 0),) * 3,
    Residual(320, 1),
    *(Residual(640, 1),) * 2,
    Residual(640, 2),
    *(Residual(1280, 2),) * 2,
    *(Residual(1280, 3),) * 4,
)
"""The residuals of ControlNets for SD 1.5."""
SMALL = (Residual(2, 0), Residual(3, 1), Residual(2, 2))


def bundle(residuals: tuple[Residual, ...] = SMALL, *, rows: int = 8) -> Bundle:
    """Describe a bundle with two ControlNets, one of which pools its residuals, and clips of up to 8 frames at once."""
    nets = (ControlNet(name="depth"), ControlNet(name="shuffle", global_pool=True), ControlNet(name="canny"))
    return msgspec.structs.replace(
        sd15(rows=rows), controlnets=nets, residuals=residuals, motion=Motion(window=8), pooled_size=None
    )


class Net:
    """A ControlNet whose residuals encode its inputs, row by row."""

    def __init__(self, made: Bundle, name: str, dtype: torch.dtype = torch.float32) -> None:
        self._made, self._net, self._dtype = made, made.controlnet(name), dtype
        self.rows: list[int] = []

    def run(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def run_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.rows.append(len(tensors["sample"]))
        assert tensors["sample"].shape[1] == self._made.latent_channels
        marks = _marks(tensors, len(self._net.name))
        return {
            name: (mark[:, None, None, None] * self._plane(residual, tensors["sample"])).to(self._dtype)
            for name, residual, mark in zip(self._made.residual_names, self._made.residuals, marks.T, strict=True)
        }

    def _plane(self, residual: Residual, sample: Tensor) -> Tensor:
        height, width = (level_size(side, residual.level) for side in sample.shape[-2:])
        size = (1, 1) if self._net.global_pool else (height, width)
        return torch.ones(1, residual.channels, *size)


def _marks(tensors: Mapping[str, Tensor], net: int) -> Tensor:
    """Return a number for each row and residual that depends on all inputs of a ControlNet."""
    rows = {name: tensors[name].flatten(1) for name in ("sample", "control_embedding", "encoder_hidden_states")}
    marks = rows["sample"].mean(1) + 3 * rows["control_embedding"].mean(1) + 7 * rows["encoder_hidden_states"].mean(1)
    marks = marks + net * tensors["timestep"]
    return marks[:, None] * tensors["conditioning_scale"]


class UNet:
    """A UNet that keeps the residuals that it gets."""

    def __init__(self) -> None:
        self.given: dict[str, Tensor] = {}

    def run(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def run_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.given = {name: tensor for name, tensor in tensors.items() if "residual" in name}
        return {"noise_pred": tensors["sample"] * 0.5}


def control(name: str, pictures: int, *, frames: int = 1, first_row: int = 0, size: int = 8, **window: float) -> Any:
    count = len(SMALL)
    return PreparedControlNet(
        name=name,
        embedding=torch.randn(pictures, frames, 2, size, size) + 1,
        scale=torch.rand(count) + 0.5,
        first_row=first_row,
        **{"start": 0.0, "end": 1.0, **window},
    )


def job(made: Bundle, *controls: PreparedControlNet, pictures: int = 1, seed: int = 0, **changes: Any) -> Job:
    request = job_request(seeds=tuple(range(seed, seed + pictures)), **{"num_inference_steps": 4, **changes})
    branches = 2 if made.guided(request) else 1
    inputs = {"encoder_hidden_states": torch.randn(branches * pictures, 77, 768)}
    return Job(request, made, Conditioning(request, made, inputs, pictures, controls), {})


def expected(jobs: list[Job], made: Bundle) -> dict[str, Tensor]:
    """Compute the residuals of a step of all `jobs`, row by row and frame by frame."""
    found: dict[str, list[Tensor]] = {name: [] for name in made.residual_names}
    for one in jobs:
        sample, timesteps = one.model_input()
        text = one.conditioning()["encoder_hidden_states"][-one.pictures * one.branches :]
        frames = one.latents.shape[2] if one.latents.ndim == 5 else None
        windows = one.windows if len(one.windows) > 1 else [range(frames or 1)]
        first = 0 if len(text) == len(one.conditioning()["encoder_hidden_states"]) else one.pictures
        for row in range(one.rows):
            own = row % (one.pictures * one.branches)
            for place, frame in enumerate(windows[row // (one.pictures * one.branches)]):
                seen = {
                    "sample": (sample[row] if frames is None else sample[row][:, place])[None],
                    "timestep": timesteps[row][None],
                    "encoder_hidden_states": text[own][None],
                }
                acting = [use for use in one.controls() if first + own >= use.first_row]
                total = torch.zeros(len(made.residuals))
                for use in acting:
                    given = {
                        **seen,
                        "control_embedding": use.embedding[own % one.pictures, frame][None],
                        "conditioning_scale": use.scale[None],
                    }
                    total = total + _marks(given, len(use.name))[0]
                for name, residual, mark in zip(made.residual_names, made.residuals, total, strict=True):
                    height, width = (level_size(side, residual.level) for side in sample.shape[-2:])
                    found[name].append(mark.expand(residual.channels, height, width))
    stacked = {name: torch.stack(rows) for name, rows in found.items()}
    if jobs[0].latents.ndim == 5:
        return {name: value.unflatten(0, (-1, jobs[0].frames)) for name, value in stacked.items()}
    return stacked


def run(made: Bundle, jobs: list[Job], *, bucketed: bool = False) -> dict[str, Net]:
    """Run all steps of `jobs` in shared calls, and compare each with `expected`."""
    call_rows = made.shapes.call_rows(bucketed=bucketed)
    unet = UNet()
    nets = {net.name: Net(made, net.name) for net in made.controlnets}
    networks = StepNetworks(made, {"unet": unet, "motion_unet": unet}, nets, call_rows)
    batcher = Batcher(made, call_rows)
    for _ in range(4):
        parts = [RowSlice(one, 0, one.rows) for one in jobs]
        wanted = expected(jobs, made)
        noise = networks(parts, batcher.inputs(parts))
        for name, value in wanted.items():
            torch.testing.assert_close(unet.given[name][: len(value)], value)
        for part, rows in zip(
            parts, noise[: sum(one.rows for one in jobs)].split([one.rows for one in jobs]), strict=True
        ):
            part.job.add_output_rows(rows)
    return nets


def test_one_net_for_all_rows() -> None:
    made = bundle()
    nets = run(made, [job(made, control("depth", 2), pictures=2)])
    assert nets["depth"].rows == [4] * 4


def test_nets_add_up() -> None:
    made = bundle()
    run(made, [job(made, control("depth", 1), control("shuffle", 1), control("canny", 1))])


def test_the_order_of_nets_does_not_matter_and_a_pooling_net_may_be_alone() -> None:
    made = bundle()
    run(made, [job(made, control("shuffle", 1), control("depth", 1))])
    run(made, [job(made, control("shuffle", 1))])


@pytest.mark.parametrize("bucketed", [False, True])
def test_each_job_has_its_own_controls(bucketed: bool) -> None:
    """With and without ControlNets, guess mode, limited steps, and guidance that ends, in one call."""
    made = bundle(rows=16)
    jobs = [
        job(made, seed=1),
        job(made, control("depth", 2, start=0.25), control("canny", 2), pictures=2, seed=2),
        job(made, control("canny", 1, first_row=1), seed=4),
        job(made, seed=5, guidance_end=0.25),
        job(made, control("depth", 1, end=0.5), control("shuffle", 1), seed=6, guidance_end=0.25),
        job(made, control("depth", 2, first_row=2), pictures=2, seed=7, guidance_end=0.25),
    ]
    nets = run(made, jobs, bucketed=bucketed)
    assert max(nets["canny"].rows) == (8 if bucketed else 5)


def test_large_batches_are_split_at_the_row_limit() -> None:
    made = bundle(rows=3)
    jobs = [job(made, control("depth", 1), control("canny", 1)), job(made), job(made, control("canny", 1), seed=3)]
    nets = run(made, jobs)
    assert nets["canny"].rows == [3, 1] * 4


def test_calls_are_padded() -> None:
    made = bundle(rows=8)
    nets = run(made, [job(made, control("depth", 3), pictures=3), job(made, seed=5)], bucketed=True)
    assert nets["depth"].rows == [8] * 4
    nets = run(made, [job(made, control("depth", 3), control("canny", 3, first_row=3), pictures=3)], bucketed=True)
    assert (nets["depth"].rows, nets["canny"].rows) == ([8] * 4, [4] * 4)


@pytest.mark.parametrize(("rows", "bucketed"), [(5, False), (100, False), (5, True), (100, True)])
def test_clips(rows: int, bucketed: bool) -> None:
    made = bundle(rows=rows)
    clip: dict[str, Any] = {"frames": 6, "context": ContextWindow(length=8)}
    jobs = [
        job(made, control("depth", 2, frames=6), pictures=2, **clip),
        job(made, seed=3, **clip),
        job(made, control("depth", 1, frames=6), control("canny", 1, frames=6, first_row=1), seed=4, **clip),
    ]
    run(made, jobs, bucketed=bucketed)


def test_clips_in_windows() -> None:
    made = bundle(rows=100)
    clip: dict[str, Any] = {"frames": 20, "context": ContextWindow(length=8, stride=2), "guidance_end": 0.5}
    jobs = [job(made, control("depth", 2, frames=20, first_row=2), pictures=2, **clip), job(made, seed=3, **clip)]
    assert len(jobs[0].windows) > 2
    run(made, jobs)


def test_some_rows_of_a_job() -> None:
    """Rows of a job that do not fit into a call run in a later one."""
    made, unet = bundle(), UNet()
    one = job(made, control("depth", 3, first_row=3), pictures=3)
    wanted = expected([one], made)
    networks = StepNetworks(made, {"unet": unet}, {"depth": Net(made, "depth")})
    for start, stop in ((0, 2), (2, 5), (5, 6)):
        parts = [RowSlice(one, start, stop)]
        networks(parts, Batcher(made).inputs(parts))
        for name, value in wanted.items():
            torch.testing.assert_close(unet.given[name], value[start:stop])


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_residuals_have_the_type_of_the_networks(precision: str, dtype: torch.dtype) -> None:
    """This includes the zeros of rows without a net."""
    made, unet = msgspec.structs.replace(bundle(), precision=precision), UNet()
    nets = {name: Net(made, name, dtype) for name in ("depth", "canny")}
    networks = StepNetworks(made, {"unet": unet}, nets)
    for jobs in (
        [job(made, control("depth", 1))],
        [job(made), job(made, control("depth", 1), control("canny", 1))],
        [job(made)],
    ):
        parts = [RowSlice(one, 0, one.rows) for one in jobs]
        networks(parts, Batcher(made).inputs(parts))
        assert {value.dtype for value in unet.given.values()} == {dtype}


def test_a_prompt_that_changes_reaches_the_net() -> None:
    made, unet = bundle(), UNet()
    one = job(made, control("depth", 1))
    networks = StepNetworks(made, {"unet": unet}, {"depth": Net(made, "depth")})
    parts = [RowSlice(one, 0, 2)]
    inputs = Batcher(made).inputs(parts)
    networks(parts, inputs)
    changed = {**inputs, "encoder_hidden_states": torch.randn(2, 77, 768)}
    networks(parts, changed)
    other = UNet()
    StepNetworks(made, {"unet": other}, {"depth": Net(made, "depth")})(parts, changed)
    torch.testing.assert_close(unet.given["mid_residual"], other.given["mid_residual"])


def test_memory_is_freed_with_the_first_job() -> None:
    made, unet = bundle(), UNet()
    networks = StepNetworks(made, {"unet": unet}, {"depth": Net(made, "depth")})
    parts = [RowSlice(job(made), 0, 2), RowSlice(job(made, control("depth", 1)), 0, 2)]
    networks(parts, Batcher(made).inputs(parts))
    kept = weakref.ref(unet.given.pop("mid_residual"))
    assert kept() is not None, "the residuals of the next step are written to it"
    del parts
    assert kept() is None


class Silent:
    """A full-size ControlNet that copies nothing itself."""

    def __init__(self, made: Bundle) -> None:
        self._made = made

    def run(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def run_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows, side = len(tensors["sample"]), tensors["sample"].shape[-1]
        kind: Any = {"dtype": DTYPES[self._made.precision], "device": "meta"}
        return {
            name: torch.empty(rows, channels, level_size(side, level), level_size(side, level), **kind)
            for name, (channels, level) in zip(self._made.residual_names, self._made.residuals, strict=True)
        }


def traffic(
    layout: list[tuple[str, ...]], step: int = 1, *, bucketed: bool = False, precision: str = "fp32"
) -> Traffic:
    """Measure the copies in step `step` of guided pictures of SD 1.5 at 512 x 512, with these nets for each job."""
    made = msgspec.structs.replace(bundle(SD15, rows=16), motion=None, precision=precision)
    jobs = []
    for seed, names in enumerate(layout):
        controls = tuple(
            replace(
                control(name, 1, size=1),
                embedding=torch.empty(1, 1, 320, 64, 64, device="meta"),
                scale=torch.empty(len(SD15), device="meta"),
            )
            for name in names
        )
        request = job_request(seeds=(seed,), height=512, width=512)
        inputs = {"encoder_hidden_states": torch.empty(2, 77, 768)}
        meta = torch.device("meta")
        jobs.append(Job(request, made, Conditioning(request, made, inputs, 1, controls, device=meta), {}, meta))
    call_rows = made.shapes.call_rows(bucketed=bucketed)
    nets = {net.name: Silent(made) for net in made.controlnets if not net.global_pool}
    networks, batcher = StepNetworks(made, {"unet": UNet()}, nets, call_rows), Batcher(made, call_rows)
    for index in range(step + 1):
        parts = [RowSlice(one, 0, one.rows) for one in jobs]
        with torch.no_grad():
            inputs = batcher.inputs(parts)
            with Traffic() as counted:
                noise = networks(parts, inputs)
            if index < step:
                for one, rows in zip(jobs, noise[: 2 * len(jobs)].split(2), strict=True):
                    one.add_output_rows(rows)
    return counted


@pytest.mark.parametrize(
    ("layout", "copies", "megabytes"),
    [
        ([("depth",)], 0, 0),
        ([("depth",)] * 4, 0, 0),
        ([("depth", "canny")], 0, 0),
        # The residuals of the net, next to the zeros of other rows, and the latents and timesteps in between.
        ([(), ("depth",)], 13, 53.7),
        ([("depth",), (), ("depth",)], 28, 107.7),
        ([()], 0, 0),
    ],
)
def test_copies_of_a_step(layout: list[tuple[str, ...]], copies: int, megabytes: float) -> None:
    counted = traffic(layout)
    assert counted.copies.total() == copies, counted.copies
    assert counted.bytes / 1e6 == pytest.approx(megabytes, abs=0.1)
    assert not counted.waits


def test_residuals_in_half_precision_are_half_the_bytes() -> None:
    fp32, fp16 = (traffic([(), ("depth",)], precision=precision) for precision in ("fp32", "fp16"))
    assert fp16.copies == fp32.copies
    assert fp16.bytes == fp32.bytes / 2 > 26e6


def test_padding_is_not_copied_at_each_step() -> None:
    assert not traffic([("depth",)] * 3, bucketed=True).copies


class SwappableUNet(UNet):
    """Record the LoRAs that each call runs with."""

    def __init__(self) -> None:
        super().__init__()
        self.loras: dict[str, float] = {}
        self.calls: list[dict[str, float]] = []

    def use_loras(self, scales: Mapping[str, float]) -> None:
        self.loras = dict(scales)

    def run_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.calls.append(self.loras)
        return super().run_tensors(tensors)


def test_a_call_runs_with_the_loras_of_its_jobs() -> None:
    """Each network switches separately: a call for clips does not switch the network for pictures."""
    made = msgspec.structs.replace(bundle(), controlnets=(), loras=("soft", "bold"))
    unets = {"unet": SwappableUNet(), "motion_unet": SwappableUNet()}
    networks = StepNetworks(made, unets, {})
    for lora, frames in (({"soft": 0.5}, None), ({}, None), ({"bold": 1.0}, 8)):
        job: Any = SimpleNamespace(request=job_request(lora=lora))
        shape = (1, 4, 8, 8) if frames is None else (1, 4, frames, 8, 8)
        networks([RowSlice(job, 0, 1)], {"sample": torch.ones(shape)})
    assert unets["unet"].calls == [{"soft": 0.5}, {}]
    assert unets["motion_unet"].calls == [{"bold": 1.0}]
