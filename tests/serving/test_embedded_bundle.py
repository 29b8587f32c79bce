"""The trained bundle follows its inputs on a server: image prompts, masks, edges, few steps, and motion."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from imprompt import Client
from imprompt_demo import bundle_path, demo, measure, quality
from imprompt_serving.launcher import Server

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def client(world: Server) -> Iterator[Client]:
    with Client(world.grpc_address) as client:
        yield client


@pytest.fixture(scope="module")
def evaluator(client: Client) -> measure.Evaluator:
    return measure.Evaluator(client, num_inference_steps=12)  # half as many, which changes the pictures little


def test_bundle_is_small() -> None:
    assert sum(file.stat().st_size for file in bundle_path().rglob("*")) < 25 * MEGABYTE


def test_demo_shows_every_use_case(client: Client, tmp_path: Path) -> None:
    results = demo.write_sheet(client, tmp_path / "demo.png")
    assert len(results) == 15
    with Image.open(tmp_path / "demo.png") as sheet, Image.open(tmp_path / "demo.gif") as film:
        assert sheet.height > 9 * 128
        assert getattr(film, "n_frames", 1) == 16


def test_prompt_decides_the_object(evaluator: measure.Evaluator) -> None:
    found = measure.text(evaluator)
    assert found["classifier_on_world"] >= 0.95
    assert found["thing_is_text"] >= 0.9


@pytest.mark.parametrize("adapter", ["plain", "plus"])
def test_image_prompt_decides_the_look(evaluator: measure.Evaluator, adapter: str) -> None:
    found = measure.image_prompt(evaluator, adapter, count=10)
    none, some, much = found["palette_distance"]
    assert none > some > much
    assert found["palette_nearer"][1] >= 0.9
    assert found["texture_distance"][2] < found["texture_distance"][0]
    assert found["thing_is_text"][2] >= 0.75


def test_inpainting_keeps_the_rest_of_the_picture(evaluator: measure.Evaluator) -> None:
    found = measure.inpainting(evaluator, count=12)
    assert found["outside_change_rectangle"] <= 11  # levels of 255; the kept part also passes through the VAE
    assert found["outside_change_outline"] <= 11
    assert found["thing_is_text_rectangle"] >= 0.8
    assert found["thing_is_text_rectangle"] > found["thing_is_text_outline"] >= 0.4


def test_edges_follow_the_control_image(evaluator: measure.Evaluator) -> None:
    found = measure.edges(evaluator)
    assert found["edge_agreement_1"] > 1.5 * found["edge_agreement_0"]
    assert found["thing_is_edges_1"] > found["thing_is_edges_0"] + 0.4


def test_four_lcm_steps_look_like_many_steps(evaluator: measure.Evaluator) -> None:
    found = measure.lcm(evaluator)
    assert found["palette_distance"] < 0.8 * found["palette_distance_to_others"]
    assert found["thing_is_text"][1] >= 0.8


def test_clips_move_smoothly_and_keep_the_look(evaluator: measure.Evaluator) -> None:
    found = measure.motion(evaluator, count=2)
    assert found["smoothness"] < 0.85  # 1 is noise
    assert found["palette_distance_0.8"] < found["palette_distance_0"]


def test_speed_is_compared_with_what_it_changes(client: Client) -> None:
    rows = quality.compare(quality.server_variants(client), 2)
    numbers = {name: [float(cell.removesuffix(" %")) for cell in cells] for name, *cells in rows}
    (_, speed, difference, similarity, *_), *others = numbers.values()
    assert (speed, difference, similarity) == (1, 0, 1)
    assert all(difference > 1 and similarity < 1 for _, _, difference, similarity, *_ in others)
    assert numbers["LCM-LoRA, 4 steps"][1] > 1.5
