"""One answer as it is computed: pieces of text, what was drafted of them, log probabilities, calls, figures.

The text ends before the first stop string; what may yet become one waits. Hermes' and Qwen's `<tool_call>` blocks
become calls where tools were offered; other models' calls stay text.
"""

from __future__ import annotations

import contextlib
import json
import re
import uuid
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llamabase.llama import Model
from llamabase.sampling import Sampling

from ..engine import Engine, Record
from ..reading import shared
from ..stops import Hold

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

    def answer(self) -> Answer:
        """One that is still to be computed."""
        return Answer(self)


@dataclass
class Piece:
    """Text that can be given out; `logprobs`, of its tokens where they were asked for."""

    text: str
    drafted: bool
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # those computed since the piece before


class Answer:
    """`pieces` computes it; the rest is known when they have ended."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.record = Record(finish_reason="length")
        self.tool_calls: list[dict[str, Any]] = []
        self.n_cached = 0
        self._logprobs: deque[tuple[int, dict[str, Any]]] = deque()

    def pieces(self, engine: Engine) -> Generator[Piece, None, None]:
        """May be closed at any time; the engine stays usable."""
        # Closed here and now: collected later, in another thread, it would settle caches that compute something else.
        with contextlib.closing(self._decoded(engine)) as steps:
            yield from self._pieces(steps)

    def _pieces(self, steps: Iterator[tuple[str, bool]]) -> Iterator[Piece]:
        hold, outer = Hold(self.asked.stops), Hold([CALL] if self.asked.tools else [])
        said = hold.through(steps)
        for piece in outer.through(said):
            yield self._given(*piece)
        called = "".join(text for text, _ in (*outer.rest(), *said))
        if hold.stopped:
            self.record.finish_reason = "stop"
            while self._logprobs and self._logprobs[-1][0] >= hold.given:  # of what is not given out
                self._logprobs.pop()
        self.tool_calls, left = _calls(called)
        if self.tool_calls:
            self.record.finish_reason = "tool_calls"
        if left:
            yield self._given(left, False)

    def _given(self, text: str, drafted: bool) -> Piece:
        self.record.text += text
        found = []
        while self._logprobs and self._logprobs[0][0] < len(self.record.text):
            found.append(self._logprobs.popleft()[1])
        return Piece(text, drafted, found)

    @property
    def left(self) -> list[dict[str, Any]]:
        """Log probabilities of the last tokens, which made no whole character."""
        return [found for _, found in self._logprobs]

    def _decoded(self, engine: Engine) -> Generator[tuple[str, bool], None, None]:
        """The engine's words; keeps what was asked to be seen of their tokens."""
        asked, n_read, seen = self.asked, 0, deque[dict[str, Any]]()
        self.n_cached = min(shared(engine.reader.held, asked.prompt, len(asked.prompt)), len(asked.prompt) - 1)
        if engine.drafter is not None:
            engine.drafter.use(asked.vocab)
        model, n = engine.model, asked.n_logprobs

        def look(rows: np.ndarray, tokens: list[int]) -> None:
            if n is not None:
                seen.extend(_logprob(model, row, token, n) for row, token in zip(rows, tokens, strict=True))

        limits = {"max_tokens": asked.limit, "draft_max": asked.draft_max, "seed": asked.seed}
        with contextlib.closing(
            engine.spoken(asked.prompt, asked.sampling, self.record, **limits, look=look)
        ) as spoken:
            for text, drafted in spoken:
                if seen:
                    self._logprobs.append((n_read, seen.popleft()))
                n_read += len(text)
                yield text, drafted

    @property
    def timings(self) -> dict[str, Any]:
        """As llama-server names them, and mlx-vlm the last two."""
        record, read = self.record, len(self.asked.prompt) - self.n_cached
        return {
            "cache_n": self.n_cached,
            "prompt_n": read,
            "prompt_ms": 1000 * record.prompt_seconds,
            "prompt_per_token_ms": 1000 * record.prompt_seconds / read,
            "prompt_per_second": read / record.prompt_seconds if record.prompt_seconds else 0.0,
            "predicted_n": record.tokens,
            "predicted_ms": 1000 * record.seconds,
            "predicted_per_token_ms": 1000 * record.seconds / record.tokens if record.tokens else 0.0,
            "predicted_per_second": record.tokens_per_second,
            "draft_n": record.drafted,
            "draft_n_accepted": record.accepted,
            "draft_rounds": record.rounds,
            "tau": record.tau,
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
