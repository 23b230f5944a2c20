"""What steps cost on this machine: a draft step by head size, a verify step by batch size. Medians, alternating."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corpus.gguf_file import GGUFFile
from corpus.llama import Context, Model, quantize

from .companion import Trimmed
from .cut import head_tensor, plan, step_bytes, write
from .keep import Keep
from .layout import EMBEDDING

VERIFY_REPEAT = 5  # decodes of each batch size
N_CONTEXT = 128  # tokens already read when a step is timed: attention over a short text


@dataclass(frozen=True)
class DraftCost:
    """Seconds of a one-token draft step as a line over k, fitted to measured head sizes."""

    fixed: float
    per_row: float
    measured: dict[int, float]

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

    def bytes_at(self, k: int) -> float:
        return self.fixed_bytes + self.row_bytes * k

    def params_at(self, k: int) -> int:
        return self.fixed_params + self.row_params * k


def _alternate(steps: Sequence[Callable[[], None]], repeat: int, advance: Callable[[int], object]) -> list[list[float]]:
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


def verify_costs(
    target: Path,
    sizes: Sequence[int] = tuple(range(1, 10)),
    repeat: int = VERIFY_REPEAT,
    n_threads: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> dict[int, float]:
    """Median seconds of a target decode by batch size, all rows giving logits."""
    with Model(target) as model, Context(model, N_CONTEXT + 32, n_threads) as context:
        context.decode([1] * N_CONTEXT, 0)

        def step(n: int) -> Callable[[], None]:
            def run() -> None:
                context.decode(list(range(100, 100 + n)), n)
                context.truncate(N_CONTEXT)

            return run

        seconds = _alternate([step(n) for n in sizes], repeat, advance)
    return {n: statistics.median(found) for n, found in zip(sizes, seconds, strict=True)}


def draft_cost(
    drafter: Path,
    sizes: Sequence[int],
    repeat: int = 20,
    n_threads: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> DraftCost:
    """Seconds of a draft step by k, measured on real cuts of `drafter` to the given sizes and on the whole of it."""
    n_rows = GGUFFile(drafter).tensors[EMBEDDING].n_rows
    with tempfile.TemporaryDirectory(prefix="gguf-trim-") as folder, contextlib.ExitStack() as stack:
        steps = []
        for k in sizes:
            path = Path(folder) / f"k{k}.gguf"
            if k == n_rows:
                path = drafter
                table = None
            else:
                # Any rows will do: a row costs what a row costs.
                write(plan(drafter, lambda _, rows, k=k: Keep(np.arange(k, dtype=np.int32), 0, 0, None)), path)  # type: ignore[misc]
                table = Trimmed.open(path).embeddings()
            model = stack.enter_context(Model(path))
            context = stack.enter_context(Context(model, N_CONTEXT + 32, n_threads, n_outputs=1))
            feed = table.rows if table else list
            context.decode(feed([1] * N_CONTEXT), 0)

            def step(context: Context = context, feed: Callable[..., object] = feed) -> None:
                context.decode(feed([100]))  # type: ignore[arg-type]
                context.truncate(N_CONTEXT)

            steps.append(step)
        seconds = _alternate(steps, repeat, advance)
    measured = {k: statistics.median(found) for k, found in zip(sizes, seconds, strict=True)}
    slope, fixed = np.polyfit(list(measured), list(measured.values()), 1) if len(measured) > 1 else (0.0, 0.0)
    return DraftCost(float(fixed), float(slope), measured)


def requantized(path: Path, type_: str, folder: Path) -> Path:
    """`path` rewritten to another quantisation in `folder`, by llama.cpp's own quantize function."""
    out = folder / f"{path.stem}-{type_}.gguf"
    if not out.exists():
        quantize(path, out, type_)
    return out
