"""What drafting costs and brings on this machine, learned while running: step costs and chances of acceptance.

The rule: with V(b) the seconds of verifying b tokens at once and r the tokens per second that the time could bring
otherwise, m drafts are worth their expected tokens less r times the seconds they add. What they add is bounded, too,
whatever they are worth: a wager that pays in the long run may still be lost on this answer.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

OWN, OTHERS = 0.15, 0.05  # how fast a measured cost follows what is seen, of the same size and of others
WEIGHT = 6.0  # observations that a stated chance is worth
MEMORY = 0.97  # what an observation still weighs when the next one comes
STAKE = 0.3  # plain steps that may be risked beyond the bound,
PROMISE = 3.0  # on drafts that are expected to bring so many times what they add
EDGES = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)


class StepCost:
    """Seconds of a step by the number of tokens it reads, from measured sizes; follows what it is shown."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self._sizes = sorted(seconds)
        self._seconds = [seconds[n] for n in self._sizes]

    def of(self, n: int) -> float:
        """Between measured sizes on the line that joins them; beyond the last one, on the line from the first."""
        sizes, seconds = self._sizes, self._seconds
        i = bisect_left(sizes, n)
        if i == 0 or (i < len(sizes) and sizes[i] == n):
            return seconds[i]
        low, high = (i - 1, i) if i < len(sizes) else (0, -1)
        slope = (seconds[high] - seconds[low]) / max(sizes[high] - sizes[low], 1)
        if i == len(sizes):
            slope = max(slope, 0.0)  # a dip measured once must not make a long prompt cost less than nothing
        return seconds[high] + slope * (n - sizes[high])

    def saw(self, n: int, seconds: float) -> None:
        """A step of n tokens took this long: believe it a little, and a hiccup no more than a little."""
        ratio = min(max(seconds / self.of(n), 0.5), 2.0)
        self._seconds = [
            old * ratio ** (OWN if size == n else OTHERS) for size, old in zip(self._sizes, self._seconds, strict=True)
        ]


class Chances:
    """The chance that a draft is accepted, from the chance it claims, corrected by what came of its like."""

    def __init__(self) -> None:
        self._accepted = [0.0] * (len(EDGES) + 1)
        self._seen = [0.0] * (len(EDGES) + 1)

    def of(self, claimed: float) -> float:
        i = bisect_left(EDGES, claimed)
        return (self._accepted[i] + WEIGHT * claimed) / (self._seen[i] + WEIGHT)

    def saw(self, claimed: float, accepted: bool) -> None:
        i = bisect_left(EDGES, claimed)
        self._accepted[i] = MEMORY * self._accepted[i] + accepted
        self._seen[i] = MEMORY * self._seen[i] + 1


def best_cut(
    chances: Sequence[float],
    verify: StepCost,
    rate: float,
    step: float = 0.0,
    rows: int = 1,
    most: float = math.inf,
) -> tuple[int, float]:
    """(m, worth in tokens) of the best beginning of a draft, on top of a batch of `rows` tokens.

    chances[i] is that of draft i if those before it were accepted; rate in tokens per second; step is what each draft
    takes to make, in seconds, and `most` what all may add, give or take a STAKE. m is 0 where nothing is worth it.
    """
    best, chosen, together, expected = 0.0, 0, 1.0, 0.0
    base, stake = verify.of(rows), STAKE * verify.of(1)
    for m, chance in enumerate(chances, 1):
        together *= chance
        expected += together
        added = m * step + verify.of(rows + m) - base
        worth = expected - rate * added
        if worth > best and added <= most + (stake if expected >= PROMISE * rate * added else 0):
            best, chosen = worth, m
    return chosen, best
