"""What is compared: ways to decode with one target, each with its drafter open and what a draft step of it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import click

from gguf_trim.companion import Trimmed
from gguf_trim.dynamic.speculator import Speculator
from gguf_trim.keep import choose_rows
from gguf_trim.layout import EMBEDDING
from gguf_trim.pairs.prepare import NONE, prepare
from gguf_trim.planning.costs import Weights, requantized
from llamabase.gguf_file import GGUFFile
from llamabase.progress import stderr
from llamabase.vocabulary import Vocabulary

from ..auto import AutoDrafter
from ..drafter import Drafter, ModelDrafter, NoDrafter, open_drafter
from ..engine import Engine
from ..lookup import LookupDrafter
from ..measured import measured_draft, measured_verify
from ..options import FULL, Models
from ..pace import StepCost
from .machine import resident

PLAIN, LOOKUP, AUTO = "plain", "lookup", "auto"
SPEC = "spec"
CUT = ("trim", "context", SPEC)  # what a trimmed drafter may draft from
KINDS = (PLAIN, FULL, *CUT, LOOKUP, AUTO)
AGAIN = "again"  # plain decoding a second time: what differs between the two is the machine's noise


@dataclass
class Mode:
    """A way to decode: its kind, @k where several cuts are compared, :n where it has a draft length of its own.

    draft_max None: by cost.
    """

    name: str
    drafter: Drafter
    draft_max: int | None
    file: Path | None = None
    memory: int = 0  # bytes that opening its drafter and answering with it took
    used: bool = False
    model: ModelDrafter | None = None  # the drafter that reads, whoever decides on its drafts
    step: Callable[[], tuple[float, float]] = field(default=lambda: (0.0, 0.0))  # (params, bytes) of a draft step


@dataclass(frozen=True)
class Files:
    """The files of a comparison; trimmed by k."""

    target: Path
    full: Path | None
    trimmed: dict[int, Path]


def find_files(found: Models, full: Path | None, ks: Sequence[int], folder: Path, quants: tuple[str, str]) -> Files:
    """Requantise what is to be, and trim to every k; `quants` are the types of target and drafter, "" as shipped."""
    full = full or (found.prepared.drafter if found.prepared else None)
    target, trimmed = found.target, found.prepared.trimmed if found.prepared else found.draft
    if trimmed is not None and "gguf_trim.d2t" not in GGUFFile(trimmed).fields:
        full, trimmed = full or trimmed, None
    target = requantized(target, quants[0], folder)
    if quants[1]:
        if full is None:
            raise click.UsageError("--draft-quant needs the uncut drafter; give it as --full")
        full = requantized(full, quants[1], folder)
        trimmed = None
    cuts: dict[int, Path] = {}
    if trimmed is not None and not ks:
        cuts[len(Trimmed.open(trimmed).d2t)] = trimmed
    elif full is not None:
        for k in ks or (None,):
            made = prepare(target=target, drafter=full, choose=partial(choose_rows, k=k), requant=NONE).trimmed
            cuts[len(Trimmed.open(made).d2t)] = made
    elif ks:
        raise click.UsageError("--k needs the uncut drafter; give it as --full")
    return Files(target, full, cuts)


def names_of(wanted: Sequence[str], files: Files) -> list[str]:
    """Every mode that the files allow, trimmed ones once for each k where there are several."""
    found = []
    for name in wanted:
        kind, colon, n = name.partition(":")
        if kind == FULL and files.full is None:
            continue
        if kind not in CUT:
            found.append(name)
            continue
        for k, path in files.trimmed.items():
            if kind == SPEC and Speculator.of(trimmed := Trimmed.open(path)) is None:
                stderr.print(
                    f"{name} is left out: {trimmed.companion.path} holds no speculator (`python -m gguf_trim "
                    f"speculator {path}` makes one)",
                    markup=False,
                )
            else:
                found.append(name if len(files.trimmed) == 1 else f"{kind}@{k}{colon}{n}")
    return found


@contextmanager
def open_modes(
    names: Sequence[str], files: Files, engine: Engine, found: Models, draft_max: int | None
) -> Iterator[list[Mode]]:
    """Open every mode's drafter, each with a context of its own."""
    vocabulary = Vocabulary(GGUFFile(files.target))
    verify = cache(lambda: StepCost(measured_verify(engine.reader)))  # anew, whatever is remembered

    def by_cost(drafter: ModelDrafter | None) -> AutoDrafter:
        return AutoDrafter(drafter, verify(), None if drafter is None else StepCost(measured_draft(drafter)))

    with ExitStack() as stack:
        modes = []
        for name in names:
            full_name, _, own = name.partition(":")
            kind, _, k = full_name.partition("@")
            length = int(own) if own else draft_max
            if kind in (PLAIN, AGAIN):
                modes.append(Mode(name, NoDrafter(), 0))
                continue
            if kind == LOOKUP:
                modes.append(Mode(name, LookupDrafter() if length is not None else by_cost(None), length))
                continue
            smallest = min(files.trimmed, default=None)
            path = files.full if kind == FULL else files.trimmed[int(k)] if k else files.trimmed.get(smallest or 0)
            before = resident()
            drafter = None
            if path is not None:
                vocab = kind if kind in CUT else found.vocab
                n_ctx = found.n_ctx_draft or engine.context.n_ctx
                limits = n_ctx, found.n_threads, found.n_gpu_layers, vocab, found.cache_draft
                drafter = open_drafter(path, vocabulary, *limits)
                stack.callback(drafter.close)
            cost = kind == AUTO or length is None
            chooses = by_cost(drafter) if cost or drafter is None else drafter
            mode = Mode(name, chooses, None if cost else length, path, model=drafter)
            if drafter is not None and path is not None:
                mode.step = step_reader(path, drafter)
            mode.memory = resident() - before
            modes.append(mode)
        yield modes


def step_reader(path: Path, drafter: ModelDrafter) -> Callable[[], tuple[float, float]]:
    """A function that says what a draft step of this file has read on average so far: (parameters, bytes).

    The files are read here, once: it is asked after every answer.
    """
    file, dynamic = GGUFFile(path), drafter.dynamic
    weights, k = Weights.of(file), file.tensors[EMBEDDING].n_rows
    speculator = Speculator.of(Trimmed.open(path)) if dynamic is not None and dynamic.speculates else None
    scored = (0.0, 0.0) if speculator is None else speculator.step(k)

    def step() -> tuple[float, float]:
        if dynamic is None or not dynamic.steps:
            return weights.params_at(k), float(weights.bytes_at(k))
        rows = k + dynamic.rows / dynamic.steps
        return weights.params_at(rows) + scored[0], weights.bytes_at(rows) + scored[1]

    return step
