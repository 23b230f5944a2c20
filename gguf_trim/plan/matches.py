"""Acceptance and tau for every k and every draft length at once, from one teacher-forced pass.

At a position let t be the target's token, r(x) the rank of token x in the keep order, and call x a beater of t if the
drafter would draft x rather than t (a greater logit, or an equal logit and a lower id). Cut to its first k rows, the
drafter drafts t iff t is kept and no beater is: r(t) < k <= min r(beater). So each position is right for one interval
of k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAFT_LENGTHS = range(1, 9)  # drafts a round


def beaters(logits: np.ndarray, target: int) -> np.ndarray:
    """Ids that would be drafted rather than `target`, by the logits of all ids; none for an id the drafter lacks."""
    if target >= len(logits):
        return np.empty(0, np.int64)
    beats = logits > logits[target]
    beats[:target] |= logits[:target] == logits[target]
    return np.flatnonzero(beats)


def interval(target: int, better: np.ndarray, rank: np.ndarray) -> tuple[int, int]:
    """(low, high): the drafter, cut to its first k rows, drafts `target` iff low < k <= high.

    `better` are its beaters and `rank` (n_vocab, a permutation) is by token id. A target id the drafter lacks: never.
    """
    if target >= len(rank):
        return len(rank), 0
    return int(rank[target]), int(rank[better].min(initial=len(rank)))


@dataclass(frozen=True)
class Matches:
    """Intervals (n x 2) of each answer's positions, with a label for each answer (its task or language)."""

    intervals: list[np.ndarray]
    labels: list[str]
    n_vocab: int

    @property
    def positions(self) -> int:
        return sum(map(len, self.intervals))

    def right(self, k: int) -> list[np.ndarray]:
        """For each answer, which positions the drafter cut to k rows gets right."""
        return [(low < k) & (k <= high) for low, high in (answer.T for answer in self.intervals)]

    def curve(self) -> np.ndarray:
        """Right positions for every k from 0 to n_vocab (int64, n_vocab + 1), by adding the intervals up."""
        both = np.concatenate([np.empty((0, 2), np.int64), *self.intervals])
        low, high = both[both[:, 0] < both[:, 1]].T + 1
        n = self.n_vocab + 2
        return np.cumsum(np.bincount(low, minlength=n) - np.bincount(high, minlength=n))[:-1]


def tau_of(rights: Sequence[np.ndarray], draft_max: int) -> float:
    """Mean accepted length at a fixed draft length, by running the loop over the matches.

    A round never drafts past the last token of an answer, as the runner never drafts past max_tokens.
    """
    tokens = rounds = 0
    for right in rights:
        runs = run_lengths(right)
        n, i = len(right), 0
        while i < n:
            i += min(int(runs[i]), draft_max, n - i - 1) + 1
            rounds += 1
        tokens += n
    return tokens / rounds if rounds else 0.0


def run_lengths(right: np.ndarray) -> np.ndarray:
    """For each position, how many matches in a row begin there."""
    places, wrong = np.arange(len(right)), np.flatnonzero(~right)
    return np.append(wrong, len(right))[np.searchsorted(wrong, places)] - places


def grid(n_vocab: int) -> list[int]:
    """The k worth showing: powers of two and halves between them from 2048, the whole head last."""
    sizes = [size for n in range(11, 64) for size in (1 << n, 3 << n - 1) if size < n_vocab]
    return [*sizes, n_vocab]
