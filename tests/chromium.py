"""Drive the playground in Chromium, as a user does."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, Request, expect, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
OPTIONS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
TIMEOUT_MS = 60_000


@contextmanager
def launched() -> Iterator[Browser]:
    """Run Chromium without a window; skip the test if it is not installed."""
    if not CHROMIUM.exists():
        pytest.skip(f"needs {CHROMIUM}: apt-get install chromium")
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@contextmanager
def opened(context: BrowserContext, address: str) -> Iterator[Page]:
    """Open the playground at `address`. Nothing may go wrong there, and no request may leave its origin."""
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    problems: list[str] = []

    def note(message: ConsoleMessage) -> None:
        # Chromium reports every refused request here; tests check what the page shows for it.
        if message.type in ("error", "warning") and "the server responded with a status of 4" not in message.text:
            problems.append(message.text)

    def note_foreign(request: Request) -> None:
        if not request.url.startswith((f"{address}/", f"blob:{address}/", "data:image/")):
            problems.append(f"requested {request.url}")

    page.on("console", note)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", note_foreign)
    page.goto(address)
    yield page
    assert problems == []


def wait_for_models(page: Page) -> None:
    """Wait until the page knows what the server has."""
    page.wait_for_selector("#model option", state="attached")


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def drop(page: Page, target: Locator, *files: Path) -> None:
    """Drop files on `target` as a user does."""
    target.scroll_into_view_if_needed()
    box = target.bounding_box()
    assert box is not None
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        position = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        session.send("Input.dispatchDragEvent", {"type": kind, "data": data, **position})
    session.detach()


def choose(page: Page, group: str, name: str, image: Image.Image) -> None:
    """Choose a picture with the file picker of the field whose group has this name."""
    field = page.get_by_role("group", name=group, exact=True).locator(".drop input")
    field.set_input_files({"name": name, "mimeType": "image/png", "buffer": png(image)})


def brush(page: Page, *points: tuple[float, float]) -> None:
    """Draw a line on the mask; points are fractions of its width and height."""
    canvas = page.locator("#mask canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    for index, (x, y) in enumerate(points):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
        if index == 0:
            page.mouse.down()
    page.mouse.up()


def generate(page: Page, *, count: int = 1) -> list[bytes]:
    """Generate, and download the new pictures."""
    runs = page.locator("article")
    expected = runs.count() + 1
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".error:visible").or_(runs.nth(expected - 1)).first).to_be_visible()
    assert page.locator(".error:visible").all_inner_texts() == []
    links = runs.first.get_by_role("link", name="Download")
    expect(links).to_have_count(count)
    files = []
    for link in links.all():
        with page.expect_download() as download:
            link.click()
        files.append(download.value.path().read_bytes())
    return files


def pixels(file: bytes | Path) -> np.ndarray:
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        return np.asarray(image.convert("RGB"), np.float32)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


def copied(page: Page, language: str) -> str:
    """Copy the request as code, and return the clipboard."""
    page.get_by_role("button", name=f"Copy as {language}").click()
    dialog = page.get_by_role("dialog", name=language)
    expect(dialog.get_by_text("Copied.")).to_be_visible()
    text = page.evaluate("navigator.clipboard.readText()")
    dialog.get_by_role("button", name="Close").click()
    return text


def save_files(page: Page, folder: Path) -> None:
    """Save the files that the code reads, as the dialog offers them."""
    page.get_by_role("button", name="Copy as curl").click()
    dialog = page.get_by_role("dialog", name="curl")
    expect(dialog.get_by_text("Copied.")).to_be_visible()
    for link in dialog.get_by_role("link").all():
        with page.expect_download() as download:
            link.click()
        download.value.save_as(folder / download.value.suggested_filename)
    dialog.get_by_role("button", name="Close").click()
