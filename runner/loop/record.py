"""What an answer took, in raw counts and seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from runner.draft.contracts import Round


@dataclass
class Record:
    """Raw counts and seconds of one answer. Rates are properties, 0 if nothing was counted.

    tokens counts what the target emitted, an end token included; the prompt is in none of the rates. vocab: what the
    drafter drafted from, one of "trim", "context", "spec" and "full"; empty for plain decoding and without a drafter.
    """

    text: str = ""
    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    host_seconds: float = 0.0
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    finish_reason: str = "cancelled"
    vocab: str = ""
    token_ids: list[int] = field(default_factory=list, repr=False)
    accepted_by_round: list[int] = field(default_factory=list, repr=False)  # of the rounds that drafted

    def add(self, round_: Round) -> None:
        """Add a round's counts and seconds. Its tokens, and whether it ends the answer, count as they are given out."""
        self.rounds += 1
        self.drafted += len(round_.drafted)
        self.accepted += round_.accepted
        self.accepted_by_round += [round_.accepted] if round_.drafted else []
        self.draft_seconds += round_.draft_seconds
        self.verify_seconds += round_.verify_seconds
        self.host_seconds += round_.host_seconds

    def __iadd__(self, other: Record) -> Record:
        """Add the figures of another answer; text, ids and the prompt stay, and the vocabulary is the other's."""
        self.vocab = other.vocab
        for name in ("tokens", "rounds", "drafted", "accepted", "draft_seconds", "verify_seconds", "host_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    @property
    def seconds(self) -> float:
        """Wall time of the rounds: drafting, verifying, and Python's own share."""
        return self.draft_seconds + self.verify_seconds + self.host_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tau(self) -> float:
        """Mean accepted length: tokens per target call, the bonus token included."""
        return self.tokens / self.rounds if self.rounds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted, the bonus token excluded."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def as_json(self) -> dict[str, Any]:
        names = (
            "text", "tokens", "rounds", "drafted", "accepted", "seconds", "tokens_per_second", "tau", "acceptance_rate",
            "draft_seconds", "verify_seconds", "host_seconds", "prompt_tokens", "prompt_seconds", "finish_reason",
            "vocab",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def line(self) -> str:
        """The closing line of an answer."""
        text = f"{self.tokens} token{'s' * (self.tokens != 1)}, {self.tokens_per_second:.1f} tok/s"
        if self.drafted:
            text += f", tau {self.tau:.2f}, acceptance {self.acceptance_rate:.0%}"
        return text
