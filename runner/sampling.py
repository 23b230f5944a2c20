"""From logits to a distribution, and the acceptance rule that keeps the output the target's.

p is the target's distribution after all its samplers, q the drafter's over the tokens it can draft, both in target ids.
The rule is speculative sampling's (Leviathan et al., arXiv 2211.17192, section 2.3; Chen et al., arXiv 2302.01318,
algorithm 2): whatever q is, the emitted tokens follow p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Distribution:
    """Probabilities (float64, sum 1) of some token ids (ascending); every other id has probability 0."""

    ids: np.ndarray
    probs: np.ndarray

    def of(self, token: int) -> float:
        """The probability of one token."""
        i = int(np.searchsorted(self.ids, token))
        return float(self.probs[i]) if i < len(self.ids) and self.ids[i] == token else 0.0

    def draw(self, rng: np.random.Generator) -> int:
        """One token; a distribution with a single token draws it without touching the generator."""
        if len(self.ids) == 1:
            return int(self.ids[0])
        i = int(np.searchsorted(np.cumsum(self.probs), rng.random() * self.probs.sum(), side="right"))
        return int(self.ids[min(i, len(self.ids) - 1)])


@dataclass(frozen=True)
class Sampling:
    """llama.cpp's sampler settings with its defaults and its order: top-k, top-p, min-p, temperature.

    temp <= 0 is greedy; top_k <= 0, top_p >= 1 and min_p <= 0 switch a filter off.
    """

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05

    @property
    def greedy(self) -> bool:
        return self.temp <= 0

    def distribution(self, logits: np.ndarray, ids: np.ndarray | None = None) -> Distribution:
        """The distribution these settings make of one row of logits (float32, n).

        `ids[i]` (ascending) is the token of logits[i]; without it i itself is.
        """
        if self.greedy:
            best = int(np.argmax(logits))
            return Distribution(np.array([best if ids is None else ids[best]]), np.ones(1))
        if 0 < self.top_k < len(logits):
            chosen = np.argpartition(logits, -self.top_k)[-self.top_k :]
        else:
            chosen = np.arange(len(logits))
        # Likeliest first, ties by id, so that a filter's edge does not depend on the partition's order.
        chosen = chosen[np.lexsort((chosen, -logits[chosen]))]
        values = logits[chosen].astype(np.float64)
        values -= values[0]
        probs = np.exp(values)
        keep = len(probs)
        if self.top_p < 1:
            keep = int(np.searchsorted(np.cumsum(probs) / probs.sum(), max(self.top_p, 0.0))) + 1
        if self.min_p > 0:
            keep = min(keep, int(np.count_nonzero(probs >= self.min_p)))
        keep = max(1, min(keep, len(probs)))
        weights = np.exp(values[:keep] / self.temp)
        order = np.argsort(chosen[:keep])
        kept = chosen[:keep][order]
        return Distribution(kept if ids is None else ids[kept], weights[order] / weights.sum())


def acceptance(p: Distribution, q: Distribution, token: int) -> float:
    """The probability with which a token drawn from q is accepted: min(1, p / q)."""
    return min(1.0, p.of(token) / q.of(token))


def residual(p: Distribution, q: Distribution) -> Distribution:
    """The law of the token that replaces a rejected one: norm(max(0, p - q)) over the full vocabulary."""
    drafted = np.array([q.of(int(token)) for token in p.ids])
    rest = np.maximum(0.0, p.probs - drafted)
    total = rest.sum()
    # p = q up to rounding: a rejection then has probability 0 and this is never drawn from.
    return Distribution(p.ids, rest / total) if total > 0 else p


def accept(
    p_at: Callable[[int], Distribution],
    drafts: Sequence[int],
    qs: Sequence[Distribution],
    rng: np.random.Generator,
) -> tuple[int, int]:
    """How many drafted tokens stand, and the token that follows them.

    p_at(i) is the target's distribution before drafts[i], p_at(len(drafts)) the one after all of them; rows after the
    first rejection are never asked for. A greedy p needs no special case: it is a point mass, and a draft is accepted
    iff it is the target's argmax.
    """
    for i, (token, q) in enumerate(zip(drafts, qs, strict=True)):
        p = p_at(i)
        chance = acceptance(p, q, token)
        if chance < 1 and (chance == 0 or rng.random() >= chance):
            return i, residual(p, q).draw(rng)
    return len(drafts), p_at(len(drafts)).draw(rng)
