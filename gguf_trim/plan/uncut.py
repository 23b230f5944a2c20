"""Whether a drafter is better left whole: if its head costs next to nothing here, as on a GPU, a cut saves nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path

from gguf_trim.format.companion import Trimmed
from gguf_trim.format.selection import CANDIDATES
from gguf_trim.format.speculator import ACCEPTANCE, Speculator
from llamabase.llama.rounds import quickest
from llamabase.llama.timing import Step, by_turns, medians

from .costs import DRAFT_REPEAT, adding_step, draft_step, verify_cost

OF_TEXT = 64  # rows that the text adds to a timed step


def uncut_pays(target: Path, drafter: Path, cut: Path) -> bool:
    """Whether a drafter that reads the text itself is quicker here uncut, as shipped, than its cut with any vocabulary.

    What the speculator adds makes a cut draft what the whole head does, so a whole step that takes as long cannot win,
    and the target is timed only if it takes less. The acceptance is what the fit counted, in the type of the cut. False
    if it did not count it.
    """
    trimmed = Trimmed.open(cut)
    speculator = Speculator.of(trimmed)
    if speculator is None or speculator.acceptance.keys() != ACCEPTANCE.keys():
        return False
    with contextlib.ExitStack() as stack:
        steps: dict[str, Step] = {
            "full": draft_step(stack, drafter, None),
            "trim": draft_step(stack, cut, trimmed),
            "context": adding_step(trimmed.companion, None, OF_TEXT),
            "spec": adding_step(trimmed.companion, speculator, OF_TEXT + CANDIDATES),
        }
        seconds = medians(by_turns(steps, DRAFT_REPEAT, "timing the uncut drafter"))
    seconds |= {vocab: seconds["trim"] + seconds[vocab] for vocab in ("context", "spec")}
    if seconds["full"] >= seconds["spec"]:
        return False
    return quickest(speculator.acceptance, seconds, verify_cost(target)) == "full"
