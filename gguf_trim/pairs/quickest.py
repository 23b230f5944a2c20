"""Which quantisation of a trimmed drafter brings the most tokens per second with a target, on this machine.

A drafter is mostly shipped in types that no kernel of the machine may be good at. So it is read, and timed beside its
target, as shipped and in others; acceptance comes from the pass that a speculator is fitted by. The full tables in the
companion, and so the rows that are added at every step, stay as shipped.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gguf_trim.cut import move
from gguf_trim.fit.calibrate import Reading, calibration, share
from gguf_trim.fit.closed_form import attach
from gguf_trim.format.companion import Trimmed, companion_path
from gguf_trim.format.mtp import MTP
from gguf_trim.format.state_fed import STATE_FED
from gguf_trim.plan.matches import tau_of
from llamabase.cli.progress import stderr
from llamabase.errors import TrimError
from llamabase.files import require_room
from llamabase.gguf.reader import GGUFFile
from llamabase.llama.quantize import AS_SHIPPED, renamed, requantized
from llamabase.llama.timing import decodes, opened, timed

TYPES = ("Q4_0", "Q8_0")  # llama.cpp repacks the first for matrix kernels; the second loses next to nothing
VERIFY = (1, 2, 3, 4, 5, 6, 8)
REPEAT = 7  # steps of each, of which the median counts


@dataclass(frozen=True)
class Candidate:
    """A trimmed drafter in one type: what it makes of answers, and the seconds of its draft step beside its target's
    (`verify`, by batch size)."""

    type: str
    reading: Reading
    step: float
    verify: dict[int, float]

    @property
    def best(self) -> tuple[float, int]:
        """(tokens per second, draft length) of the fastest fixed draft length, by the answers that were read."""
        lengths = [n - 1 for n in self.verify if n > 1]
        return max((tau_of(self.reading.rights, m) / (self.verify[m + 1] + m * self.step), m) for m in lengths)

    def __str__(self) -> str:
        speed, n = self.best
        return (
            f"{self.type}: a draft step is {self.step / self.verify[1]:.2f} of a plain one, acceptance "
            f"{share(self.reading.rights):.3f}, {speed * self.verify[1]:.2f} x plain at {n} draft{'s' * (n > 1)}"
        )


def choose_type(target: Path, cut: Path, folder: Path, decided: str | None = None) -> str:
    """Make the quickest of a trimmed drafter's types for this target, with a speculator; returns the type.

    `cut` is the drafter as shipped, `folder` where the others are tried: the one chosen is moved beside `cut`.
    `decided` is a type that was decided on. Raises EngineError where llama.cpp cannot make that one, and TrimError
    where the disk lacks the room.
    """
    files: dict[str, Path] = {}
    for kind in [decided] if decided else [AS_SHIPPED, *TYPES]:
        try:
            files[kind] = requantized(cut, kind, folder)
        except TrimError as error:  # llama.cpp cannot, or the disk lacks the room
            if decided:
                raise
            stderr.print(f"{kind} is left out: {error}", markup=False)
    trimmed = Trimmed.open(cut)
    hangs = trimmed.file.architecture in (*STATE_FED, MTP)
    answers = calibration(GGUFFile(target) if hangs else trimmed.companion)
    readings = {
        kind: Reading.of(path, answers, trimmed, title=f"reading {kind}", target=target if hangs else None)
        for kind, path in files.items()
    }
    chosen = decided or _quickest(target, trimmed, files, readings)
    path = files[chosen]
    speculator = readings[chosen].fitted(trimmed.companion)
    if chosen == AS_SHIPPED:
        attach(trimmed, speculator)
        return chosen
    require_room(path, trimmed.companion.size)
    shutil.copyfile(trimmed.companion.path, companion_path(path))
    attach(Trimmed.open(path), speculator)
    move(path, renamed(cut, chosen))
    return chosen


def _quickest(target: Path, trimmed: Trimmed, files: dict[str, Path], readings: dict[str, Reading]) -> str:
    steps, verify = _times(target, trimmed, files)
    candidates = [Candidate(kind, readings[kind], steps[kind], verify) for kind in files]
    best = max(candidates, key=lambda candidate: candidate.best)
    for candidate in candidates:
        stderr.print(f"{candidate}{', kept: the quickest here' * (candidate is best)}", markup=False)
    return best.type


def _times(target: Path, trimmed: Trimmed, files: dict[str, Path]) -> tuple[dict[str, float], dict[int, float]]:
    """Median seconds of a draft step by type, and of the target's step by batch size, all by turns."""
    feed = trimmed.embeddings().rows
    with contextlib.ExitStack() as stack:
        steps: dict[str | int, Callable[[], None]] = {
            kind: decodes(opened(stack, path, n_outputs=1), 1, feed) for kind, path in files.items()
        }
        context = opened(stack, target)
        medians = timed("timing", steps | {n: decodes(context, n) for n in VERIFY}, REPEAT)
    return {kind: medians[kind] for kind in files}, {n: medians[n] for n in VERIFY}
