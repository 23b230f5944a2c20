"""What steps cost on this machine: a draft step by head size, a verify step by batch size. Medians, alternating."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from llamabase.ggml import Backend
from llamabase.gguf_file import GGUFFile
from llamabase.llama import Context, Model
from llamabase.progress import progress
from llamabase.quantize import quantize
from llamabase.states import PairContext

from ..companion import Trimmed
from ..cut import plan, step_bytes, write
from ..dynamic.rows import DynamicHead
from ..dynamic.speculator import Speculator
from ..hanging import HangingHead
from ..keep import Keep
from ..layout import EMBEDDING, head_tensor
from ..mtp import MtpBlock
from .added import TIMED_CORE

AS_SHIPPED = "as shipped"  # a file in the types it has
VERIFY_SIZES = tuple(range(1, 10))
CUTS = (2048, 16384)  # rows of the cuts whose steps are timed
VERIFY_REPEAT, DRAFT_REPEAT = 5, 20  # steps of each size, of which the median counts
N_CONTEXT = 128  # tokens already read when a step is timed: attention over a short text

Step = TypeVar("Step")


@dataclass(frozen=True)
class DraftCost:
    """Seconds of a one-token draft step as a line over k, fitted to measured head sizes."""

    fixed: float
    per_row: float
    measured: dict[int, float]
    added: dict[str, float] = field(default_factory=dict)  # what rows added at every step cost more, by vocab

    def at(self, k: int) -> float:
        return self.measured.get(k, self.fixed + self.per_row * k)


@dataclass(frozen=True)
class Weights:
    """Bytes and parameters a step reads: fixed, and per row of the head."""

    fixed_bytes: int
    row_bytes: float
    fixed_params: int
    row_params: int

    @classmethod
    def of(cls, file: GGUFFile) -> Weights:
        head = head_tensor(file)
        skipped = {head.name, EMBEDDING}
        params = sum(tensor.n_elements for tensor in file.tensors.values() if tensor.name not in skipped)
        return cls(step_bytes(file) - head.n_bytes, head.n_bytes / head.n_rows, params, head.shape[0])

    @classmethod
    def of_block(cls, block: MtpBlock) -> Weights:
        n_bytes, params = (sum(getattr(t, what) for t in block.tensors) for what in ("n_bytes", "n_elements"))
        return cls(n_bytes, block.head.n_bytes / block.n_vocab, params, block.n_embd)

    def bytes_at(self, k: float) -> float:
        return self.fixed_bytes + self.row_bytes * k

    def params_at(self, k: float) -> float:
        return self.fixed_params + self.row_params * k


def alternate(title: str, steps: Mapping[Step, Callable[[], object]], repeat: int) -> dict[Step, list[float]]:
    """Seconds of each step, `repeat` times in turn after one warm-up, forwards and backwards by turns; with a bar."""
    seconds: dict[Step, list[float]] = {name: [] for name in steps}
    with progress(title, repeat * len(steps), "steps") as advance:
        for turn in range(repeat + 1):
            for name in list(steps)[:: 1 if turn % 2 else -1]:
                started = time.perf_counter()
                steps[name]()
                if turn:
                    seconds[name].append(time.perf_counter() - started)
                    advance(1)
    return seconds


def timed(title: str, steps: Mapping[Step, Callable[[], object]], repeat: int) -> dict[Step, float]:
    """Median seconds of each step; see `alternate`."""
    return {name: statistics.median(found) for name, found in alternate(title, steps, repeat).items()}


def opened(stack: contextlib.ExitStack, path: Path, n_threads: int | None = None, n_outputs: int = 32) -> Context:
    """A context to time steps in, open as long as the stack."""
    model = stack.enter_context(Model(path))
    context: Context = stack.enter_context(Context(model, N_CONTEXT + 32, n_threads, n_outputs=n_outputs))
    return context


def decodes(
    context: Context,
    n: int,
    feed: Callable[[Sequence[int]], Sequence[int] | np.ndarray] = list,
    head: DynamicHead | None = None,
) -> Callable[[], None]:
    """A step: reads n tokens after N_CONTEXT others, all rows giving logits, and takes them back.

    With a head it adds rows to the last of them, too. What a recurrent cache cannot take back it goes on from.
    """

    def begin() -> None:
        context.truncate(0)
        context.decode(feed([1] * N_CONTEXT), 0)

    if not context.n_past:
        begin()

    def run() -> None:
        if context.n_past + n > context.n_ctx:  # so seldom that no median sees it
            begin()
        context.decode(feed(list(range(100, 100 + n))), n, head is not None)
        if head is not None:
            head.logits(context.hidden_states(n)[-1])
        if not context.recurrent:
            context.truncate(N_CONTEXT)

    return run


def verify_costs(target: Path, n_threads: int | None = None, title: str = "timing the target") -> dict[int, float]:
    """Median seconds of a target decode by batch size, all rows giving logits."""
    with contextlib.ExitStack() as stack:
        context = opened(stack, target, n_threads)
        return timed(title, {n: decodes(context, n) for n in VERIFY_SIZES}, VERIFY_REPEAT)


def draft_cost(drafter: Path, n_threads: int | None = None, speculator: Speculator | None = None) -> DraftCost:
    """Seconds of a draft step by k, measured on real cuts of `drafter` to CUTS rows and on the whole of it.

    With a speculator also what it costs to add rows at every step, to a cut of TIMED_CORE rows.
    """
    n_rows = GGUFFile(drafter).tensors[EMBEDDING].n_rows
    with tempfile.TemporaryDirectory(prefix="gguf-trim-") as folder, contextlib.ExitStack() as stack:

        def step(path: Path, trimmed: Trimmed | None) -> Callable[[DynamicHead | None], Callable[[], None]]:
            context = opened(stack, path, n_threads, 1)
            feed = list if trimmed is None else trimmed.embeddings().rows
            return lambda head: decodes(context, 1, feed, head)

        return _cost_by_k(drafter, n_rows, step, Path(folder), None, n_threads, speculator)


def head_cost(
    drafter: Path, target: Path, n_threads: int | None = None, speculator: Speculator | None = None
) -> DraftCost:
    """The same of an EAGLE-3 head, which needs its target to be loaded."""
    head = HangingHead.of(GGUFFile(drafter))
    n_rows = head.n_vocab if head.ids is None else len(head.ids)
    with tempfile.TemporaryDirectory(prefix="gguf-trim-") as folder, contextlib.ExitStack() as stack:
        other = opened(stack, target, n_threads)
        state = np.ones((1, head.n_embd), np.float32)

        def step(path: Path, trimmed: Trimmed | None) -> Callable[[DynamicHead | None], Callable[[], None]]:
            model = stack.enter_context(Model(path))
            context = stack.enter_context(PairContext(model, N_CONTEXT + 32, n_threads, other))
            context.pairs([1] * N_CONTEXT, np.ones((N_CONTEXT, head.n_embd), np.float32), False)

            def run(dynamic: DynamicHead | None) -> None:
                made = context.pairs([2], state, True)[1]
                hidden = head.hidden(made[0])
                if dynamic is not None:
                    dynamic.logits(hidden)
                context.truncate(N_CONTEXT)

            return lambda dynamic: partial(run, dynamic)

        return _cost_by_k(drafter, n_rows, step, Path(folder), target, n_threads, speculator)


def _cost_by_k(
    drafter: Path,
    n_rows: int,
    step: Callable[[Path, Trimmed | None], Callable[[DynamicHead | None], Callable[[], None]]],
    folder: Path,
    target: Path | None,
    n_threads: int | None,
    speculator: Speculator | None,
) -> DraftCost:
    """`step` opens a drafter, or a cut of one, and gives its step by what adds rows to it."""
    core = min(TIMED_CORE, n_rows // 2)
    steps: dict[int | str, Callable[[], None]] = {n_rows: step(drafter, None)(None)}

    def first(k: int, having: np.ndarray | None = None) -> Keep:
        # Any rows will do: a row costs what a row costs.
        ids = np.arange(k) if having is None else np.flatnonzero(having)[:k]
        return Keep(ids.astype(np.int32), 0, 0, None)

    for k in [k for k in (*CUTS, *([core] if speculator else [])) if k < n_rows]:
        path = folder / f"k{k}.gguf"
        write(plan(drafter, lambda _, rows, k=k, having=None, multiple=1: first(k, having), target), path)
        trimmed = Trimmed.open(path)
        steps[k] = (run := step(path, trimmed))(None)
        if speculator is not None and k == core:
            backend, n_ids = Backend(n_threads), len(trimmed.row_of)
            for vocab, using in (("context", None), ("spec", speculator)):
                head = DynamicHead(trimmed, backend, using)
                head.follow(np.linspace(core, n_ids - 1, N_CONTEXT // 2).astype(int).tolist())
                steps[vocab] = run(head)
    medians = timed("timing the drafter", steps, DRAFT_REPEAT)
    added = {name: value - medians[core] for name, value in medians.items() if isinstance(name, str)}
    measured = {name: value for name, value in medians.items() if isinstance(name, int)}
    slope, fixed = np.polyfit(list(measured), list(measured.values()), 1) if len(measured) > 1 else (0.0, 0.0)
    return DraftCost(float(fixed), float(slope), measured, added)


def renamed(path: Path, type_: str) -> Path:
    """Beside a file, the name of the same in another quantisation."""
    return path if type_ in ("", AS_SHIPPED) else path.with_name(f"{path.stem}-{type_}.gguf")


def requantized(path: Path, type_: str, folder: Path) -> Path:
    """`path` rewritten to another quantisation in `folder`, by llama.cpp's own quantize function; or as it is."""
    if renamed(path, type_) == path:
        return path
    out = folder / renamed(path, type_).name
    if not out.exists():
        quantize(path, out, type_)
    return out
