"""What a pair's steps cost on this machine, and so from which vocabulary to draft: measured when it first drafts here,
and remembered for the next time.

What sessions have learned of the pair is remembered, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import numpy as np

from llamabase.llama.rounds import quickest
from llamabase.llama.timing import VERIFY, Name, Step, StepCost, by_turns, decode_step, in_rows, timed
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import GREEDY
from llamabase.store import recall, remember

from .contracts import AUTO
from .cost import Chances, DraftStats
from .drafters import ModelDrafter
from .reading import Reader

TOGETHER = (*VERIFY, 12, 16, 32)  # tokens of the batches in which the target's step is timed for conversations
UNREAD = (1, 2, 4, 16, 64)  # tokens that a timed draft has to read first
TURNS, PATIENCE = 4, 3.0  # timed steps of a size at most, and the seconds after which no others begin
DAYS = 30  # age at which costs are measured again
DISTURBED = 1.5  # times a plain step of a session: one measured to take longer was measured beside something else
_NO_NOISE = Noise(0)  # greedy drafts have none
DAMAGED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)  # what damaged facts raise


def step_costs(target: Reader, drafter: ModelDrafter | None, key: str) -> tuple[StepCost, StepCost | None]:
    """The costs of verifying, and of drafting if there is a drafter: remembered under this key, or measured.

    They decide what the drafter drafts from if nothing else is asked for (`ModelDrafter.auto`), and are of that. They
    are measured again if they were remembered of one conversation, and are wanted of several.
    """
    facts, largest = recall("costs", key, DAYS), str(_sizes(target)[-1])
    try:
        _ = facts["verify"][largest]
        verify = StepCost(facts["verify"], facts["change"])
        draft = None if drafter is None else StepCost(facts["draft"])
        if drafter is not None:
            drafter.auto = drafter.candidates[drafter.candidates.index(facts["vocab"])]
        return verify, draft
    except DAMAGED:
        facts = dict(zip(("verify", "change"), measured_verify(target), strict=True))
    verify = StepCost(facts["verify"], facts["change"])
    if drafter is not None:
        asked, drafter.vocab = drafter.vocab, AUTO
        try:
            facts["vocab"] = drafter.auto = chosen_vocab(drafter, verify, target)
            facts["draft"] = measured_draft(drafter, target)
        finally:
            drafter.vocab = asked
    remember("costs", key, facts)
    return verify, None if drafter is None else StepCost(facts["draft"])


def check_costs(key: str, measured: float, found: float) -> None:
    """Forget costs if a plain step was measured to take so much longer than it did in a session, so that the next one
    measures again: following steps does not mend those of sizes that are never tried.
    """
    if measured > DISTURBED * found:
        remember("costs", key, {})


def recall_vocab(key: str) -> object:
    """The vocabulary that costs have decided for; None, or anything that is not one, if nothing is remembered."""
    return recall("costs", key, DAYS).get("vocab")


def chosen_vocab(drafter: ModelDrafter, verify: StepCost, target: Reader) -> str:
    """The quickest vocabulary here; what the drafter uses now if it has no choice, or their acceptance is unknown."""
    known = {} if drafter.dynamic is None else drafter.dynamic.acceptance
    rates = {vocab: known[vocab] for vocab in drafter.candidates if vocab in known}
    if len(drafter.candidates) < 2 or len(rates) < len(drafter.candidates):
        return drafter.auto
    return quickest(rates, measured_vocabs(drafter, target), verify)


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
    sizes = _sizes(target)
    patience = PATIENCE * sum(sizes) / sum(VERIFY)  # larger batches take longer
    steps = {n: decode_step(context, n, after=0) for n in sizes}
    seconds, change = in_rows(steps, TURNS // 2, patience=patience)
    return {n: min(taken) for n, taken in seconds.items()}, change


def _sizes(target: Reader) -> list[int]:
    """Tokens of the batches in which the target's step is timed."""
    context = target.context
    sizes = TOGETHER if context.n_parallel > 1 else VERIFY
    return [n for n in sizes if n <= min(context.n_outputs, context.n_ctx)]


def measured_draft(drafter: ModelDrafter, target: Reader | None = None) -> dict[int, float]:
    """Seconds of drafting one token, by the number of tokens the drafter has to read first.

    `target` reads them, too, if the drafter is fed its states.
    """
    text = _read_text(drafter, target)

    def step(n: int) -> float:
        drafter.settle()
        drafter.prepare(text[: len(text) - n + 1], 0)
        before = drafter.seconds
        next(drafter.propose(text, GREEDY, _NO_NOISE))
        return drafter.seconds - before

    return _fastest({n: partial(step, n) for n in UNREAD if n <= len(text)})


def measured_vocabs(drafter: ModelDrafter, target: Reader | None = None) -> dict[str, float]:
    """Seconds of drafting one token after another, by vocabulary. It is wall time: choosing rows is not all ggml's.

    `target`: see `measured_draft`.
    """
    text, asked = _read_text(drafter, target), drafter.vocab

    def step(vocab: str) -> float:
        drafter.settle()
        drafter.prepare(text, 0)
        drafter.vocab = vocab
        return timed(lambda: next(drafter.propose(text, GREEDY, _NO_NOISE)))()

    try:
        return _fastest({vocab: partial(step, vocab) for vocab in drafter.candidates})
    finally:
        drafter.vocab = asked


def _read_text(drafter: ModelDrafter, target: Reader | None) -> list[int]:
    """A text to time drafts after. Its tokens are ones that the drafter's own rows lack, so that the text adds some.

    `target` reads all but the last, if the drafter is fed its states.
    """
    n = min(UNREAD[-1], drafter.n_ctx // 2)
    ids = np.arange(n) if drafter.dynamic is None or not len(drafter.dynamic.others) else drafter.dynamic.others
    text: list[int] = np.resize(ids[:: max(1, len(ids) // n)], n).tolist()
    if target is not None and target.context.recorders:
        target.settle()
        target.keep([], 0)
        target.read(text[:-1], 0)
    return text


def _fastest(steps: Mapping[Name, Step]) -> dict[Name, float]:
    """The fastest step of each size; the first one loads the weights, untimed."""
    next(iter(steps.values()))()
    return {n: min(taken) for n, taken in by_turns(steps, TURNS, patience=PATIENCE).items()}
