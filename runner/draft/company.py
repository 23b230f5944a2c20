"""What conversations over one cache put into each other's rounds: drafting by cost needs to know."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from .contracts import Drafter

KEPT = 0.8  # weight of the mean of earlier rounds' tokens beside the last one's


class Seen(Protocol):
    """What a round emitted, and the drafts that it verified."""

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def drafted(self) -> Sequence[int]: ...


R = TypeVar("R", bound=Seen)


@dataclass(frozen=True)
class Share:
    """What conversations put into a round: rows that the target verifies, tokens that they should bring, and of each
    the number of drafts that the drafter makes.
    """

    rows: int = 1
    tokens: float = 1.0
    made: tuple[int, ...] = (0,)

    @property
    def n(self) -> int:
        """The number of conversations."""
        return len(self.made)


NOTHING = Share(0, 0.0, ())


class Company:
    """The conversations over one cache that go on now, by their drafters, what each puts into a round, and what all
    answers of the session came to.
    """

    def __init__(self) -> None:
        self.answers = 0
        self.emitted = 0  # tokens
        self.saved = 0.0  # plain steps that drafting has saved; negative if it has lost some
        self._shares: dict[Drafter, Share] = {}

    def beside(self, one: Drafter) -> Share:
        """What all but one put into a round."""
        others = [share for each, share in self._shares.items() if each is not one]
        if not others:
            return NOTHING
        rows, tokens = sum(share.rows for share in others), sum(share.tokens for share in others)
        return Share(rows, tokens, sum((share.made for share in others), ()))

    def put(self, one: Drafter, share: Share) -> None:
        """A conversation has decided what it puts in, so that those that decide later know it."""
        self._shares[one] = share

    def seen(self, rounds: Generator[R, None, None], one: Drafter, decides: bool) -> Generator[R, None, None]:
        """The same rounds of one conversation, which is in company from before it reads its prompt until the last.
        Unless it decides by itself what it puts in, it should put in what it did before.
        """
        tokens = 1.0
        self.put(one, Share())
        try:
            for round_ in rounds:
                if not decides:
                    tokens = KEPT * tokens + (1 - KEPT) * len(round_.tokens)
                    self.put(one, Share(1 + len(round_.drafted), tokens, (len(round_.drafted),)))
                yield round_
        finally:
            rounds.close()
            self._shares.pop(one, None)
