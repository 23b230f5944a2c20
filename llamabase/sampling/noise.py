"""Shared noise: one random number for every token id at every position of a text, a pure function of the seed.

A token drawn with it (`Distribution.draw`) depends on the seed, its position and its law, not on who draws it or when.
So a target and a drafter that draw with the same noise mostly draw the same token, and a text does not depend on how it
was drafted. Source: Daliri, Musco, Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding"
(arXiv 2408.07978), Gumbel sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio


class Noise:
    """The numbers of a seed, a nonnegative int or several; None takes entropy from the system."""

    def __init__(self, seed: int | Sequence[int] | None = None) -> None:
        self._key = np.random.SeedSequence(seed).generate_state(1, np.uint64)

    def exponentials(self, position: int, ids: np.ndarray) -> np.ndarray:
        """Exponential variates of rate 1 (float64, n, all above 0) of the ids at a position of the text.

        Minus their logarithms are Gumbel variates.
        """
        # Two keys, since with one a position could have another's numbers, moved by some ids.
        keys = _mixed(self._key + np.array([2 * position, 2 * position + 1], np.uint64) * _STEP)
        bits = _mixed(keys[:1] + ids.astype(np.uint64) * _STEP ^ keys[1:])
        # 52 bits and a half: inside (0, 1), where 53 bits could round to 1.
        return np.asarray(-np.log(((bits >> np.uint64(12)) + 0.5) * 2.0**-52))

    def uniform(self, position: int) -> float:
        """A number inside (0, 1) for a position itself: of an id that no token has."""
        return float(np.exp(-self.exponentials(position, np.array([-1]))[0]))


def _mixed(bits: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a bijection of uint64 (an array, which wraps round in silence) that spreads every bit."""
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.asarray(bits ^ bits >> np.uint64(31))
