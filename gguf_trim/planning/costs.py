"""What steps cost on this machine: a draft step by head size, a verify step by batch size. Medians, alternating."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from llamabase.ggml import Backend
from llamabase.gguf_file import GGUFFile
from llamabase.llama import Context, Model, physical_cores
from llamabase.quantize import quantize

from ..companion import Trimmed
from ..cut import head_tensor, plan, step_bytes, write
from ..dynamic.rows import DynamicHead
from ..dynamic.speculator import Speculator
from ..keep import Keep
from ..layout import EMBEDDING
from .added import TIMED_CORE

AS_SHIPPED = "as shipped"  # a file in the types it has
VERIFY_REPEAT = 5  # decodes of each batch size
N_CONTEXT = 128  # tokens already read when a step is timed: attention over a short text


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

    def bytes_at(self, k: float) -> float:
        return self.fixed_bytes + self.row_bytes * k

    def params_at(self, k: float) -> float:
        return self.fixed_params + self.row_params * k


def alternate(steps: Sequence[Callable[[], None]], repeat: int, advance: Callable[[int], object]) -> list[list[float]]:
    """Seconds of each step, `repeat` times in turn after one warm-up, forwards and backwards by turns."""
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(repeat + 1):
        for i in range(len(steps))[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            steps[i]()
            if turn:
                seconds[i].append(time.perf_counter() - started)
                advance(1)
    return seconds


def decodes(
    context: Context, n: int, feed: Callable[[Sequence[int]], Sequence[int] | np.ndarray] = list
) -> Callable[[], None]:
    """A function that reads n tokens after N_CONTEXT others, all rows giving logits, and takes them back."""
    if not context.n_past:
        context.decode(feed([1] * N_CONTEXT), 0)

    def run() -> None:
        context.decode(feed(list(range(100, 100 + n))), n)
        context.truncate(N_CONTEXT)

    return run


def verify_costs(
    target: Path,
    sizes: Sequence[int] = tuple(range(1, 10)),
    repeat: int = VERIFY_REPEAT,
    n_threads: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> dict[int, float]:
    """Median seconds of a target decode by batch size, all rows giving logits."""
    with Model(target) as model, Context(model, N_CONTEXT + 32, n_threads) as context:
        seconds = alternate([decodes(context, n) for n in sizes], repeat, advance)
    return {n: statistics.median(found) for n, found in zip(sizes, seconds, strict=True)}


def draft_cost(
    drafter: Path,
    sizes: Sequence[int],
    repeat: int = 20,
    n_threads: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
    speculator: Speculator | None = None,
) -> DraftCost:
    """Seconds of a draft step by k, measured on real cuts of `drafter` to the given sizes and on the whole of it.

    With a speculator also what it costs to add rows at every step, to a cut of TIMED_CORE rows.
    """
    n_rows = GGUFFile(drafter).tensors[EMBEDDING].n_rows
    core = min(TIMED_CORE, n_rows // 2)
    with tempfile.TemporaryDirectory(prefix="gguf-trim-") as folder, contextlib.ExitStack() as stack:
        steps: dict[int | str, Callable[[], None]] = {}
        for k in sorted({*sizes, core} if speculator else sizes):
            path = Path(folder) / f"k{k}.gguf"
            if k == n_rows:
                path = drafter
                table = None
            else:
                # Any rows will do: a row costs what a row costs.
                write(plan(drafter, lambda _, rows, k=k: Keep(np.arange(k, dtype=np.int32), 0, 0, None)), path)
                table = Trimmed.open(path).embeddings()
            model = stack.enter_context(Model(path))
            context = stack.enter_context(Context(model, N_CONTEXT + 32, n_threads, n_outputs=1))
            feed = table.rows if table else list
            context.decode(feed([1] * N_CONTEXT), 0)

            def step(
                head: DynamicHead | None = None, context: Context = context, feed: Callable[..., object] = feed
            ) -> None:
                context.decode(feed([100]), 1, head is not None)  # type: ignore[arg-type]
                if head is not None:
                    head.logits(context.hidden_states(1)[0])
                context.truncate(N_CONTEXT)

            steps[k] = step
            if speculator is not None and k == core:
                backend = Backend(n_threads or physical_cores())
                for vocab, using in (("context", None), ("spec", speculator)):
                    head = DynamicHead(Trimmed.open(path), backend, using)
                    head.follow(np.linspace(core, n_rows - 1, N_CONTEXT // 2).astype(int).tolist())
                    steps[vocab] = partial(step, head)
        seconds = alternate(list(steps.values()), repeat, advance)
    medians = {name: statistics.median(found) for name, found in zip(steps, seconds, strict=True)}
    added = {name: value - medians[core] for name, value in medians.items() if isinstance(name, str)}
    measured = {name: value for name, value in medians.items() if isinstance(name, int)}
    slope, fixed = np.polyfit(list(measured), list(measured.values()), 1) if len(measured) > 1 else (0.0, 0.0)
    return DraftCost(float(fixed), float(slope), measured, added)


def requantized(path: Path, type_: str, folder: Path) -> Path:
    """`path` rewritten to another quantisation in `folder`, by llama.cpp's own quantize function; or as it is."""
    if type_ in ("", AS_SHIPPED):
        return path
    out = folder / f"{path.stem}-{type_}.gguf"
    if not out.exists():
        quantize(path, out, type_)
    return out
