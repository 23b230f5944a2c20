"""The server's page in headless Chromium, where Debian's chromedriver is installed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .browser import CHROMIUM, DRIVER, ENTER, ESCAPE, Browser
from .test_serve import F32, serving

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs a browser: apt-get install chromium chromium-driver"
)


@pytest.fixture
def page(toys: dict[str, Path]) -> Iterator[Browser]:
    """The page at 360 px, over a toy whose drafter is right and whose texts do not end."""
    engine = Engine(LoadOptions(toys["target"], toys["spec-trimmed"], n_ctx=512, cache=F32, cache_draft=F32))
    with serving(engine, draft_max=2) as (url, _), Browser(url, 360, 640) as opened:
        opened.wait("document.getElementById('name').textContent === 'toy'")
        yield opened
        asked = opened.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
        assert asked and all(each.startswith((url, "data:")) for each in asked)  # nothing is asked of elsewhere


def figures(page: Browser) -> str:
    return str(page.evaluate("document.querySelector('p.figures:not(#wait)')?.textContent ?? ''"))


def test_send_watch_stop_and_reload(page: Browser) -> None:
    """By keyboard alone."""
    assert page.evaluate("document.activeElement.id") == "text"
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.type("the king and the sea" + ENTER)
    page.wait("document.querySelectorAll('article.assistant mark, article.assistant span').length > 3")
    page.type(ESCAPE)
    page.wait("document.getElementById('send').textContent === 'Send'")
    assert "stopped" in figures(page) or "tok/s" in figures(page)
    assert page.evaluate("JSON.parse(sessionStorage.messages).length") == 2
    said = page.evaluate("document.querySelector('article.assistant').textContent")
    page.reload()
    page.wait("document.querySelector('article.assistant') !== null")
    assert page.evaluate("document.querySelector('article.assistant').textContent") == said
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_switches(page: Browser) -> None:
    """Plain decoding tints nothing and drafts nothing; the speculator drafts what the trimmed rows cannot."""
    page.wait("document.querySelectorAll('#vocab option').length === 4")
    short = """send = window.fetch, window.fetch = (url, how) => send(url, how?.body
        ? {...how, body: how.body.replace('"stream":true', '"stream":true,"max_tokens":30')} : how), true"""
    page.evaluate(short)
    accepted: dict[tuple[str, str], int | None] = {}
    for drafts, vocab in (("0", "auto"), ("3", "trim"), ("3", "spec")):
        page.evaluate("document.getElementById('clear').click()")
        for name, value in (("temp", "0"), ("drafts", drafts), ("vocab", vocab)):
            assert page.evaluate(f"document.getElementById('{name}').value = {json.dumps(value)}") == value
        page.type("the sea" + ENTER)
        page.wait("/tau/.test(document.querySelector('p.figures:not(#wait)')?.textContent)")
        found = re.search(r"(\d+) of (\d+) drafts accepted", figures(page))
        accepted[drafts, vocab] = int(found[1]) if found else None
        tinted = page.evaluate("document.querySelectorAll('article.assistant mark').length")
        assert (tinted > 0) == bool(accepted[drafts, vocab])
    assert accepted["0", "auto"] is None
    assert accepted["3", "trim"] is not None
    assert accepted["3", "spec"]
    assert page.evaluate("document.querySelectorAll('article.error').length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(page: Browser, scheme: str) -> None:
    page.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", back)[:3])) / 3
    assert (brightness > 128) == (scheme == "light")
