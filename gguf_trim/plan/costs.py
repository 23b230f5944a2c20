"""What steps cost on this machine: a draft step by head size, a verify step by batch size. Medians, alternating."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from gguf_trim.cut import lay_out, write
from gguf_trim.format.companion import Trimmed
from gguf_trim.format.speculator import Speculator
from gguf_trim.format.state_fed import Eagle3Head
from gguf_trim.keep import Keep
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import EMBEDDING
from llamabase.llama.ggml import Backend
from llamabase.llama.model import Model
from llamabase.llama.states import PairContext
from llamabase.llama.timing import N_CONTEXT, decodes, opened, timed
from runner.draft.rows import DynamicHead

from .added import TIMED_CORE

VERIFY_SIZES = tuple(range(1, 10))
CUTS = (2048, 16384)  # rows of the cuts whose steps are timed
VERIFY_REPEAT, DRAFT_REPEAT = 5, 20  # steps of each size, of which the median counts


@dataclass(frozen=True)
class DraftCost:
    """Seconds of a one-token draft step as a line over k, fitted to measured head sizes."""

    fixed: float
    per_row: float
    measured: dict[int, float]
    added: dict[str, float] = field(default_factory=dict)  # what rows added at every step cost more, by vocab

    def at(self, k: int) -> float:
        return self.measured.get(k, self.fixed + self.per_row * k)


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
    head = Eagle3Head.of(GGUFFile(drafter))
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

    def first(k: int, has_row: np.ndarray) -> Keep:
        # Any rows will do: a row costs what a row costs.
        return Keep(np.flatnonzero(has_row)[:k].astype(np.int32), 0, 0, None)

    for k in [k for k in (*CUTS, *([core] if speculator else [])) if k < n_rows]:
        path = folder / f"k{k}.gguf"
        write(lay_out(drafter, lambda _, has_row, __, k=k: first(k, has_row), target), path)
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
