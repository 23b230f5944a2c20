"""Which quantisation of a drafter brings the most tokens per second with a target, on this machine.

Most drafters are shipped in types that a machine may have no fast kernel for. So a drafter is timed beside its target,
and judged by some answers, as shipped and in other types. The full tables in the companion, and so the rows that are
added at every step, stay as shipped.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corpus.answers import TargetAnswer
from gguf_trim.cut import move, source_identity
from gguf_trim.fit.calibrate import JUDGED, TeacherForced, calibration, said, share
from gguf_trim.fit.closed_form import attach
from gguf_trim.format.assistant import KEPT
from gguf_trim.format.companion import Trimmed, companion_path
from llamabase.cli.progress import stderr
from llamabase.cli.progress import step as spinner
from llamabase.errors import TrimError
from llamabase.files import require_room
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import ASSISTANT
from llamabase.llama.quantize import AS_SHIPPED, joined, renamed, requantized, tensor_types
from llamabase.llama.rounds import speed
from llamabase.llama.timing import VERIFY, Step, StepCost, by_turns, decode_step, in_rows, medians, open_context

from .costs import assistant_step, draft_step
from .matches import DRAFT_LENGTHS, tau_of

# llama.cpp repacks Q4_0 for matrix kernels; IQ4_NL is as small and loses less; Q8_0 loses next to nothing.
TYPES = ("Q4_0", "Q4_0+HEAD", "IQ4_NL+HEAD", "IQ4_NL", "Q8_0")
# A type that is put together of the layers of one before and the head of another, which has the same bytes: a core
# makes 2.5 million weights IQ4_NL in a second, and 300 million Q4_0.
JOINED = {"IQ4_NL": ("IQ4_NL+HEAD", "Q4_0")}
ROWS = 4  # of two steps of each size of the target, of which the median counts
DRAFT_REPEAT = 15  # steps of a drafter, which are short, and differ by as little as 3 % from type to type


@dataclass(frozen=True)
class Candidate:
    """A drafter in one type: which tokens of some answers it drafts right (bool arrays, one an answer), and the seconds
    of its step and of its target's."""

    type: str
    rights: Sequence[np.ndarray]
    step: float
    verify: StepCost

    @property
    def best(self) -> tuple[float, int]:
        """(tokens per second, draft length) of the fastest fixed draft length, by the answers that were read."""
        return max((speed(tau_of(self.rights, n), n, self.step, self.verify), n) for n in DRAFT_LENGTHS)

    @property
    def costs(self) -> str:
        return f"{self.type}: a draft step is {self.step / self.verify.of(1):.3f} of a plain one"

    def __str__(self) -> str:
        (tokens_per_second, n), plain = self.best, self.verify.of(1)
        return (
            f"{self.costs}, acceptance "
            f"{share(self.rights):.3f}, {tokens_per_second * plain:.2f} x plain at {n} draft{'s' * (n > 1)}"
        )


def choose_type(target: Path, cut: Path, folder: Path, decided: str | None = None) -> str:
    """Make the quickest of a trimmed drafter's types for this target, with a speculator; returns the type.

    `cut` is the drafter as shipped. The others are tried in `folder`, and the chosen one is moved beside `cut`.
    `decided` is a type that needs no measurement. Raises EngineError if llama.cpp cannot make that one, and TrimError
    if the disk lacks the room.
    """
    trimmed = Trimmed.open(cut)
    states_of = target if trimmed.reads_states else None
    answers = calibration(GGUFFile(target) if states_of else trimmed.companion)
    own = source_identity(GGUFFile(target)) == trimmed.file.get("gguf_trim.source_id")
    wanted = said(target, answers, "reading the target") if own and states_of is None else None

    def read(path: Path, title: str, part: Sequence[int]) -> TeacherForced:
        texts, tokens = [answers[i] for i in part], None if wanted is None else [wanted[i] for i in part]
        return TeacherForced.of(path, texts, trimmed, title=title, target=states_of, wanted=tokens)

    def rights(kind: str) -> list[np.ndarray]:
        return read(files[kind], f"judging {kind}", _judged(answers)).rights

    if decided:
        chosen, path = decided, requantized(cut, decided, folder, KEPT)
    else:
        files = _candidates(cut, folder)
        chosen = _quickest(target, files, rights, trimmed)
        path = files[chosen]
    speculator = read(path, f"reading {chosen}", range(len(answers))).fitted(trimmed.companion)
    if chosen == AS_SHIPPED:
        attach(trimmed, speculator)
        return chosen
    require_room(path, trimmed.companion.size)
    shutil.copyfile(trimmed.companion.path, companion_path(path))
    attach(Trimmed.open(path), speculator)
    move(path, renamed(cut, chosen))
    return chosen


def quickest_uncut(target: Path, drafter: Path, folder: Path) -> str:
    """The quickest type of an uncut drafter, which reads the text itself, for this target; makes files in `folder`."""
    files, shipped = _candidates(drafter, folder), calibration(GGUFFile(drafter))
    answers = [shipped[i] for i in _judged(shipped)]
    own = source_identity(GGUFFile(target)) == source_identity(GGUFFile(drafter))
    wanted = said(target, answers, "reading the target") if own else [np.array(answer.answer) for answer in answers]

    def rights(kind: str) -> list[np.ndarray]:
        drafted = said(files[kind], answers, f"judging the uncut drafter, {kind}")
        return [a == b for a, b in zip(drafted, wanted, strict=True)]

    return _quickest(target, files, rights, None)


def _judged(answers: Sequence[TargetAnswer]) -> list[int]:
    """Which answers a type's acceptance is judged by: those that a speculator's is, some 1,300 tokens."""
    return [i for i, answer in enumerate(answers) if answer.label == JUDGED]


def _candidates(drafter: Path, folder: Path) -> dict[str, Path]:
    """A drafter as shipped, and in each of TYPES that llama.cpp can make and that differs from those before it."""
    files = {AS_SHIPPED: drafter}
    known = [tensor_types(drafter)]
    for kind in TYPES:
        try:
            if kind in JOINED and files.keys() >= set(JOINED[kind]):
                layers, head = (files[part] for part in JOINED[kind])
                made = joined(layers, head, folder / renamed(drafter, kind).name)
            else:
                with spinner(f"requantising to {kind}"):
                    made = requantized(drafter, kind, folder, KEPT)
        except TrimError as error:  # llama.cpp cannot, or the disk lacks the room
            stderr.print(f"{kind} is left out: {error}", markup=False)
            continue
        if (types := tensor_types(made)) in known:
            made.unlink()
            continue
        files[kind] = made
        known.append(types)
    return files


def _quickest(
    target: Path, files: dict[str, Path], rights: Callable[[str], list[np.ndarray]], trimmed: Trimmed | None
) -> str:
    """The quickest type of a drafter. `rights` gives the `Candidate.rights` of one.

    Requantising loses acceptance. So a type is read only if, with the acceptance as shipped, it would be the quickest.
    """
    steps, verify = _costs(target, files, trimmed)
    best = Candidate(AS_SHIPPED, rights(AS_SHIPPED), steps[AS_SHIPPED], verify)
    stderr.print(str(best), markup=False)
    hoped = [Candidate(kind, best.rights, steps[kind], verify) for kind in files if kind != AS_SHIPPED]
    for most in sorted(hoped, key=lambda candidate: candidate.best, reverse=True):
        if most.best <= best.best:
            stderr.print(f"{most.costs}: not the quickest, even if it loses no acceptance", markup=False)
            continue
        candidate = Candidate(most.type, rights(most.type), most.step, verify)
        stderr.print(str(candidate), markup=False)
        best = max(best, candidate, key=lambda candidate: candidate.best)
    pays = best.best[0] * verify.of(1) > 1
    aside = "" if pays else "; plain decoding is quicker still, and is what `auto` goes over to"
    stderr.print(f"{best.type} is the quickest here{aside}", markup=False)
    return best.type


def _costs(target: Path, files: dict[str, Path], trimmed: Trimmed | None) -> tuple[dict[str, float], StepCost]:
    """Seconds of each drafter's step, and of the target's.

    Each type takes turns with the drafter as shipped, so that no more than two drafters are held at a time.
    """
    with contextlib.ExitStack() as stack:
        context = open_context(stack, target)
        attends = trimmed is not None and trimmed.file.architecture == ASSISTANT

        def step(opened: contextlib.ExitStack, path: Path) -> Step:
            if trimmed is not None and attends:
                return assistant_step(opened, path, trimmed, context)
            return draft_step(opened, path, trimmed)

        seconds, _ = in_rows({n: decode_step(context, n) for n in VERIFY}, ROWS, "timing the target")
        verify = StepCost(medians(seconds))
        shipped, steps = step(stack, files[AS_SHIPPED]), dict[str, float]()
        # Of the target only single tokens take turns with others, since a GPU may be paid for a change of its batches.
        plain = {"plain": decode_step(context, 1), AS_SHIPPED: shipped}
        taken = medians(by_turns(plain, DRAFT_REPEAT, "timing the drafter as shipped"))
        steps[AS_SHIPPED] = verify.of(1) * taken[AS_SHIPPED] / taken["plain"]
        for kind, path in files.items():
            if kind == AS_SHIPPED:
                continue
            with contextlib.ExitStack() as opened:
                turns = {AS_SHIPPED: shipped, kind: step(opened, path)}
                taken = medians(by_turns(turns, DRAFT_REPEAT, f"timing {kind}"))
            steps[kind] = steps[AS_SHIPPED] * taken[kind] / taken[AS_SHIPPED]
    return steps, verify
