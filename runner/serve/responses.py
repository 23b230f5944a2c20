"""One answer as it is computed: pieces of text, which of them were drafted, log probabilities, calls, figures.

The text ends before the first stop string; a possible prefix of one is held back. If tools were offered, their calls
are taken out of the text.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np

from llamabase.llama.model import Model
from llamabase.sampling.settings import Sampling
from runner.draft.reading import shared
from runner.loop.engine import Engine
from runner.loop.record import Record
from runner.loop.stops import StopFilter, TextPiece
from runner.tools.calls import HERMES, Call, Form, Tools
from runner.tools.stream import CallReader

from .lines import LineLimit


@dataclass(frozen=True)
class Asked:
    """What an answer is to be like.

    n_logprobs: alternatives to each token whose log probabilities are given; None for no log probabilities. tools:
    those that may be called, in the model's `form`; None if none may. shown: control tokens that are text. `LineLimit`
    explains n_indent and ms.
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
    n_indent: int = 0
    ms: float = 0.0


class Logprob(TypedDict):
    """A token with its log probability, as both APIs name them."""

    token: str
    logprob: float
    bytes: list[int]
    id: int


class TokenLogprob(Logprob):
    """Of a token of the answer, with the likeliest tokens in its place."""

    top_logprobs: list[Logprob]


@dataclass
class Piece:
    """Text that can be given out, with what came since the piece before: log probabilities, if wanted, and token ids.

    The target may have computed more tokens than the text holds.
    """

    text: str
    drafted: bool
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class Answer:
    """`pieces` computes it; the rest is known when they have ended."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.record = Record(finish_reason="length")
        self.calls: list[Call] = []
        self.stopping_word = ""  # the stop string that has ended it
        self.n_cached = 0  # tokens of the prompt that were read before
        self.logprobs: list[TokenLogprob] = []
        self._begins: list[int] = []  # characters of the answer before the token of each log probability
        self._given_logprobs = self._given_tokens = 0

    def pieces(self, engine: Engine) -> Generator[Piece, None, None]:
        """May be closed at any time; the engine stays usable."""
        asked, record = self.asked, self.record
        stop, lines = StopFilter(asked.stops), LineLimit(asked.n_indent, asked.ms)
        calls = None if asked.tools is None else CallReader(asked.form, asked.tools)

        def reached() -> int:
            """Characters of the answer that were given out or read as calls."""
            return len(record.text) if calls is None else calls.reached

        # Closed here and now: collected later, in another thread, it would settle caches that compute something else.
        with contextlib.closing(self._decoded(engine)) as texts:
            text_pieces = lines.through(stop.through(texts))
            for text, drafted in text_pieces if calls is None else calls.through(text_pieces):
                record.text += text
                yield self._piece(text, drafted, reached())
        if lines.reached:
            record.finish_reason = "length"
        elif stop.stopped:
            rest = "".join(text for text, _ in stop.rest())
            self.stopping_word = min(filter(rest.startswith, asked.stops), key=len, default="")
            record.finish_reason = "stop"
        if lines.reached or stop.stopped:
            del self.logprobs[bisect_left(self._begins, reached()) :]  # those of what is not given out
        if calls is not None and calls.calls:
            self.calls, record.finish_reason = calls.calls, "tool_calls"

    def _piece(self, text: str, drafted: bool, reached: int) -> Piece:
        first, token = self._given_logprobs, self._given_tokens
        self._given_logprobs, self._given_tokens = bisect_left(self._begins, reached), len(self.record.token_ids)
        return Piece(text, drafted, self.logprobs[first : self._given_logprobs], self.record.token_ids[token:])

    @property
    def last_logprobs(self) -> list[TokenLogprob]:
        """Log probabilities of the last tokens, which made no whole character."""
        return self.logprobs[self._given_logprobs :]

    def _decoded(self, engine: Engine) -> Generator[TextPiece, None, None]:
        """The text of each token; keeps its log probabilities, if they are wanted."""
        asked, n_read, waiting = self.asked, 0, deque[TokenLogprob]()
        self.n_cached = min(shared(engine.reader.held, asked.prompt, len(asked.prompt)), len(asked.prompt) - 1)
        if engine.drafter is not None:
            engine.drafter.vocab = asked.vocab
        model, n = engine.model, asked.n_logprobs

        def on_logits(rows: np.ndarray, tokens: list[int]) -> None:
            if n is not None:
                waiting.extend(_logprob(model, row, token, n) for row, token in zip(rows, tokens, strict=True))

        limits = {"max_tokens": asked.limit, "draft_max": asked.draft_max, "seed": asked.seed}
        with contextlib.closing(
            engine.token_texts(
                asked.prompt, asked.sampling, self.record, shown=asked.shown, **limits, on_logits=on_logits
            )
        ) as texts:
            for piece in texts:
                if waiting:
                    self._begins.append(n_read)
                    self.logprobs.append(waiting.popleft())
                n_read += len(piece.text)
                yield piece

    @property
    def timings(self) -> dict[str, float | str]:
        """As llama-server names them, and mlx-vlm the last two numbers. `draft_vocab` is what was drafted from."""
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
            **({"draft_vocab": record.vocab} if record.vocab else {}),
        }


def _logprob(model: Model, row: np.ndarray, token: int, n: int) -> TokenLogprob:
    """The target's own log probability of a token, and of the n likeliest, before any sampler."""
    best = float(row.max())
    total = best + float(np.log(np.exp(row - best).sum(dtype=np.float64)))
    places: list[int] = np.argpartition(row, -n)[-n:].tolist() if n else []

    def entry(i: int) -> Logprob:
        piece = model.piece(i, special=True)
        text = piece.decode("utf-8", "replace")
        return {"token": text, "logprob": float(row[i]) - total, "bytes": list(piece), "id": i}

    top = [entry(i) for i in sorted(places, key=lambda i: (-row[i], i))]
    return {**entry(token), "top_logprobs": top}
