"""One answer as it is computed: pieces of text, what was drafted of them, log probabilities, calls, figures.

The text ends before the first stop string; what may yet become one waits. Hermes' and Qwen's `<tool_call>` blocks
become calls where tools were offered; other models' calls stay text.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
import time
import uuid
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llamabase.llama import Model
from llamabase.sampling import Sampling

from ..engine import Engine
from ..lm import before_stop
from ..reading import shared
from ..speculative import Round

CALL, CALLED = "<tool_call>", re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Asked:
    """What an answer is to be like. `n_logprobs`: of how many alternatives; None for no log probabilities."""

    prompt: Sequence[int]
    sampling: Sampling
    limit: int
    seed: int | None
    draft_max: int | None
    stops: Sequence[str]
    n_logprobs: int | None
    tools: bool
    vocab: str


@dataclass
class Piece:
    """Text that can be given out; `logprobs`, of its tokens where they were asked for."""

    text: str
    drafted: bool
    logprobs: list[dict[str, Any]] = field(default_factory=list)


class Hold:
    """Holds back the end of a text while it may become a stop string.

    `stopped`: one is complete; `given`: characters that were given out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, list[tuple[str, bool]]()
        self.stopped, self.given = False, 0

    def feed(self, text: str, drafted: bool) -> Iterator[tuple[str, bool]]:
        """What can be given out now that this has come."""
        self._held.append((text, drafted))
        whole = "".join(held for held, _ in self._held)
        n, end = before_stop(whole, self._stops)
        self.stopped = end > 0
        yield from self._out(n)

    def _out(self, n: int) -> Iterator[tuple[str, bool]]:
        while self._held and n > 0:
            text, drafted = self._held.pop(0)
            if len(text) > n:
                self._held.insert(0, (text[n:], drafted))
            self.given += len(text[:n])
            yield text[:n], drafted
            n -= len(text)

    def rest(self) -> Iterator[tuple[str, bool]]:
        """What was held back in vain."""
        yield from self._out(sum(len(text) for text, _ in self._held))


class Answer:
    """`pieces` computes it; the rest is known when they have ended."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.text = ""
        self.tool_calls: list[dict[str, Any]] = []
        self.finish = "length"
        self.n_tokens = self.n_cached = 0
        self.accepted: list[int] = []  # by round that drafted
        self.drafted = self.rounds = 0
        self.prompt_seconds = self.seconds = 0.0
        self._logprobs: deque[tuple[int, dict[str, Any]]] = deque()

    def pieces(self, engine: Engine) -> Generator[Piece, None, None]:
        """May be closed at any time; the engine stays usable."""
        # Closed here and now: collected later, in another thread, it would settle caches that compute something else.
        with contextlib.closing(self._decoded(engine)) as steps:
            yield from self._pieces(steps)

    def _pieces(self, steps: Iterator[tuple[str, bool]]) -> Iterator[Piece]:
        asked, hold = self.asked, Hold(self.asked.stops)
        outer = Hold([CALL] if asked.tools else [])
        for text, drafted in self._held(hold, steps):
            for piece in outer.feed(text, drafted):
                yield self._given(*piece)
            if outer.stopped:
                break
        else:
            for piece in outer.rest():
                yield self._given(*piece)
            return
        called = "".join(text for text, _ in outer.rest())
        for text, _ in self._held(hold, steps):
            called += text
        self.tool_calls, left = _calls(called)
        if self.tool_calls:
            self.finish = "tool_calls"
        if left:
            yield self._given(left, False)

    def _held(self, hold: Hold, steps: Iterator[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
        """Text up to a stop string."""
        for text, drafted in steps:
            yield from hold.feed(text, drafted)
            if hold.stopped:
                self.finish = "stop"
                while self._logprobs and self._logprobs[-1][0] >= hold.given:  # of what is not given out
                    self._logprobs.pop()
                return
        yield from hold.rest()

    def _given(self, text: str, drafted: bool) -> Piece:
        self.text += text
        found = []
        while self._logprobs and self._logprobs[0][0] < len(self.text):
            found.append(self._logprobs.popleft()[1])
        return Piece(text, drafted, found)

    @property
    def left(self) -> list[dict[str, Any]]:
        """Log probabilities of the last tokens, which made no whole character."""
        return [found for _, found in self._logprobs]

    def _decoded(self, engine: Engine) -> Generator[tuple[str, bool], None, None]:
        """The text of tokens, whole characters at a time; counts and times them."""
        asked, decoder, n_read = self.asked, codecs.getincrementaldecoder("utf-8")("replace"), 0
        self.n_cached = min(shared(engine.reader.held, asked.prompt, len(asked.prompt)), len(asked.prompt) - 1)
        if engine.drafter is not None:
            engine.drafter.use(asked.vocab)
        started = time.perf_counter()
        model, n = engine.model, asked.n_logprobs

        def look(rows: np.ndarray, tokens: list[int]) -> list[dict[str, Any]]:
            return [] if n is None else [_logprob(model, row, t, n) for row, t in zip(rows, tokens, strict=True)]

        rounds: Any = engine.rounds(
            asked.prompt,
            asked.sampling,
            max_tokens=asked.limit,
            draft_max=asked.draft_max,
            seed=asked.seed,
            look=look,
        )
        with contextlib.closing(rounds):
            for round_ in rounds:
                now = time.perf_counter()
                if not self.rounds:
                    took = round_.draft_seconds + round_.verify_seconds + round_.host_seconds
                    self.prompt_seconds = now - started - took
                self._count(round_)
                self.seconds = now - started - self.prompt_seconds
                shown = round_.tokens[:-1] if round_.finish == "stop" else round_.tokens
                for i, token in enumerate(shown):
                    self.n_tokens += 1
                    text = decoder.decode(model.piece(token))
                    if round_.seen:
                        self._logprobs.append((n_read, round_.seen[i]))
                    n_read += len(text)
                    if text:
                        yield text, i < round_.accepted
                self.n_tokens += len(round_.tokens) - len(shown)

    def _count(self, round_: Round) -> None:
        self.rounds += 1
        self.drafted += len(round_.drafted)
        if round_.drafted:
            self.accepted.append(round_.accepted)
        self.finish = round_.finish or self.finish

    @property
    def timings(self) -> dict[str, Any]:
        """As llama-server names them, and mlx-vlm the last two."""
        n, read = self.n_tokens, len(self.asked.prompt) - self.n_cached
        return {
            "cache_n": self.n_cached,
            "prompt_n": read,
            "prompt_ms": 1000 * self.prompt_seconds,
            "prompt_per_second": read / self.prompt_seconds if self.prompt_seconds else 0.0,
            "predicted_n": n,
            "predicted_ms": 1000 * self.seconds,
            "predicted_per_second": n / self.seconds if self.seconds else 0.0,
            "draft_n": self.drafted,
            "draft_n_accepted": sum(self.accepted),
            "draft_rounds": self.rounds,
            "tau": n / self.rounds if self.rounds else 0.0,
        }


def _logprob(model: Model, row: np.ndarray, token: int, n: int) -> dict[str, Any]:
    """The target's own log probability of a token, and of the n likeliest, before any sampler."""
    best = float(row.max())
    total = best + float(np.log(np.exp(row - best).sum(dtype=np.float64)))
    places: list[int] = np.argpartition(row, -n)[-n:].tolist() if n else []
    top = sorted(places, key=lambda i: (-row[i], i))

    def entry(i: int) -> dict[str, Any]:
        piece = model.piece(i, special=True)
        text = piece.decode("utf-8", "replace")
        return {"token": text, "logprob": float(row[i]) - total, "bytes": list(piece), "id": int(i)}

    return entry(token) | {"top_logprobs": [entry(i) for i in top]}


def _calls(text: str) -> tuple[list[dict[str, Any]], str]:
    """(calls, what else there is): blocks that are no calls stay text."""
    calls, left, end = [], "", 0
    for block in CALLED.finditer(text):
        left += text[end : block.start()]
        end = block.end()
        try:
            said = json.loads(block[1])
            name, arguments = said["name"], said.get("arguments", {})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            left += block[0]
            continue
        calls.append({
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {
                "name": str(name),
                "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
            },
        })  # fmt: skip
    left += text[end:]
    return calls, left.strip() if calls else left
