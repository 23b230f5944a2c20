"""The server's page in headless Chromium, where that and playwright are installed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .test_serve import F32, serving

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture
def page(toys: dict[str, Path]) -> Iterator[Any]:
    """The page at 360 px, over a toy whose drafter is right and whose texts do not end."""
    engine = Engine(LoadOptions(toys["target"], toys["spec-trimmed"], n_ctx=512, cache=F32, cache_draft=F32))
    with serving(engine, draft_max=2) as (url, _), sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 360, "height": 640})
        asked: list[str] = []
        opened.on("request", lambda request: asked.append(request.url))
        opened.goto(url)
        yield opened
        assert all(each.startswith((url, "data:")) for each in asked)  # nothing is asked of elsewhere
        browser.close()


def test_send_watch_stop_and_reload(page: Any) -> None:
    """By keyboard alone."""
    page.wait_for_function("document.getElementById('name').textContent === 'toy'")
    assert page.evaluate("document.activeElement.id") == "text"
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.keyboard.type("the king and the sea")
    page.keyboard.press("Enter")
    page.wait_for_selector("article.assistant mark, article.assistant span")
    page.wait_for_timeout(300)
    page.keyboard.press("Escape")
    page.wait_for_function("document.getElementById('send').textContent === 'Send'")
    figures = page.text_content("p.figures")
    assert "stopped" in figures or "tok/s" in figures
    assert page.evaluate("JSON.parse(sessionStorage.messages).length") == 2
    said = page.text_content("article.assistant")
    page.reload()
    page.wait_for_selector("article.assistant")
    assert page.text_content("article.assistant") == said
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_switches(page: Any) -> None:
    """Plain decoding tints nothing and drafts nothing; the speculator drafts what the trimmed rows cannot."""
    page.wait_for_function("document.querySelectorAll('#vocab option').length === 4")
    page.fill("#temp", "0")
    stood = {}
    page.route("**/v1/chat/completions", lambda route: route.continue_(
        post_data=route.request.post_data.replace('"stream":true', '"stream":true,"max_tokens":30')
    ))  # fmt: skip
    for drafts, vocab in (("0", "auto"), ("3", "trim"), ("3", "spec")):
        page.click("#clear")
        page.select_option("#drafts", drafts)
        page.select_option("#vocab", vocab)
        page.fill("#text", "the sea")
        page.keyboard.press("Enter")
        page.locator("p.figures", has_text="tau").wait_for()
        figures = page.text_content("p.figures")
        found = re.search(r"(\d+) of (\d+) drafts stood", figures)
        stood[drafts, vocab] = int(found[1]) if found else None
        assert (page.locator("article.assistant mark").count() > 0) == bool(stood[drafts, vocab])
    assert stood["0", "auto"] is None
    assert stood["3", "trim"] is not None
    assert page.locator("article.error").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", back)[:3])) / 3
    assert (brightness > 128) == (scheme == "light")
