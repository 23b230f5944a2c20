"""The server on the default pair, beside the library: what the way over HTTP costs, and what it remembers."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from runner import SpeculativeLM

from .test_serve import ROOT, ended, started

pytestmark = pytest.mark.slow

LONG = (ROOT / "runner/options.py").read_text()  # some text
ASK = "Tell a story about the sea, a lighthouse and number {}."
N = 64


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    process, url = started(["-c", "4096", "-np", "2", "--temp", "0"])
    try:
        yield url
    finally:
        process.terminate()
        assert ended(process) == 0


def timed(chunks: Iterator[Any], begun: float) -> tuple[float, float]:
    """(seconds to the first piece of text, pieces' span in seconds)."""
    times = [time.perf_counter() for chunk in chunks if chunk]
    return times[0] - begun, times[-1] - times[0]


def served(client: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    with client.stream("POST", "/v1/chat/completions", json=body) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])["choices"][0]["delta"].get("content", "")


@pytest.mark.parametrize("draft_max", [0, 1, None])
def test_what_the_way_costs(url: str, draft_max: int | None) -> None:
    """By turns, the same prompts, greedy: at least 0.97 of the library's speed, the first token within 20 ms."""
    speed, first = [], []
    with SpeculativeLM.from_pair() as lm, httpx.Client(base_url=url, timeout=300) as client:
        for turn in range(9):
            messages = [{"role": "user", "content": ASK.format(f"{turn}{draft_max}")}]
            body: dict[str, Any] = {"messages": messages, "max_tokens": N, "stream": True}
            if draft_max is not None:
                body["speculative.n_max"] = draft_max

            def library(messages: Any = messages) -> tuple[float, float]:
                begun = time.perf_counter()
                return timed(lm.stream(messages, temperature=0, max_tokens=N, draft_max=draft_max), begun)

            def server(body: Any = body) -> tuple[float, float]:
                begun = time.perf_counter()
                return timed(served(client, body), begun)

            ways = [library, server]
            found = {way.__name__: way() for way in (ways if turn % 2 else ways[::-1])}
            if turn:
                speed.append(found["library"][1] / found["server"][1])
                first.append(found["server"][0] - found["library"][0])
    print(f"draft_max {draft_max}: server / library {statistics.median(speed):.3f} of {sorted(speed)}")
    print(
        f"first token later by {1000 * statistics.median(first):.1f} ms of {[f'{1000 * s:.1f}' for s in sorted(first)]}"
    )
    assert statistics.median(speed) >= 0.97
    assert statistics.median(first) <= 0.02


def test_two_long_conversations_take_turns(url: str) -> None:
    """Of 1,500 tokens each: a second and later request reads what is new, no more."""
    talks = {
        name: [{"role": "user", "content": f"{name}. {LONG[at : at + 6800]} Sum up."}]
        for name, at in (("A", 0), ("B", 6900))
    }
    for turn in range(4):
        for name, messages in talks.items():
            answer = httpx.post(
                f"{url}/v1/chat/completions", json={"messages": messages, "max_tokens": 24}, timeout=600
            ).json()
            timings = answer["timings"]
            print(name, turn, {key: timings[key] for key in ("prompt_n", "cache_n", "predicted_n")})
            assert timings["prompt_n"] + timings["cache_n"] >= 1500
            if turn:
                assert timings["prompt_n"] < 40
            messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
            messages.append({"role": "user", "content": f"Say more, for the {turn}th time."})
