"""The acceptance rule that keeps the output the target's.

p is the target's distribution after all its samplers, q the drafter's over the tokens it can draft, both in target ids.
The rule is speculative sampling's (Leviathan et al., arXiv 2211.17192, section 2.3; Chen et al., arXiv 2302.01318,
algorithm 2): whatever q is, the emitted tokens follow p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from corpus.sampling import Distribution


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
