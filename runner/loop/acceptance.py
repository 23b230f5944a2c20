"""The acceptance rule: the target draws every token itself, and a draft is accepted iff it is the token drawn.

The target draws with noise that is a function of seed, position and token (`noise`), so what is emitted
follows its distribution after all its samplers, and is the same whatever was drafted. A drafter that draws with the
same noise is accepted with a chance of sum over x of 1 / sum over y of max(p(y) / p(x), q(y) / q(x)), a little below
the sum of min(p, q), which no rule exceeds (Daliri, Musco, Suresh, arXiv 2408.07978). Greedy is the same rule with
point masses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llamabase.sampling.noise import Distribution, Noise


def accept(p_at: Callable[[int], Distribution], drafts: Sequence[int], noise: Noise, position: int) -> tuple[int, int]:
    """How many drafted tokens stand, and the token that follows them.

    p_at(i) is the target's distribution before drafts[i], p_at(len(drafts)) the one after all of them; rows after the
    first rejection are never asked for. `position` is that of drafts[0] in the text.
    """
    for i, token in enumerate(drafts):
        own = p_at(i).draw(noise, position + i)
        if own != token:
            return i, own
    return len(drafts), p_at(len(drafts)).draw(noise, position + len(drafts))
