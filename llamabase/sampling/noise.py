"""Drawing tokens: a distribution over token ids, and the noise that target and drafter share.

The noise is a random number for every token id at every position of a text, a pure function of the seed. A token drawn
with it depends on the seed, its position and its distribution, not on who draws it or when. So a target and a drafter
that draw with the same noise mostly draw the same token, and a text does not depend on how it was drafted. Source:
Daliri, Musco, Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding" (arXiv 2408.07978),
Gumbel sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio


class Noise:
    """The numbers of a seed: an int from 0 on, or several; None takes entropy from the system."""

    def __init__(self, seed: int | Sequence[int] | None = None) -> None:
        self._key = np.random.SeedSequence(seed).generate_state(1, np.uint64)

    def exponentials(self, position: int, ids: np.ndarray) -> np.ndarray:
        """Exponential variates of rate 1 (float64, n, all above 0) of the ids at a position of the text.

        Minus their logarithms are Gumbel variates.
        """
        # Two keys: with one, a position could have another's numbers, shifted by some ids.
        keys = _mixed(self._key + np.array([2 * position, 2 * position + 1], np.uint64) * _STEP)
        bits = _mixed(keys[:1] + ids.astype(np.uint64) * _STEP ^ keys[1:])
        # 52 bits and a half lie inside (0, 1); 53 bits could round to 1.
        return np.asarray(-np.log(((bits >> np.uint64(12)) + 0.5) * 2.0**-52))

    def uniform(self, position: int) -> float:
        """A number inside (0, 1) for a position itself: that of an id that no token has."""
        return float(np.exp(-self.exponentials(position, np.array([-1]))[0]))


def _mixed(bits: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a bijection of uint64 that spreads every bit (an array, because it wraps silently)."""
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.asarray(bits ^ bits >> np.uint64(31))


@dataclass(frozen=True)
class Distribution:
    """Probabilities (float64, sum 1) of some token ids (ascending); every other id has probability 0."""

    ids: np.ndarray
    probs: np.ndarray

    def of(self, token: int) -> float:
        """The probability of one token."""
        i = int(np.searchsorted(self.ids, token))
        return float(self.probs[i]) if i < len(self.ids) and self.ids[i] == token else 0.0

    def agreement(self, other: Distribution) -> float:
        """The chance that both draw the same token with the same noise.

        That is the sum over x of 1 / sum over y of max(p(y) / p(x), q(y) / q(x)) (arXiv 2408.07978), at most the sum of
        min(p, q). Sorted by p / q, the first of the two is the greater for x and all after it.
        """
        _, a, b = np.intersect1d(self.ids, other.ids, assume_unique=True, return_indices=True)
        p, q = self.probs[a], other.probs[b]
        kept = np.minimum(p, q) > 1e-300  # the rest adds nothing and would overflow
        p, q = p[kept], q[kept]
        order = np.argsort(p / q)
        p, q = p[order], q[order]
        after, before = 1 - (np.cumsum(p) - p), 1 - np.cumsum(q[::-1])[::-1]
        return float((1 / (after / p + before / q)).sum())

    def draw(self, noise: Noise, position: int) -> int:
        """The token at a position of a text: the argmax of log p + Gumbel noise, which follows p.

        Computed as p over exponential noise, which needs no logarithm of a p of 0. A single token needs no noise.
        """
        if len(self.ids) == 1:
            return int(self.ids[0])
        return int(self.ids[np.argmax(self.probs / noise.exponentials(position, self.ids))])
