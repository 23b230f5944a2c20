"""What a pair's steps cost on this machine: measured when it first drafts here, and remembered for the next time.

With the costs is remembered what sessions have learned of the pair.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import GREEDY
from llamabase.store import recall, remember

from .cost import Chances, DraftStats, StepCost
from .drafters import ModelDrafter
from .reading import Reader

VERIFY_SIZES = (1, 2, 3, 4, 5, 6, 8)
DRAFT_SIZES = (1, 2, 4, 16, 64)
TURNS, PATIENCE = 5, 3.0  # steps of each size, fewer where they have taken so many seconds


def step_costs(target: Reader, drafter: ModelDrafter | None, key: str) -> tuple[StepCost, StepCost | None]:
    """Of verifying, and of drafting where there is a drafter: as remembered under this key, else measured."""
    memory = recall(key)
    verify, draft = _valid(memory.get("verify")), _valid(memory.get("draft"))
    if not verify or bool(draft) != (drafter is not None):
        verify = measured_verify(target)
        draft = {} if drafter is None else measured_draft(drafter, target)
        remember(key, {"verify": verify, "draft": draft})
    return StepCost(verify), StepCost(draft) if draft else None


def recall_known(key: str) -> DraftStats | None:
    """What earlier sessions have learned of a pair; None where nothing is remembered, or it is damaged."""
    try:
        found = recall(key)["known"]
        tokens, steps = float(found["tokens"]), float(found["steps"])
        if not ((0 < tokens < math.inf and 0 < steps < math.inf) or tokens == steps == 0):
            return None
        return DraftStats(tokens, steps, Chances(found["certainties"]), Chances(found["matches"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def remember_known(key: str, known: DraftStats) -> None:
    chances = {"certainties": known.certainties.seen, "matches": known.matches.seen}
    remember(key, {"known": vars(known) | chances}, measured=False)


def _valid(seconds: Any) -> dict[int, float]:
    """Seconds by number of tokens as they were written; empty where they are damaged."""
    try:
        found = {int(n): float(took) for n, took in seconds.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        return {}
    return found if all(n > 0 and 0 < took < math.inf for n, took in found.items()) else {}


def measured_verify(target: Reader) -> dict[int, float]:
    """Seconds of a target's step by the number of tokens it reads: the faster of two, on an empty cache."""
    context = target.context
    target.settle()  # where an interruption cut the last measurement short
    target.keep([], 0)

    def step(n: int) -> float:
        started = time.perf_counter()
        context.decode(list(range(n)), n)
        took = time.perf_counter() - started
        context.truncate(0)
        return took

    return _fastest([n for n in VERIFY_SIZES if n <= min(context.n_outputs, context.n_ctx)], step)


def measured_draft(drafter: ModelDrafter, target: Reader | None = None) -> dict[int, float]:
    """Seconds of drafting one token, by the number of tokens the drafter has to read first.

    `target` is the one that a drafter may hang on, which then reads them, too.
    """
    noise = Noise(0)
    longest = min(DRAFT_SIZES[-1], drafter.n_ctx // 2)
    text = list(range(longest))
    if target is not None and target.context.recorders:
        target.settle()
        target.keep([], 0)
        target.read(text[:-1], 0)

    def step(n: int) -> float:
        drafter.settle()
        drafter.prepare(text[: longest - n + 1], 0)
        before = drafter.seconds
        next(drafter.propose(text, GREEDY, noise))
        return drafter.seconds - before

    return _fastest([n for n in DRAFT_SIZES if n <= longest], step)


def _fastest(sizes: Sequence[int], step: Callable[[int], float]) -> dict[int, float]:
    """The fastest of a few steps of each size; of one, where a machine is so slow that a hiccup is little beside it."""
    step(sizes[0])  # warms up
    started = time.perf_counter()
    seconds = dict.fromkeys(sizes, math.inf)
    for turn in range(TURNS):
        for n in sizes[:: 1 if turn % 2 else -1]:
            seconds[n] = min(seconds[n], step(n))
        if time.perf_counter() - started > PATIENCE:
            break
    return seconds
