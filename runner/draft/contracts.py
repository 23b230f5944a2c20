"""What the loop, its drafters and their readings promise each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from llamabase.llama.context import Context, LastBatch
from llamabase.llama.states import PairContext
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import Sampling

AUTO, FULL = "auto", "full"
VOCABS = (AUTO, "trim", "context", "spec")  # what a trimmed drafter may draft from


@dataclass(frozen=True)
class Proposal:
    """A drafted token (target id) and the drafter's own probability of it, from 0 to 1."""

    token: int
    certainty: float


@dataclass(frozen=True)
class Round:
    """One target call. `tokens` is what it emitted: the accepted drafts and the token after them. `drafted` are the
    drafts that it verified, without those that a schema forbids.

    Seconds are wall time: draft and verify inside llama.cpp, host everywhere else. `finish` is "stop" (the last of
    `tokens` is an end token) or "length" on the last round, else None.
    """

    tokens: list[int]
    drafted: list[int]
    accepted: int
    draft_seconds: float
    verify_seconds: float
    host_seconds: float
    finish: str | None = None

    @property
    def seconds(self) -> float:
        """Wall time of the whole round."""
        return self.draft_seconds + self.verify_seconds + self.host_seconds


class Drafter:
    """Proposes tokens. It keeps its cache in step with the text that it is given; this one proposes none."""

    def draft(self, text: Sequence[int], n: int, sampling: Sampling, noise: Noise) -> list[int]:
        """At most n target ids to follow `text`, which is the whole text so far. Draws use `noise`."""
        return []

    def prepare(self, text: Sequence[int], left: int) -> None:
        """Read a prompt before the first draft. At most `left` tokens will follow it."""

    def learn(self, round_: Round, made: int, read: int, batch: LastBatch) -> None:
        """Learn from a round, for which so many drafts were made and the target read so many tokens. `batch`: what the
        target computed for this conversation and others.
        """

    def settle(self) -> None:
        """Make the cache agree with the record of it. An interruption may have come at any point."""

    @property
    def seconds(self) -> float:
        """Wall time spent inside llama.cpp and ggml so far."""
        return 0.0


class NoDrafter(Drafter):
    """Plain decoding."""


class Step(NamedTuple):
    """What a draft step computes: logits (float32, rows of the head) and the hidden state (float32, n_embd; empty if it
    was not asked for). Both are views until the next step.
    """

    logits: np.ndarray
    hidden: np.ndarray


class Reading(Protocol):
    """How a drafter reads a text and continues it, one step after another."""

    @property
    def context(self) -> Context | PairContext: ...

    def room(self, text: Sequence[int]) -> int:
        """The number of steps that can be taken after `text`."""

    def unread(self, text: Sequence[int]) -> int:
        """The number of tokens of `text` that the first step has to read."""

    def begin(self, text: Sequence[int]) -> Step:
        """Read on to the end of `text`."""

    def follow(self, token: int) -> Step:
        """Continue with a token that the last step made likely."""

    def prepare(self, text: Sequence[int]) -> None:
        """Read `text` except what a step reads anyway, and forget what does not belong to it."""

    def settle(self) -> None:
        """Make the cache agree with the record of it. An interruption may have come at any point."""

    @property
    def seconds(self) -> float:
        """Wall time spent inside llama.cpp and ggml so far."""
