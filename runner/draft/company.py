"""What conversations over one cache put into each other's rounds: drafting by cost needs to know."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from llamabase.llama.context import LastBatch

from .contracts import Drafter, Round

KEPT = 0.8  # weight of the mean of earlier rounds' tokens beside the last one's


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
        self.batch = LastBatch(0, 0, 0.0)  # of the target, the last one that a conversation has learned from
        self._shares: dict[Drafter, tuple[Share, LastBatch | None]] = {}  # and the batch after which it was decided

    def beside(self, one: Drafter, drafts: int = 0) -> Share:
        """What all but one put into a round. Those that are to decide yet should put in what they did before, or this
        number of drafts if that is more.
        """
        rows, tokens, made = 0, 0.0, list[int]()
        for each, (share, after) in self._shares.items():
            if each is not one:
                least = drafts if after is not None and after is not self.batch else 0
                rows, tokens = rows + max(share.rows, 1 + least), tokens + share.tokens
                made += [max(share.made[0], least)]
        return Share(rows, tokens, tuple(made))

    def put(self, one: Drafter, share: Share, decides: bool = True) -> None:
        """A conversation has decided what it puts in, so that those that decide later know it. One that never decides
        always puts in what it did before.
        """
        self._shares[one] = share, self.batch if decides else None

    def seen(self, rounds: Generator[Round, None, None], one: Drafter, decides: bool) -> Generator[Round, None, None]:
        """The same rounds of one conversation, which is in company from before it reads its prompt until the last.
        Unless it decides by itself what it puts in, it should put in what it did before.
        """
        tokens = 1.0
        self.put(one, Share(), decides)
        try:
            for round_ in rounds:
                if not decides:
                    tokens = KEPT * tokens + (1 - KEPT) * len(round_.tokens)
                    self.put(one, Share(1 + len(round_.drafted), tokens, (len(round_.drafted),)), decides)
                yield round_
        finally:
            rounds.close()
            self._shares.pop(one, None)
