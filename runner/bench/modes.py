"""The ways to decode that are compared on one target, each with its open drafter and what a draft step of it reads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click

from gguf_trim.format.companion import Trimmed
from gguf_trim.format.memory_bound import draft_weights
from gguf_trim.format.mtp import MTP, OWN_BLOCK, DrafterSource, OwnBlock
from gguf_trim.format.speculator import Speculator
from gguf_trim.pairs.prepare import cut_to_each
from gguf_trim.pairs.rivals import best_uncut, cut_to_first, reads_text
from llamabase.cli.progress import stderr
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.quantize import requantized
from llamabase.llama.timing import StepCost
from runner.draft.auto import AutoDrafter
from runner.draft.contracts import FULL, Drafter, NoDrafter
from runner.draft.drafters import ModelDrafter
from runner.draft.lookup import Answers, LookupDrafter
from runner.draft.measured import chosen_vocab, measured_draft, measured_verify
from runner.draft.opening import open_drafter
from runner.loop.engine import Engine
from runner.options import Models

from .machine import resident

PLAIN, LOOKUP, POOL, AUTO = "plain", "lookup", "pool", "auto"
SPEC = "spec"
CUT = ("trim", "context", SPEC)  # what a trimmed drafter may draft from
KINDS = (PLAIN, FULL, *CUT, LOOKUP, POOL, AUTO)
# What others do without this program: the uncut drafter in the type that is quickest here, and the first rows kept.
RIVALS = QUANT, FIRST = "quant", "first"
AGAIN = "again"  # plain decoding a second time, which shows the machine's noise


class Reads(NamedTuple):
    """Weights that a draft step has read, on average so far."""

    params: float
    bytes: float


@dataclass
class Mode:
    """A way to decode. Its name is a kind, then @k if several cuts are compared, then :n for a draft length of its own.

    `draft_max` None: as many drafts as pay, by measured costs. `answers`: the mode's earlier ones, if it drafts from
    them.
    """

    name: str
    drafter: Drafter
    draft_max: int | None
    file: DrafterSource | None
    model: ModelDrafter | None  # the drafter that reads; `drafter` may only decide about it
    step: Callable[[], Reads]  # what a draft step reads
    memory: int  # bytes that opening the drafter and answering with it took
    answers: Answers | None = None

    def as_json(self) -> dict[str, Any]:
        file, step = self.file.name if self.file else None, self.step()._asdict()
        vocab = self.model.using if self.model is not None else None
        return {"draft_max": self.draft_max, "file": file, "vocab": vocab, "memory_bytes": self.memory, "step": step}


@dataclass(frozen=True)
class Files:
    """The files of a comparison. `trimmed` and `first` are by what `named` appends to names of modes.

    `quant` is the uncut drafter requantised; `first` are cuts as large as the trimmed ones, and in the same types, that
    keep the first ids. Either is empty unless a mode asks for it, see `with_rivals`.
    """

    target: Path
    full: DrafterSource | None
    trimmed: dict[str, Path]
    quant: Path | None = None
    first: dict[str, Path] = field(default_factory=dict)

    def of(self, kind: str, at: str) -> DrafterSource | None:
        """What a mode of a kind drafts from; `at` is the end of its name."""
        if kind in (FULL, QUANT):
            return self.full if kind == FULL else self.quant
        if kind == FIRST:
            return self.first.get(at)
        return self.trimmed.get(at) or next(iter(self.trimmed.values()), None)


def named(cuts: Sequence[Path]) -> dict[str, Path]:
    """Cuts of one drafter, the smallest first, by what names of modes append: @k if there are several, else nothing."""
    by_k = {len(Trimmed.open(cut).d2t): cut for cut in cuts}
    return {f"@{k}" * (len(by_k) > 1): cut for k, cut in sorted(by_k.items())}


def find_files(
    models: Models,
    folder: Path,
    full: DrafterSource | None,
    ks: Sequence[int] = (),
    target_quant: str = "",
    draft_quant: str = "",
) -> Files:
    """The files to compare: requantised to the types that are given, and cut to every k, all in `folder`."""
    trimmed = models.draft
    if models.prepared:
        full, trimmed = full or models.prepared.drafter, models.prepared.trimmed
    if trimmed is not None and (isinstance(trimmed, OwnBlock) or "gguf_trim.d2t" not in GGUFFile(trimmed).fields):
        full, trimmed = full or trimmed, None
    if trimmed is not None and GGUFFile(trimmed).architecture == MTP:
        full = OWN_BLOCK
    if full is None and (ks or draft_quant):
        raise click.UsageError(
            f"{'--draft-quant' if draft_quant else '--k'} needs the uncut drafter; give it as --full"
        )
    target = requantized(models.target, target_quant, folder)
    cuts = [] if trimmed is None else [trimmed]
    if isinstance(full, OwnBlock):
        cuts += cut_to_each(target, full, ks, folder) if ks or not cuts else []
    elif full is not None and (ks or draft_quant or not cuts):
        full = requantized(full, draft_quant, folder)
        cuts = cut_to_each(target, full, ks, folder)
    return Files(target, full, named(cuts))


def with_rivals(files: Files, wanted: Collection[str], folder: Path) -> Files:
    """The same files with the rivals that are among some modes, cuts made in `folder`; says which cannot be had."""
    kinds = {name.partition(":")[0] for name in wanted}
    uncut = files.full if isinstance(files.full, Path) and reads_text(files.full) else None
    if not kinds & {QUANT, FIRST}:
        return files
    if uncut is None:
        named = " and ".join(kind for kind in (QUANT, FIRST) if kind in kinds)
        stderr.print(f"{named}: left out, for want of an uncut drafter (--full) that reads the text itself")
        return files
    quant = best_uncut(files.target, uncut) if QUANT in kinds else None
    first = {at: cut_to_first(uncut, cut, folder) for at, cut in files.trimmed.items()} if FIRST in kinds else {}
    return replace(files, quant=quant, first=first)


def names_of(wanted: Sequence[str], files: Files) -> list[str]:
    """The modes that the files allow. Those that draft from a trimmed file are named once for each."""
    names = []
    for name in wanted:
        kind, colon, n = name.partition(":")
        if kind == FIRST:
            names += [f"{kind}{at}{colon}{n}" for at in files.first]
            continue
        if kind not in CUT:
            names += [name] if kind not in (FULL, QUANT) or files.of(kind, "") is not None else []
            continue
        for at, path in files.trimmed.items():
            if kind == SPEC and Speculator.of(trimmed := Trimmed.open(path)) is None:
                stderr.print(
                    f"{name} is left out: {trimmed.companion.path} holds no speculator (`python -m gguf_trim "
                    f"speculator {path}` makes one)",
                    markup=False,
                )
            else:
                names.append(f"{kind}{at}{colon}{n}")
    return names


@contextmanager
def open_modes(
    names: Sequence[str], files: Files, engine: Engine, models: Models, draft_max: int | None
) -> Iterator[list[Mode]]:
    """Open every mode's drafter, each with a context of its own."""
    vocabulary = Vocabulary(GGUFFile(files.target))
    uncut = models.prepared is not None and models.prepared.uncut and models.vocab == AUTO
    verify = cache(lambda: StepCost(*measured_verify(engine.reader)))  # measured anew, whatever is remembered
    with ExitStack() as stack:
        modes = []
        for name in names:
            way, _, own = name.partition(":")
            kind, at, k = way.partition("@")
            path = files.of(FULL if kind == AUTO and uncut else kind, at + k)
            if kind in (PLAIN, AGAIN, LOOKUP, POOL):
                path = None
            length = int(own) if own else draft_max
            before, model = resident(), None
            if path is not None:
                options = models.of_drafter(path, engine.context.n_ctx)
                options = replace(options, vocab=_vocab(kind, models.vocab))
                model = open_drafter(options, vocabulary, engine.context)
                stack.callback(model.close)
            answers = Answers() if kind in (POOL, AUTO) else None
            drafter: Drafter = model or LookupDrafter(answers)
            if kind in (PLAIN, AGAIN):
                drafter, length = NoDrafter(), 0
            elif kind == AUTO or length is None:
                draft = None
                if model is not None:
                    model.auto = chosen_vocab(model, verify(), engine.reader)
                    draft = StepCost(measured_draft(model, engine.reader))
                drafter, length = AutoDrafter(model, verify(), draft, answers=answers), None
            memory = resident() - before if path else 0
            reads = _step_reader(path, model, files.target)
            modes.append(Mode(name, drafter, length, path, model, reads, memory, answers))
        yield modes


def _vocab(kind: str, otherwise: str) -> str:
    """What a mode's drafter drafts from."""
    return "trim" if kind == FIRST else kind if kind in CUT else otherwise


def _step_reader(path: DrafterSource | None, drafter: ModelDrafter | None, target: Path) -> Callable[[], Reads]:
    """`Mode.step`. The files are read here, once, since it is called after every answer."""
    if path is None or drafter is None:
        return lambda: Reads(0.0, 0.0)
    weights, dynamic, scored = draft_weights(path, target), drafter.dynamic, (0.0, 0.0)
    k = weights.n_rows
    if dynamic is not None and dynamic.speculates and isinstance(path, Path):
        speculator = Speculator.of(Trimmed.open(path))
        scored = scored if speculator is None else speculator.step(k)

    def step() -> Reads:
        if dynamic is None or not dynamic.steps:
            return Reads(weights.params_at(k), weights.bytes_at(k))
        rows = k + dynamic.rows / dynamic.steps
        return Reads(weights.params_at(rows) + scored[0], weights.bytes_at(rows) + scored[1])

    return step
