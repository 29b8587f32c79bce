"""The trained bundle means what it draws: image prompts, masks, lines, few steps and motion, through the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from imprompt import Client
from imprompt_demo import bundle_path, demo, measure
from imprompt_serving.launcher import Server

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    """Of a server with the bundles that the demo exports."""
    server = Server(demo.export_once(Path(str(request.config.cache.mkdir("demo")))))
    server.start()
    try:
        with Client(server.grpc_address) as client:
            yield client
    finally:
        server.kill()


@pytest.fixture(scope="module")
def evaluator(client: Client) -> measure.Evaluator:
    return measure.Evaluator(client)


def test_the_bundle_is_small() -> None:
    assert sum(file.stat().st_size for file in bundle_path().rglob("*")) < 30 * MEGABYTE


def test_the_demo_shows_every_use_case(client: Client, tmp_path: Path) -> None:
    results = demo.write_sheet(client, tmp_path / "demo.png")
    assert len(results) == 15
    with Image.open(tmp_path / "demo.png") as sheet, Image.open(tmp_path / "demo.gif") as film:
        assert sheet.height > 9 * 128
        assert getattr(film, "n_frames", 1) == 16


def test_the_text_decides_the_thing(evaluator: measure.Evaluator) -> None:
    found = measure.text(evaluator)
    assert found["classifier_on_world"] >= 0.95
    assert found["thing_is_text"] >= 0.9


@pytest.mark.parametrize("adapter", ["plain", "plus"])
def test_the_image_prompt_decides_the_look(evaluator: measure.Evaluator, adapter: str) -> None:
    found = measure.image_prompt(evaluator, adapter)
    none, some, much = found["palette_distance"]
    assert none > some > much
    assert found["palette_nearer"][1] >= 0.9
    assert found["texture_distance"][2] < found["texture_distance"][0]
    assert found["thing_is_text"][2] >= 0.75


def test_inpainting_leaves_the_rest_alone(evaluator: measure.Evaluator) -> None:
    found = measure.inpainting(evaluator)
    assert found["outside_change"] <= 10  # levels of 255; what is kept goes through the autoencoder, too
    assert found["thing_is_text"] >= 0.5


def test_edges_are_where_they_were_asked(evaluator: measure.Evaluator) -> None:
    found = measure.edges(evaluator)
    assert found["edge_agreement_1"] > 1.5 * found["edge_agreement_0"]
    assert found["thing_is_edges_1"] > found["thing_is_edges_0"] + 0.4


def test_four_steps_of_lcm_look_like_twenty_five(evaluator: measure.Evaluator) -> None:
    found = measure.lcm(evaluator)
    assert found["palette_distance"] < 0.8 * found["palette_distance_to_others"]
    assert found["thing_is_text"][1] >= 0.8


def test_clips_move_smoothly_in_the_look_of_the_reference(evaluator: measure.Evaluator) -> None:
    found = measure.motion(evaluator)
    assert found["smoothness"] < 0.85  # 1 is noise
    assert found["palette_distance_0.8"] < found["palette_distance_0"]
