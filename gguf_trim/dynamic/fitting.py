"""From a drafter to a speculator that fits it: texts are read, the closed form is fitted, and trained further."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llamabase.errors import TrimError
from llamabase.gguf_file import GGUFFile
from llamabase.progress import progress

from ..companion import Trimmed
from ..cut import head_tensor
from ..hanging import HANGING
from .reading import Reading, calibration, reading_of, share
from .speculator import Speculator, attach, fit


def fit_to(
    drafter: Path,
    file: GGUFFile,
    texts: Path | None = None,
    rank: int | None = None,
    trimmed: Trimmed | None = None,
    n_threads: int | None = None,
    steps: int = 0,
    target: Path | None = None,
) -> Speculator:
    """Read texts with a drafter and fit a speculator to the head in `file` (its own, or its companion's), with bars.

    `steps` > 0 trains the closed form further; see `train`.
    """
    answers = calibration(file if target is None else GGUFFile(target), texts)
    with progress("reading hidden states", len(answers), "texts") as advance:
        reading = reading_of(drafter, answers, trimmed, n_threads, advance, target)
    return fit_reading(file, reading, rank, steps)


def fit_reading(file: GGUFFile, reading: Reading, rank: int | None = None, steps: int = 0) -> Speculator:
    """`fit_to` for what was read already."""
    with progress("fitting the speculator", 2 * head_tensor(file).n_rows, "rows") as advance:
        found = fit(file, reading.states, rank, advance)
    if steps:
        from .train import distil

        with progress("training the speculator", steps, "steps") as advance:
            found = distil(found, file, reading.states, steps, advance)
    return replace(found, acceptance=share(reading.rights))


def add_speculator(
    path: Path,
    texts: Path | None = None,
    rank: int | None = None,
    n_threads: int | None = None,
    steps: int = 0,
    target: Path | None = None,
) -> Speculator:
    """Fit a speculator to a trimmed drafter and write it into its companion; an EAGLE-3 head needs its `target`."""
    trimmed = Trimmed.open(path)
    if target is None and trimmed.file.architecture in HANGING:
        raise TrimError(f"{path}: reads its target's states; give the model it was made for as --target")
    speculator = fit_to(path, trimmed.companion, texts, rank, trimmed, n_threads, steps, target)
    attach(trimmed, speculator)
    return speculator
