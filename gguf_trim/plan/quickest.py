"""Which quantisation of a trimmed drafter brings the most tokens per second with a target, on this machine.

Most drafters are shipped in types that a machine may have no fast kernel for. So a drafter is read, and timed beside
its target, as shipped and in other types; its acceptance comes from the pass that a speculator is fitted by. The full
tables in the companion, and so the rows that are added at every step, stay as shipped.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from gguf_trim.cut import move
from gguf_trim.fit.calibrate import TeacherForced, calibration, share
from gguf_trim.fit.closed_form import attach
from gguf_trim.format.assistant import KEPT
from gguf_trim.format.companion import Trimmed, companion_path
from llamabase.cli.progress import stderr
from llamabase.errors import TrimError
from llamabase.files import require_room
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import ASSISTANT
from llamabase.llama.quantize import AS_SHIPPED, renamed, requantized
from llamabase.llama.timing import VERIFY, Step, StepCost, by_turns, decode_step, medians, open_context

from .costs import assistant_step, draft_step
from .matches import DRAFT_LENGTHS, speed, tau_of

TYPES = ("Q4_0", "Q8_0")  # llama.cpp repacks the first for matrix kernels; the second loses next to nothing
REPEAT = 7  # steps of each size, of which the median counts


@dataclass(frozen=True)
class Candidate:
    """A trimmed drafter in one type: how it reads answers, and the seconds of its step and of its target's."""

    type: str
    reading: TeacherForced
    step: float
    verify: StepCost

    @property
    def best(self) -> tuple[float, int]:
        """(tokens per second, draft length) of the fastest fixed draft length, by the answers that were read."""
        rights = self.reading.rights
        return max((speed(tau_of(rights, n), n, self.step, self.verify), n) for n in DRAFT_LENGTHS)

    def __str__(self) -> str:
        (tokens_per_second, n), plain = self.best, self.verify.of(1)
        return (
            f"{self.type}: a draft step is {self.step / plain:.2f} of a plain one, acceptance "
            f"{share(self.reading.rights):.3f}, {tokens_per_second * plain:.2f} x plain at {n} draft{'s' * (n > 1)}"
        )


def choose_type(target: Path, cut: Path, folder: Path, decided: str | None = None) -> str:
    """Make the quickest of a trimmed drafter's types for this target, with a speculator; returns the type.

    `cut` is the drafter as shipped. The others are tried in `folder`, and the chosen one is moved beside `cut`.
    `decided` is a type that needs no measurement. Raises EngineError if llama.cpp cannot make that one, and TrimError
    if the disk lacks the room.
    """
    files: dict[str, Path] = {}
    for kind in [decided] if decided else [AS_SHIPPED, *TYPES]:
        try:
            files[kind] = requantized(cut, kind, folder, KEPT)
        except TrimError as error:  # llama.cpp cannot, or the disk lacks the room
            if decided:
                raise
            stderr.print(f"{kind} is left out: {error}", markup=False)
    trimmed = Trimmed.open(cut)
    states_of = target if trimmed.reads_states else None
    answers = calibration(GGUFFile(target) if states_of else trimmed.companion)
    readings = {
        kind: TeacherForced.of(path, answers, trimmed, title=f"reading {kind}", target=states_of)
        for kind, path in files.items()
    }
    chosen = decided or _quickest(target, trimmed, files, readings)
    path, speculator = files[chosen], readings[chosen].fitted(trimmed.companion)
    if chosen == AS_SHIPPED:
        attach(trimmed, speculator)
        return chosen
    require_room(path, trimmed.companion.size)
    shutil.copyfile(trimmed.companion.path, companion_path(path))
    attach(Trimmed.open(path), speculator)
    move(path, renamed(cut, chosen))
    return chosen


def _quickest(target: Path, trimmed: Trimmed, files: dict[str, Path], readings: dict[str, TeacherForced]) -> str:
    with contextlib.ExitStack() as stack:
        context, attends = open_context(stack, target), trimmed.file.architecture == ASSISTANT
        steps: dict[str | int, Step] = {
            kind: assistant_step(stack, path, trimmed, context) if attends else draft_step(stack, path, trimmed)
            for kind, path in files.items()
        }
        steps |= {n: decode_step(context, n) for n in VERIFY}
        seconds = medians(by_turns(steps, REPEAT, "timing"))
    verify = StepCost({n: seconds[n] for n in VERIFY})
    candidates = [Candidate(kind, readings[kind], seconds[kind], verify) for kind in files]
    best = max(candidates, key=lambda candidate: candidate.best)
    for candidate in candidates:
        stderr.print(f"{candidate}{', kept: the quickest here' * (candidate is best)}", markup=False)
    return best.type
