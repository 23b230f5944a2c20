"""The clock: what a step takes on this machine, timed by turns or in rows, and what its other sizes take by those.

A step runs once and returns its seconds, so it can prepare itself untimed and can use a clock inside llama.cpp.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from llamabase.cli.progress import progress

from .context import Context, ContextParams, SequenceContext
from .model import Model

VERIFY = (1, 2, 3, 4, 5, 6, 8)  # tokens of the batches in which a target's step is timed
N_CONTEXT = 128  # tokens already read when a step is timed: attention over a short text
# Share of the quickest step below which a change of sizes costs nothing. On an H200 it costs 0.33; on two CPU cores,
# where llama.cpp builds its graph anew, up to 0.08 in 20 measurements of SmolLM2-135M.
NOTHING = 0.1
FOLLOW = 0.03  # power of an observed ratio by which the costs of other sizes move, see StepCost.observe

Step = Callable[[], float]
Name = TypeVar("Name")


def timed(run: Callable[[], object]) -> Step:
    """A step that is all of `run`, by the wall clock."""

    def step() -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    return step


def by_turns(
    steps: Mapping[Name, Step], repeat: int, title: str = "", patience: float = math.inf
) -> dict[Name, list[float]]:
    """Seconds of each step, `repeat` times in turn, forwards and backwards alternately, after a turn that warms up.

    No turn begins after `patience` seconds; the turn that warms up counts if it is the only one. A title shows a bar.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in steps}
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(progress(title, (repeat + 1) * len(steps), "steps")) if title else None
        for turn in range(repeat + 1):
            for name in list(steps)[:: -1 if turn % 2 else 1]:
                seconds[name].append(steps[name]())
                if advance is not None:
                    advance(1)
            if time.perf_counter() - started > patience:
                break
    return {name: taken[1:] or taken for name, taken in seconds.items()}


def in_rows(
    steps: Mapping[Name, Step], rows: int, title: str = "", patience: float = math.inf
) -> tuple[dict[Name, list[float]], float]:
    """(seconds of each step, seconds that a change from one step to another costs), for sizes of one context's step.

    A GPU's backend may have to prepare itself for every size: long when it first meets one, and a little whenever the
    size changes. So each step runs once, which warms up, and then in turn `rows` times two in a row: the first of a
    row is paid for the change, the second is what a step costs. Where a change costs nothing both count. No row but the
    first begins after `patience` seconds; a step without rows has the one that warmed up.
    """
    after: dict[Name, list[float]] = {name: [] for name in steps}
    inside: dict[Name, list[float]] = {name: [] for name in steps}
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        advance = (
            stack.enter_context(progress(title, (1 + rows) * len(steps), "rows")) if title else lambda amount: None
        )
        once = {}
        for name, step in steps.items():
            once[name] = step()
            advance(1)
        for i, name in enumerate([*steps] * rows):
            if i and time.perf_counter() - started > patience:
                break
            after[name].append(steps[name]())
            inside[name].append(steps[name]())
            advance(1)
    # The first row of a size may still be warming up, so a price needs the second one. A hiccup can make that of one
    # size seem great, so the least counts.
    change = min([min(after[name]) - min(inside[name]) for name in steps if len(after[name]) > 1], default=0.0)
    if change < NOTHING * min((second for taken in inside.values() for second in taken), default=math.inf):
        return {name: after[name] + inside[name] or [once[name]] for name in steps}, 0.0
    return {name: inside[name] or [once[name]] for name in steps}, change


def medians(seconds: Mapping[Name, Sequence[float]]) -> dict[Name, float]:
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def open_context(
    stack: contextlib.ExitStack, path: Path, n_threads: int | None = None, n_outputs: int = VERIFY[-1]
) -> Context:
    """A context to time steps in, open as long as the stack."""
    model = stack.enter_context(Model(path))
    context: Context = stack.enter_context(Context(model, N_CONTEXT + 32, ContextParams(n_threads), n_outputs))
    return context


def decode_step(
    context: SequenceContext, n: int, read: Callable[[Sequence[int], int], object] | None = None, after: int = N_CONTEXT
) -> Step:
    """Reads n tokens after `after` others, all n giving logits; takes them back untimed.

    `read(tokens, outputs)` makes the context read; None: `context.decode`. A recurrent cache cannot take tokens back:
    it goes on from them, and begins anew when it is full.
    """
    if read is None:
        assert isinstance(context, Context)
        read = context.decode

    def step() -> float:
        if not after <= context.n_past <= context.n_ctx - n:
            context.truncate(0)
            read([1] * after, 0)
        seconds = timed(lambda: read(range(n), n))()
        if not (after and context.recurrent):
            context.truncate(after)
        return seconds

    return step


class StepCost:
    """Seconds of a step by its size (tokens that it reads, or rows of its head), interpolated between measured sizes.

    `change`: seconds that a step takes longer if its size is not that of the step before. Follows the steps it
    observes. Raises ValueError, TypeError, AttributeError or OverflowError for anything but positive seconds by
    positive sizes, whose types may be those of JSON, and a change that costs no less than nothing.
    """

    def __init__(self, seconds: Mapping[int, float], change: float = 0.0) -> None:
        measured = sorted((int(size), float(taken)) for size, taken in seconds.items())
        if not measured or not all(size > 0 and 0 < taken < math.inf for size, taken in measured):
            raise ValueError("seconds of a step are positive, and so are its sizes")
        if not 0 <= change < math.inf:
            raise ValueError("a change of sizes costs no less than nothing")
        self._sizes, self._seconds = [size for size, _ in measured], [taken for _, taken in measured]
        self.change = float(change)

    def prepared(self, n: int) -> bool:
        """Whether a step of this size is like the measured ones; where changes cost, any other must be prepared for."""
        return not self.change or n in self._sizes

    def of(self, n: float) -> float:
        """Between measured sizes on the line that joins them; beyond the last one, on the line from the first."""
        sizes, seconds = self._sizes, self._seconds
        i = bisect_left(sizes, n)
        if i == 0 or (i < len(sizes) and sizes[i] == n):
            return seconds[i]
        low, high = (i - 1, i) if i < len(sizes) else (0, -1)
        slope = (seconds[high] - seconds[low]) / max(sizes[high] - sizes[low], 1)
        if i == len(sizes):
            slope = max(slope, 0.0)  # one dip must not make a long prompt cost less than nothing
        return seconds[high] + slope * (n - sizes[high])

    def counted(self, n: int, seconds: float) -> float:
        """The seconds of a step as they count: those of a hiccup, or of a GPU's first step of a size, say little."""
        return min(max(seconds, self.of(n) / 2), self.of(n) * 2)

    def observe(self, n: int, seconds: float) -> None:
        """A step of size n took this long: move its cost towards that a little, however far off it is.

        Other sizes follow half as much, since what makes one slower (a longer text, a busy machine) makes all slower.
        A step between two sizes counts for both, for the nearer one more. One beyond the last size moves only that one,
        since reading a long text is not like a short step.
        """
        ratio, sizes = self.counted(n, seconds) / self.of(n), self._sizes
        if n > sizes[-1]:
            powers = [0.0] * (len(sizes) - 1) + [2.0]
        else:
            powers, high = [1.0] * len(sizes), bisect_left(sizes, n)  # the first size that is no smaller
            low = max(high - (sizes[high] != n), 0)
            part = (n - sizes[low]) / max(sizes[high] - sizes[low], 1)
            powers[low] += 1 - part
            powers[high] += part
        for i, power in enumerate(powers):
            self._seconds[i] *= ratio ** (FOLLOW * power)
