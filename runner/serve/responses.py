"""One answer as it is computed: pieces of text, what was drafted of them, log probabilities, calls, figures.

The text ends before the first stop string; a possible prefix of one is held back. Calls of tools are taken out of the
text as `runner.calls` reads them, if tools were offered.
"""

from __future__ import annotations

import contextlib
import secrets
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llamabase.llama.model import Model
from llamabase.llama.template import ALPHABET, LETTERS_OF_ID
from llamabase.sampling.settings import Sampling
from runner.draft.reading import shared
from runner.loop.engine import Engine
from runner.loop.record import Record
from runner.loop.stops import StopFilter
from runner.tools.calls import HERMES, Call, CallReader, Form, Tools


@dataclass(frozen=True)
class Asked:
    """What an answer is to be like. `n_logprobs`: of how many alternatives; None for no log probabilities.

    tools: those that may be called, in the model's `form`; None if none may. shown: control tokens that are text.
    """

    prompt: Sequence[int]
    sampling: Sampling
    limit: int
    seed: int | None
    draft_max: int | None
    stops: Sequence[str]
    n_logprobs: int | None
    tools: Tools | None
    vocab: str
    form: Form = HERMES
    shown: frozenset[int] = frozenset()

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
        hold = StopFilter(self.asked.stops)
        said = hold.through(steps)
        if self.asked.tools is None:
            for text, drafted in said:
                yield self._given(text, drafted, hold.given)
        else:
            reader = CallReader(self.asked.form, self.asked.tools)
            for text, drafted in reader.through(said):
                yield self._given(text, drafted, reader.reached)
            self.tool_calls = [_as_openai(call) for call in reader.calls]
        if hold.stopped:
            self.record.finish_reason = "stop"
            while self._logprobs and self._logprobs[-1][0] >= hold.given:  # of what is not given out
                self._logprobs.pop()
        if self.tool_calls:
            self.record.finish_reason = "tool_calls"

    def _given(self, text: str, drafted: bool, reached: int) -> Piece:
        """A piece of text that ends after so many characters of the answer, calls included."""
        self.record.text += text
        found = []
        while self._logprobs and self._logprobs[0][0] < reached:
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
            engine.drafter.vocab = asked.vocab
        model, n = engine.model, asked.n_logprobs

        def on_logits(rows: np.ndarray, tokens: list[int]) -> None:
            if n is not None:
                seen.extend(_logprob(model, row, token, n) for row, token in zip(rows, tokens, strict=True))

        limits = {"max_tokens": asked.limit, "draft_max": asked.draft_max, "seed": asked.seed}
        with contextlib.closing(
            engine.token_texts(
                asked.prompt, asked.sampling, self.record, shown=asked.shown, **limits, on_logits=on_logits
            )
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


def _as_openai(call: Call) -> dict[str, Any]:
    """A call as OpenAI's clients expect it. Its id is one that every template takes."""
    id_ = "".join(secrets.choice(ALPHABET) for _ in range(LETTERS_OF_ID))
    return {"id": id_, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
