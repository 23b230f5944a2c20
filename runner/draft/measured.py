"""What a pair's steps cost on this machine: measured when it first drafts here, and remembered for the next time.

What sessions have learned of the pair is remembered, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from llamabase.llama.timing import VERIFY, Step, StepCost, by_turns, decode_step, in_rows
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import GREEDY
from llamabase.store import recall, remember

from .cost import Chances, DraftStats
from .drafters import ModelDrafter
from .reading import Reader

UNREAD = (1, 2, 4, 16, 64)  # tokens that a timed draft has to read first
TURNS, PATIENCE = 4, 3.0  # timed steps of a size at most, and the seconds after which no others begin
DAYS = 30  # age at which costs are measured again
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)  # what damaged facts raise


def step_costs(target: Reader, drafter: ModelDrafter | None, key: str) -> tuple[StepCost, StepCost | None]:
    """The costs of verifying, and of drafting if there is a drafter: remembered under this key, or measured."""
    facts = recall("costs", key, DAYS)
    try:
        verify = StepCost(facts["verify"], facts["change"])
        return verify, None if drafter is None else StepCost(facts["draft"])
    except DAMAGED:
        (seconds, change), draft = measured_verify(target), {} if drafter is None else measured_draft(drafter, target)
        remember("costs", key, {"verify": seconds, "change": change, "draft": draft})
        return StepCost(seconds, change), StepCost(draft) if draft else None


def recall_known(key: str) -> DraftStats | None:
    """What earlier sessions have learned of a pair; None if nothing is remembered, or if it is damaged."""
    try:
        facts = recall("learned", key)
        tokens, steps = float(facts["tokens"]), float(facts["steps"])
        if not ((0 < tokens < math.inf and 0 < steps < math.inf) or tokens == steps == 0):
            return None
        return DraftStats(tokens, steps, Chances(facts["certainties"]), Chances(facts["matches"]))
    except DAMAGED:
        return None


def remember_known(key: str, known: DraftStats) -> None:
    chances = {"certainties": known.certainties.seen, "matches": known.matches.seen}
    remember("learned", key, vars(known) | chances)


def measured_verify(target: Reader) -> tuple[dict[int, float], float]:
    """(seconds of a target's step by the number of tokens it verifies, on an empty cache, those of a change of it)."""
    context = target.context
    target.settle()  # an interruption may have cut the last measurement short
    target.keep([], 0)
    sizes = [n for n in VERIFY if n <= min(context.n_outputs, context.n_ctx)]
    seconds, change = in_rows({n: decode_step(context, n, after=0) for n in sizes}, TURNS // 2, patience=PATIENCE)
    return {n: min(taken) for n, taken in seconds.items()}, change


def measured_draft(drafter: ModelDrafter, target: Reader | None = None) -> dict[int, float]:
    """Seconds of drafting one token, by the number of tokens the drafter has to read first.

    `target` reads them, too, if the drafter is fed its states.
    """
    noise = Noise(0)
    longest = min(UNREAD[-1], drafter.n_ctx // 2)
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

    return _fastest({n: partial(step, n) for n in UNREAD if n <= longest})


def _fastest(steps: Mapping[int, Step]) -> dict[int, float]:
    """The fastest step of each size; the first one loads the weights, untimed."""
    next(iter(steps.values()))()
    return {n: min(taken) for n, taken in by_turns(steps, TURNS, patience=PATIENCE).items()}
