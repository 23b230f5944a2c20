"""Which quantisation of a trimmed drafter brings the most tokens per second with a target, on this machine.

A drafter is mostly shipped in types that no kernel of the machine may be good at. So it is read, and timed beside its
target, as shipped and in others; acceptance comes from the pass that a speculator is fitted by. The full tables in the
companion, and so the rows that are added at every step, stay as shipped.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llamabase.errors import TrimError
from llamabase.files import require_room
from llamabase.llama import Context, Model
from llamabase.progress import progress, stderr
from llamabase.quantize import quantize

from ..companion import Trimmed
from ..cut import companion_path
from ..dynamic.fitting import fit_reading
from ..dynamic.reading import Reading, calibration, reading_of, share
from ..dynamic.speculator import attach
from ..planning.costs import AS_SHIPPED, N_CONTEXT, alternate, decodes
from ..planning.matches import tau_of

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


def choose_type(target: Path, cut: Path, out: Callable[[str], Path], decided: str | None = None) -> str:
    """Make the quickest of a trimmed drafter's types for this target, with a speculator; returns the type.

    `cut` is the drafter as shipped, out(type) names the file of a type, and `decided` is one that was decided on; no
    file of another type is left but `cut`. Raises EngineError where llama.cpp cannot make that one, and
    TrimError where the disk lacks the room.
    """
    kinds = [decided] if decided else [AS_SHIPPED, *TYPES]
    with contextlib.ExitStack() as made:
        files: dict[str, Path] = {}
        for kind in kinds:
            try:
                files[kind] = cut if kind == AS_SHIPPED else made.enter_context(_requantised(cut, out(kind), kind))
            except TrimError as error:  # llama.cpp cannot, or the disk lacks the room
                if decided:
                    raise
                stderr.print(f"{kind} is left out: {error}", markup=False)
        trimmed = Trimmed.open(cut)
        answers = calibration(trimmed.companion)
        readings = {}
        for kind, path in files.items():
            with progress(f"reading {kind}", len(answers), "texts") as advance:
                readings[kind] = reading_of(path, answers, trimmed, advance=advance)
        chosen = decided or _quickest(target, trimmed, files, readings)
        path = files[chosen]
        speculator = fit_reading(trimmed.companion, readings[chosen])
        if chosen == AS_SHIPPED:
            attach(trimmed, speculator)
            return chosen
        require_room(path, trimmed.companion.size)
        shutil.copyfile(trimmed.companion.path, companion_path(path))
        attach(Trimmed.open(path), speculator)
        companion_path(path).replace(companion_path(out(chosen)))
        path.replace(out(chosen))
        return chosen


def _quickest(target: Path, trimmed: Trimmed, files: dict[str, Path], readings: dict[str, Reading]) -> str:
    steps, verify = _times(target, trimmed, files)
    candidates = [Candidate(kind, readings[kind], steps[kind], verify) for kind in files]
    best = max(candidates, key=lambda candidate: candidate.best)
    for candidate in candidates:
        stderr.print(f"{candidate}{', kept: the quickest here' * (candidate is best)}", markup=False)
    return best.type


@contextlib.contextmanager
def _requantised(cut: Path, out: Path, kind: str) -> Iterator[Path]:
    """`cut` in another type under a name of its own, for as long as it is not yet known to be kept."""
    path = out.with_name(f"{out.stem}.unproven.gguf")
    try:
        quantize(cut, path, kind)
        yield path
    finally:
        companion_path(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _times(target: Path, trimmed: Trimmed, files: dict[str, Path]) -> tuple[dict[str, float], dict[int, float]]:
    """Median seconds of a draft step by type, and of the target's step by batch size, all by turns."""
    with contextlib.ExitStack() as stack:
        steps: dict[str | int, Callable[[], None]] = {}
        feed = trimmed.embeddings().rows
        for kind, path in files.items():
            context = stack.enter_context(Context(stack.enter_context(Model(path)), N_CONTEXT + 32, n_outputs=1))
            steps[kind] = decodes(context, 1, feed)
        context = stack.enter_context(Context(stack.enter_context(Model(target)), N_CONTEXT + 32))
        steps |= {n: decodes(context, n) for n in VERIFY}
        with progress("timing", REPEAT * len(steps), "steps") as advance:
            found = dict(zip(steps, alternate(list(steps.values()), REPEAT, advance), strict=True))
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    return {kind: medians[kind] for kind in files}, {n: medians[n] for n in VERIFY}
