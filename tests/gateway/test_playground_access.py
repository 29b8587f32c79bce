"""The playground for everybody: names, keyboard, narrow screens, contrast; and its keys and security policy."""

from __future__ import annotations

import urllib.request
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from chromium import choose, generate, opened, wait_for_models
from imprompt_demo.world import picture

HEART, SQUARE = picture(4), picture(64)
CONTROLS = {"button", "combobox", "image", "link", "radio", "slider", "spinbutton", "textbox"}
"""Roles in the accessibility tree that need a name."""


def test_every_control_has_a_name(page: Page) -> None:
    page.get_by_text("Start picture", exact=True).first.click()
    page.get_by_text("ControlNet", exact=True).first.click()
    page.get_by_text("API key", exact=True).first.click()
    choose(page, "Start picture", "square.png", SQUARE.image())
    choose(page, "plain", "heart.png", HEART.image())
    generate(page)
    session = page.context.new_cdp_session(page)
    nodes: list[dict[str, Any]] = session.send("Accessibility.getFullAXTree")["nodes"]
    found = [(node["role"]["value"], node["name"]["value"]) for node in nodes if not node["ignored"]]
    named = {(role, name) for role, name in found if role in CONTROLS}
    assert {role for role, _ in named} == CONTROLS
    assert [role for role, name in named if not name.strip()] == []
    identifiers = page.locator("[id]").evaluate_all("elements => elements.map(({ id }) => id)")
    assert len(identifiers) == len(set(identifiers))


def test_keyboard_reaches_every_control(page: Page) -> None:
    page.get_by_label("Model").focus()
    reached: list[str] = []
    while page.evaluate("document.activeElement.id") != "generate" and len(reached) < 60:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        outline = page.evaluate(
            """() => {
              const element = document.activeElement;
              return getComputedStyle(element.closest(".drop") ?? element).outlineStyle;
            }"""
        )
        assert outline != "none", f"{reached[-1]} does not show the focus"
    prompts = ["prompt", "negative-prompt", "INPUT", "scale-plain", "INPUT", "scale-plus", "SUMMARY", "SUMMARY"]
    settings = ["width", "height", "steps", "guidance", "seed", "count", "scheduler", "frames"]
    assert reached == [*prompts, *settings, "generate"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_readable_on_narrow_screens(page: Page, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})
    page.get_by_text("Start picture", exact=True).first.click()
    choose(page, "Start picture", "square.png", SQUARE.image())
    generate(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert [text for text, ratio in contrasts(page).items() if ratio < 4.5] == []


def test_key_stays_in_this_tab(browser: Browser, guarded: str) -> None:
    with browser.new_context() as context, opened(context, guarded) as page:
        key = page.get_by_label("API key")
        expect(key).to_be_focused()
        expect(key).to_have_accessible_description("a valid API key is required: Authorization: Bearer KEY")
        key.fill("first")
        key.press("Enter")
        wait_for_models(page)
        assert page.evaluate("Object.values(sessionStorage)") == ["first"]
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.fill("#prompt", "a fish")
        page.fill("#steps", "4")
        assert len(generate(page)) == 1
        page.get_by_role("button", name="Copy as curl").click()
        expect(page.get_by_role("dialog", name="curl")).to_be_visible()
        command = page.get_by_role("textbox", name="curl").input_value()
        assert "Bearer $IMPROMPT_API_KEY" in command
        assert "first" not in command
        page.reload()
        wait_for_models(page)


def test_only_own_scripts_and_styles_run(gateway: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{gateway}/") as answer:
        html = answer.read().decode()
        assert answer.headers["Content-Security-Policy"] == "default-src 'self'; img-src 'self' data: blob:"
    assert " style=" not in html
    assert "://" not in html


def contrasts(page: Page) -> dict[str, float]:
    """Return the contrast of every shown text with its background, by WCAG's formula."""
    found = page.evaluate(
        """() => {
          const channels = (color) => {
            const context = new OffscreenCanvas(1, 1).getContext("2d");
            context.fillStyle = color;
            context.fillRect(0, 0, 1, 1);
            return [...context.getImageData(0, 0, 1, 1).data];
          };
          const texts = [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility() &&
            [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim()));
          return texts.map((element) => {
            let behind = element;
            while (behind && channels(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
            const ground = getComputedStyle(behind ?? document.body).backgroundColor;
            return [element.textContent.trim(), channels(getComputedStyle(element).color), channels(ground)];
          });
        }"""
    )

    def luminance(color: list[int]) -> float:
        levels = np.array(color[:3]) / 255
        return float(
            np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)
        )

    ratios = {}
    for text, *colors in found:
        darker, lighter = sorted(map(luminance, colors))
        ratios[text] = (lighter + 0.05) / (darker + 0.05)
    return ratios
