"""What drafting costs and brings on this machine, learned while running: step costs, chances, the drafter's speedup."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from llamabase.llama.timing import StepCost

# WEIGHT: observations that a prior counts for. MEMORY: decay of an observation's weight at each later one. In the
# worlds of tests/test_auto.py 3 to 12 and 0.95 to 0.99 do about as well.
WEIGHT, MEMORY = 6.0, 0.97
_BINS = 6  # of a claim's odds, by powers of two, each way


class Chances:
    """The chance that a draft is accepted, from the chance its source claims, corrected by what came of such claims.

    `seen`: [accepted, observed] by bins of the claim's odds, as an earlier session left them. Raises ValueError or
    TypeError for anything else.
    """

    def __init__(self, seen: Sequence[Sequence[float]] = ((0.0, 0.0),) * (2 * _BINS + 1)) -> None:
        self.seen = [[float(accepted), float(n)] for accepted, n in seen]
        if len(self.seen) != 2 * _BINS + 1 or not all(0 <= accepted <= n < math.inf for accepted, n in self.seen):
            raise ValueError("not counts of accepted drafts")

    def of(self, claimed: float) -> float:
        accepted, n = self.seen[_bin(claimed)]
        return (accepted + WEIGHT * claimed) / (n + WEIGHT)

    def mean(self, prior: float) -> float:
        """The chance of a draft that is not made yet, of which nothing is claimed."""
        accepted = sum(accepted for accepted, _ in self.seen)
        return (accepted + WEIGHT * prior) / (self.observed + WEIGHT)

    def fade(self) -> None:
        """Have all that was seen count for as much less as one more observation of each claim would."""
        self.seen = [[MEMORY * accepted, MEMORY * n] for accepted, n in self.seen]

    @property
    def observed(self) -> float:
        """The number of drafts that were judged, of which old ones count for less."""
        return sum(n for _, n in self.seen)

    def observe(self, claimed: float, accepted: bool) -> None:
        counts = self.seen[_bin(claimed)]
        counts[:] = MEMORY * counts[0] + accepted, MEMORY * counts[1] + 1


def _bin(claimed: float) -> int:
    odds = math.log2(max(claimed, 1e-9) / max(1 - claimed, 1e-9))
    return _BINS + round(min(max(odds, -_BINS), _BINS))


@dataclass
class DraftStats:
    """What sessions have learned of a pair, remembered with its step costs.

    `tokens` and `steps`: of the drafter's recent rounds, their tokens and their seconds in plain-decoding steps (0: no
    rounds). `certainties` and `matches`: how often the drafts of the drafter, and those of the text, were accepted.
    """

    tokens: float = 0.0
    steps: float = 0.0
    certainties: Chances = field(default_factory=Chances)
    matches: Chances = field(default_factory=Chances)

    def observe(self, tokens: float, steps: float, rounds: float = 1.0) -> None:
        """Count so many rounds of the drafter, each of these tokens and steps."""
        self.tokens = MEMORY * self.tokens + rounds * tokens
        self.steps = MEMORY * self.steps + rounds * steps

    @property
    def tried(self) -> bool:
        """Whether as many of the drafter's drafts were judged as its prior counts for."""
        return self.certainties.observed >= WEIGHT

    @property
    def speedup(self) -> float:
        """Tokens of the drafter's rounds per plain-decoding step."""
        return self.tokens / self.steps


def worths(
    chances: Sequence[float],
    verify: StepCost,
    rate: float,
    step: float = 0.0,
    made: int = 0,
    most: float = math.inf,
    beside: int = 0,
) -> list[float]:
    """What each beginning of a draft is worth in tokens, the empty one first; -inf if it may not be verified.

    chances[i] is that of draft i if those before it are accepted. A beginning is worth its expected tokens, less what
    the seconds it adds would bring otherwise, at `rate` tokens per second. A draft takes `step` seconds to make, but
    the first `made` are made already; all may add at most `most` seconds, with a change of the batch size and back.
    `beside`: rows of other conversations that the same batch verifies.
    """
    worth, together, expected = [0.0], 1.0, 0.0
    for m, chance in enumerate(chances, 1):
        together *= chance
        expected += together
        added = max(m - made, 0) * step + verify.of(beside + m + 1) - verify.of(beside + 1)
        may = verify.prepared(beside + m + 1) and added + 2 * verify.change <= most
        worth.append(expected - rate * added if may else -math.inf)
    return worth


def best(worth: Sequence[float]) -> int:
    """The length that is worth the most, the shortest of several."""
    return max(range(len(worth)), key=worth.__getitem__)


class KeptLength:
    """The draft length that rounds keep until another one would have brought more by the price of changing to it and
    back, in tokens, counted from when that one last was no better. Without a price every round has its best length.
    """

    def __init__(self) -> None:
        self._kept = -1  # none
        self._ahead: dict[int, float] = {}  # tokens that rounds of other lengths would have brought more

    def choose(self, worth: Sequence[float], price: float) -> int:
        """The length of a round whose lengths are worth so much."""
        if not price or not 0 <= self._kept < len(worth) or worth[self._kept] == -math.inf:
            return best(worth)
        ahead = [self._ahead.get(m, 0.0) + tokens - worth[self._kept] for m, tokens in enumerate(worth)]
        return best(ahead) if max(ahead) > 2 * price else self._kept

    def observe(self, worth: Sequence[float], chosen: int) -> None:
        """A round of a chosen length could have had others, worth so much."""
        if len(worth) <= self._kept:  # an answer that ends says nothing of the next one
            return
        if chosen != self._kept:
            self._kept, self._ahead = chosen, {}
        for m, tokens in enumerate(worth):
            self._ahead[m] = max(self._ahead.get(m, 0.0) + tokens - worth[chosen], 0.0)
