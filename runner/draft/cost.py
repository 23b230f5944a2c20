"""What drafting costs and brings on this machine, learned while running: step costs and chances of acceptance."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llamabase.llama.timing import StepCost

# What was believed before is worth so many observations, and one weighs so much when the next one comes. In the worlds
# of tests/test_auto.py 3 to 12 and 0.95 to 0.99 do about as well.
WEIGHT, MEMORY = 6.0, 0.97
_BINS = 6  # of a claim's odds, by powers of two, each way


class Chances:
    """The chance that a draft is accepted, from the chance it claims, corrected by what came of its like.

    `seen`: (accepted, seen) by bins of the claim's odds, as an earlier session left them. Raises ValueError or
    TypeError for anything else.
    """

    def __init__(self, seen: Sequence[Sequence[float]] = ((0.0, 0.0),) * (2 * _BINS + 1)) -> None:
        self.seen = [[float(accepted), float(n)] for accepted, n in seen]
        if len(self.seen) != 2 * _BINS + 1 or not all(0 <= accepted <= n < math.inf for accepted, n in self.seen):
            raise ValueError("no chances")

    def of(self, claimed: float) -> float:
        accepted, n = self.seen[_bin(claimed)]
        return (accepted + WEIGHT * claimed) / (n + WEIGHT)

    def observe(self, claimed: float, accepted: bool) -> None:
        found = self.seen[_bin(claimed)]
        found[:] = MEMORY * found[0] + accepted, MEMORY * found[1] + 1


def _bin(claimed: float) -> int:
    odds = math.log2(max(claimed, 1e-9) / max(1 - claimed, 1e-9))
    return _BINS + round(min(max(odds, -_BINS), _BINS))


def best_cut(
    chances: Sequence[float], verify: StepCost, rate: float, step: float = 0.0, rows: int = 1, most: float = math.inf
) -> tuple[int, float]:
    """(m, worth in tokens) of the best beginning of a draft, on top of a batch of `rows` tokens.

    chances[i] is that of draft i if those before it were accepted. A beginning is worth its expected tokens less what
    the seconds it adds would bring otherwise, at `rate` tokens per second; `step` is what each draft takes to make, in
    seconds, and `most` what all may add. m is 0 where nothing is worth it.
    """
    best, chosen, together, expected = 0.0, 0, 1.0, 0.0
    base = verify.of(rows)
    for m, chance in enumerate(chances, 1):
        together *= chance
        expected += together
        added = m * step + verify.of(rows + m) - base
        worth = expected - rate * added
        if worth > best and added <= most:
            best, chosen = worth, m
    return chosen, best


def best_fixed(chance: float, n: int, verify: StepCost, step: float) -> tuple[float, float]:
    """(tokens, seconds) of a round of the best fixed draft length from 1 to n, each draft accepted by `chance`."""
    lengths = [(sum(chance**i for i in range(m + 1)), verify.of(m + 1) + m * step) for m in range(1, n + 1)]
    return max(lengths, key=lambda found: found[0] / found[1])
