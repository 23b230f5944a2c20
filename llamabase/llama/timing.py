"""Times steps by turns."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from llamabase.cli.progress import progress
from runner.draft.rows import DynamicHead

from .context import Context
from .model import Model

N_CONTEXT = 128  # tokens already read when a step is timed: attention over a short text

Step = TypeVar("Step")


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
