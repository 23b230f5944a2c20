"""How quick rounds of drafts are by the costs of steps, and so from which vocabulary to draft."""

from __future__ import annotations

from collections.abc import Mapping

from .timing import StepCost

LONGEST = 15  # drafts in a round: with one token more, a whole block of sixteen rows of llama.cpp's kernels
# Fraction of tokens per second by which measured vocabularies are not told apart. In twelve measurements of the default
# pair the speed of one in units of another's varied by 0.012 to 0.016 (least to greatest).
NOISE = 0.02


def speed(tau: float, draft_max: int, step: float, verify: StepCost) -> float:
    """Tokens per second of rounds of `draft_max` drafts that take `step` seconds each and bring tau tokens in all."""
    return tau / (draft_max * step + verify.of(draft_max + 1))


def best_fixed(chance: float, n: int, verify: StepCost, step: float, together: int = 1) -> tuple[float, float, int]:
    """(tokens, seconds, drafts) of a round of the best fixed draft length from 1 to n, each draft accepted by `chance`,
    of so many conversations in one batch; `step` is that of all of them, and drafts are counted for one. Where batches
    must be prepared for, those that are not do not count, unless none is.
    """
    lengths = [m for m in range(1, n + 1) if verify.prepared(together * (m + 1))] or range(1, n + 1)
    rounds = [
        (together * sum(chance**i for i in range(m + 1)), verify.of(together * (m + 1)) + m * step, m) for m in lengths
    ]
    return max(rounds, key=lambda one: one[0] / one[1])


def quickest(rates: Mapping[str, float], steps: Mapping[str, float], verify: StepCost) -> str:
    """Of vocabularies with these acceptance rates and seconds of a draft step, the one that brings the most tokens per
    second at its best fixed draft length. Those within NOISE of it count as equal: the likeliest draft wins, then the
    first.
    """
    rounds = {vocab: best_fixed(rate, LONGEST, verify, steps[vocab]) for vocab, rate in rates.items()}
    speeds = {vocab: tokens / seconds for vocab, (tokens, seconds, _) in rounds.items()}
    least = (1 - NOISE) * max(speeds.values())
    return max((vocab for vocab in rates if speeds[vocab] >= least), key=rates.__getitem__)
