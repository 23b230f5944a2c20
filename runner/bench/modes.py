"""What is compared: ways to decode with one target, each with its drafter open and what a draft step of it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click

from gguf_trim.format.companion import Trimmed
from gguf_trim.format.mtp import MTP, OWN_BLOCK, DrafterSource, MtpBlock, OwnBlock
from gguf_trim.format.speculator import Speculator
from gguf_trim.format.weights import Weights
from gguf_trim.pairs.prepare import cut_to_each
from llamabase.cli.progress import stderr
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import head_tensor
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.quantize import requantized
from llamabase.llama.timing import StepCost
from runner.draft.auto import AutoDrafter
from runner.draft.drafters import Drafter, ModelDrafter, NoDrafter
from runner.draft.lookup import LookupDrafter
from runner.draft.measured import measured_draft, measured_verify
from runner.draft.opening import open_drafter
from runner.loop.engine import Engine
from runner.options import FULL, Models

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
    file: DrafterSource | None
    model: ModelDrafter | None  # the drafter that reads, whoever decides on its drafts
    step: Callable[[], tuple[float, float]]  # (params, bytes) of a draft step
    memory: int  # bytes that opening its drafter and answering with it took

    def as_json(self) -> dict[str, Any]:
        params, n_bytes = self.step()
        return {
            "draft_max": self.draft_max,
            "file": self.file.name if self.file else None,
            "memory_bytes": self.memory,
            "step": {"params": params, "bytes": n_bytes},
        }


@dataclass(frozen=True)
class Files:
    """The files of a comparison; trimmed by what tells them apart in the names of modes, the smallest first."""

    target: Path
    full: DrafterSource | None
    trimmed: dict[str, Path]


def named(cuts: Sequence[Path]) -> dict[str, Path]:
    """Cuts of one drafter by what follows in the name of a mode: @k where there are several, else nothing."""
    by_k = {len(Trimmed.open(cut).d2t): cut for cut in cuts}
    return {f"@{k}" * (len(by_k) > 1): cut for k, cut in sorted(by_k.items())}


def find_files(
    found: Models,
    folder: Path,
    full: DrafterSource | None,
    ks: Sequence[int] = (),
    target_quant: str = "",
    draft_quant: str = "",
) -> Files:
    """Requantise into `folder` what is to be, and trim to every k."""
    trimmed = found.draft
    if found.prepared:
        full, trimmed = full or found.prepared.drafter, found.prepared.trimmed
    if trimmed is not None and (isinstance(trimmed, OwnBlock) or "gguf_trim.d2t" not in GGUFFile(trimmed).fields):
        full, trimmed = full or trimmed, None
    if trimmed is not None and GGUFFile(trimmed).architecture == MTP:
        full = OWN_BLOCK
    if full is None and (ks or draft_quant):
        raise click.UsageError(
            f"{'--draft-quant' if draft_quant else '--k'} needs the uncut drafter; give it as --full"
        )
    target = requantized(found.target, target_quant, folder)
    cuts = [] if trimmed is None else [trimmed]
    if isinstance(full, OwnBlock):
        cuts += cut_to_each(target, full, ks, folder) if ks or not cuts else []
    elif full is not None and (ks or draft_quant or not cuts):
        full = requantized(full, draft_quant, folder)
        cuts = cut_to_each(target, full, ks, folder)
    return Files(target, full, named(cuts))


def names_of(wanted: Sequence[str], files: Files) -> list[str]:
    """Every mode that the files allow, trimmed ones once for each k where there are several."""
    found = []
    for name in wanted:
        kind, colon, n = name.partition(":")
        if kind not in CUT:
            found += [name] if kind != FULL or files.full is not None else []
            continue
        for at, path in files.trimmed.items():
            if kind == SPEC and Speculator.of(trimmed := Trimmed.open(path)) is None:
                stderr.print(
                    f"{name} is left out: {trimmed.companion.path} holds no speculator (`python -m gguf_trim "
                    f"speculator {path}` makes one)",
                    markup=False,
                )
            else:
                found.append(f"{kind}{at}{colon}{n}")
    return found


@contextmanager
def open_modes(
    names: Sequence[str], files: Files, engine: Engine, found: Models, draft_max: int | None
) -> Iterator[list[Mode]]:
    """Open every mode's drafter, each with a context of its own."""
    vocabulary = Vocabulary(GGUFFile(files.target))
    verify = cache(lambda: StepCost(measured_verify(engine.reader)))  # anew, whatever is remembered

    def by_cost(model: ModelDrafter | None) -> AutoDrafter:
        draft = None if model is None else StepCost(measured_draft(model, engine.reader))
        return AutoDrafter(model, verify(), draft)

    with ExitStack() as stack:
        modes = []
        for name in names:
            way, _, own = name.partition(":")
            kind, at, k = way.partition("@")
            path = files.full if kind == FULL else files.trimmed.get(at + k) or next(iter(files.trimmed.values()), None)
            if kind in (PLAIN, AGAIN, LOOKUP):
                path = None
            length = int(own) if own else draft_max
            before, model = resident(), None
            if path is not None:
                n_ctx, vocab = found.n_ctx_draft or engine.context.n_ctx, kind if kind in CUT else found.vocab
                limits = n_ctx, *found.own, vocab, found.cache_draft
                model = open_drafter(path, vocabulary, *limits, target_context=engine.context)
                stack.callback(model.close)
            drafter: Drafter = model or LookupDrafter()
            if kind in (PLAIN, AGAIN):
                drafter, length = NoDrafter(), 0
            elif kind == AUTO or length is None:
                drafter, length = by_cost(model), None
            memory = resident() - before if path else 0
            step = _step_reader(path, model, files.target)
            modes.append(Mode(name, drafter, length, path, model, step, memory))
        yield modes


def _step_reader(
    path: DrafterSource | None, drafter: ModelDrafter | None, target: Path
) -> Callable[[], tuple[float, float]]:
    """A function that says what a draft step of this file has read on average so far: (parameters, bytes).

    The files are read here, once: it is asked after every answer.
    """
    if path is None or drafter is None:
        return lambda: (0.0, 0.0)
    dynamic = drafter.dynamic
    if isinstance(path, OwnBlock):
        weights = Weights.of_block(block := MtpBlock.of(GGUFFile(target)))
        k = block.n_vocab
    else:
        file = GGUFFile(path)
        weights = Weights.of_block(MtpBlock.of(GGUFFile(target))) if file.architecture == MTP else Weights.of(file)
        k = head_tensor(file).n_rows
    speculator = None
    if dynamic is not None and dynamic.speculates and not isinstance(path, OwnBlock):
        speculator = Speculator.of(Trimmed.open(path))
    scored = (0.0, 0.0) if speculator is None else speculator.step(k)

    def step() -> tuple[float, float]:
        if dynamic is None or not dynamic.steps:
            return weights.params_at(k), float(weights.bytes_at(k))
        rows = k + dynamic.rows / dynamic.steps
        return weights.params_at(rows) + scored[0], weights.bytes_at(rows) + scored[1]

    return step
