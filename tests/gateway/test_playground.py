"""The playground in a real browser, in front of a real server."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from chromium import brush, choose, copied, difference, drop, generate, opened, pixels, png, save_files, wait_for_models
from imprompt_demo.world import picture
from imprompt_serving.launcher import Server

HEART, SQUARE, HOUSE = picture(4), picture(64), picture(33)


def test_dropped_pictures_change_the_result(page: Page, tmp_path: Path) -> None:
    for name, shown in (("heart.png", HEART), ("house.png", HOUSE)):
        (tmp_path / name).write_bytes(png(shown.image()))
    (plain,) = generate(page)
    adapter = page.get_by_role("group", name="plain", exact=True)
    drop(page, adapter, tmp_path / "heart.png")
    expect(adapter.get_by_role("img", name="heart.png")).to_be_visible()
    (one,) = generate(page)
    drop(page, adapter, tmp_path / "house.png")
    (two,) = generate(page)
    adapter.get_by_role("button", name="Remove heart.png").click()
    adapter.get_by_role("button", name="Remove house.png").click()
    (again,) = generate(page)
    assert difference(pixels(plain), pixels(one)) > 10
    assert difference(pixels(one), pixels(two)) > 2
    assert plain == again


def test_scale_belongs_to_its_adapter(page: Page) -> None:
    choose(page, "plain", "heart.png", HEART.image())
    (default,) = generate(page)
    page.get_by_role("slider", name="Scale of plus").fill("0")
    assert generate(page) == [default]
    page.get_by_role("slider", name="Scale of plain").fill("0.2")
    (weaker,) = generate(page)
    assert difference(pixels(default), pixels(weaker)) > 2


def test_pasted_picture_goes_to_the_focused_list(page: Page) -> None:
    page.evaluate(
        """async (bytes) => {
          const picture = new Blob([new Uint8Array(bytes)], { type: "image/png" });
          await navigator.clipboard.write([new ClipboardItem({ "image/png": picture })]);
        }""",
        list(png(HEART.image())),
    )
    page.get_by_role("slider", name="Scale of plus").focus()
    page.keyboard.press("Control+V")
    expect(page.get_by_role("group", name="plus", exact=True).get_by_role("img")).to_be_visible()
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.press("Control+V")
    expect(page.get_by_role("group", name="plain", exact=True).get_by_role("img")).to_be_visible()


def test_files_that_are_no_pictures_are_refused(page: Page, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "heart.png").write_bytes(png(HEART.image()))
    adapter = page.get_by_role("group", name="plus", exact=True)
    drop(page, adapter, tmp_path / "notes.txt")
    message = "element => element.validationMessage"
    assert adapter.get_by_label("Add pictures").evaluate(message) == "notes.txt is not a picture"
    drop(page, adapter, tmp_path / "heart.png", tmp_path / "notes.txt")
    expect(adapter.get_by_role("img")).to_have_count(1)
    assert adapter.get_by_label("Add pictures").evaluate(message) == ""
    drop(page, page.get_by_label("Steps"), tmp_path / "heart.png")
    expect(page.get_by_label("Steps")).to_be_visible()  # the browser has not left the page


def test_painted_mask_decides_what_is_repainted(page: Page, tmp_path: Path) -> None:
    page.get_by_text("Start picture", exact=True).first.click()
    choose(page, "Start picture", "square.png", SQUARE.image())
    page.get_by_role("slider", name="Brush size").fill("50")
    brush(page, (0.25, 0.2), (0.25, 0.8))
    half = page.get_by_role("img", name=re.compile(r"Mask: 4\d % painted"))
    expect(half).to_be_visible()
    page.get_by_role("slider", name="Strength").fill("1")
    (painted,) = generate(page)
    changed = np.abs(pixels(painted) - pixels(png(SQUARE.image()))).mean((0, 2))
    assert changed[:24].mean() > 3 * changed[40:].mean()

    save_files(page, tmp_path)
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_role("img", name="Mask: empty")).to_be_visible()
    page.get_by_label("Upload a mask").set_input_files(tmp_path / "mask.png")
    expect(half).to_be_visible()
    assert generate(page) == [painted]
    page.get_by_label("Erase").check(force=True)
    brush(page, (0.25, 0.5))
    expect(page.get_by_role("img", name=re.compile(r"Mask: 2\d % painted"))).to_be_visible()


def test_start_picture_sets_the_size(page: Page) -> None:
    page.get_by_text("Start picture", exact=True).first.click()
    choose(page, "Start picture", "wide.png", Image.new("RGB", (640, 320)))
    expect(page.get_by_label("Width")).to_have_value("88")
    expect(page.get_by_label("Height")).to_have_value("64")


def test_result_is_the_next_start_picture(page: Page) -> None:
    page.fill("#seed", "")
    (first,) = generate(page)
    page.get_by_role("button", name="Reuse seed").click()
    assert generate(page) == [first]
    page.get_by_role("button", name="Edit").first.click()
    expect(page.get_by_role("img", name="Mask: empty")).to_be_visible()
    (edited,) = generate(page)
    assert difference(pixels(first), pixels(edited)) > 1


def test_control_picture(page: Page) -> None:
    (free,) = generate(page)
    page.get_by_text("ControlNet", exact=True).first.click()
    choose(page, "ControlNet", "edges.png", HOUSE.edge_image())
    (held,) = generate(page)
    assert difference(pixels(free), pixels(held)) > 5


def test_clip(page: Page) -> None:
    page.get_by_label("Frames").fill("8")
    (clip,) = generate(page)
    with Image.open(io.BytesIO(clip)) as image:
        assert image.format == "WEBP"
        assert getattr(image, "n_frames", 1) == 8


def test_error_is_shown_at_its_field(page: Page) -> None:
    page.get_by_label("Width").fill("65")
    page.get_by_role("button", name="Generate").click()
    width = page.get_by_label("Width")
    expect(width).to_have_accessible_description("must be a multiple of 4, got 65")
    expect(width).to_have_attribute("aria-invalid", "true")
    expect(width).to_be_focused()
    expect(page.locator(".error:visible")).to_have_count(1)
    width.fill("64")
    assert len(generate(page)) == 1
    expect(width).not_to_have_attribute("aria-invalid", "true")


def test_cancel(page: Page) -> None:
    page.fill("#steps", "1000")
    page.fill("#count", "8")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("progressbar")).to_have_attribute("max", "1000")
    expect(page.get_by_role("img", name="Preview")).to_be_visible()
    # A click would wait until the button has stopped moving, which each preview delays.
    page.get_by_role("button", name="Cancel").press("Enter")
    expect(page.get_by_role("status")).to_have_text("Canceled.")
    expect(page.get_by_role("button", name="Generate")).to_be_focused()
    expect(page.get_by_role("progressbar")).to_be_hidden()
    expect(page.locator("article, .error:visible")).to_have_count(0)
    page.fill("#steps", "4")
    page.fill("#count", "1")
    assert len(generate(page)) == 1


def test_copied_code_makes_the_same_picture(page: Page, world: Server, tmp_path: Path) -> None:
    page.fill("#prompt", """a "fish" for $HOME, `id` and it's\n100 % \\o/""")
    choose(page, "plain", "the artist's heart.png", HEART.image())
    choose(page, "plus", "the artist's heart.png", HOUSE.image())
    (expected,) = generate(page)
    save_files(page, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["the artist's heart-2.png", "the artist's heart.png"]
    command = copied(page, "curl")
    for shell in ("sh", "bash"):
        run([shell, "-c", command], tmp_path)
        assert (tmp_path / "out.png").read_bytes() == expected
        (tmp_path / "out.png").unlink()
    script = copied(page, "Python").replace("127.0.0.1:8001", world.grpc_address)
    run([sys.executable, "-c", script], tmp_path)
    assert np.array_equal(pixels(tmp_path / "out.png"), pixels(expected))


def test_several_pictures_have_seeds_of_their_own(page: Page, tmp_path: Path) -> None:
    page.get_by_label("Pictures", exact=True).fill("2")
    first, second = generate(page, count=2)
    assert page.locator("figcaption .facts").all_inner_texts() == ["Seed 4", "Seed 5"]
    run(["sh", "-c", copied(page, "curl")], tmp_path)
    assert [(tmp_path / f"out-{index}.png").read_bytes() for index in range(2)] == [first, second]
    page.get_by_label("Pictures", exact=True).fill("1")
    page.fill("#seed", "5")
    assert generate(page) == [second]


def test_other_model_keeps_the_prompts(page: Page) -> None:
    choose(page, "plain", "heart.png", HEART.image())
    page.get_by_label("Model").select_option("world_lcm")
    expect(page.get_by_role("img", name="heart.png")).to_be_visible()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a fish")
    expect(page.locator("#control")).to_be_hidden()
    expect(page.get_by_label("Frames")).to_be_hidden()
    assert len(generate(page)) == 1


def test_loras_of_a_model(browser: Browser, lora_gateway: str) -> None:
    with browser.new_context() as context, opened(context, lora_gateway) as page:
        wait_for_models(page)
        page.fill("#prompt", "a cat")
        page.fill("#steps", "2")
        page.fill("#seed", "4")
        (without,) = generate(page)
        page.get_by_role("group", name="LoRAs").get_by_role("slider", name="bold").fill("0.7")
        (bold,) = generate(page)
        assert difference(pixels(without), pixels(bold)) > 2


def run(command: list[str], folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
