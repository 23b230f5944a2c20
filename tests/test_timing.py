"""The clock: turns, what warms up, and a decode step that leaves the cache as it was."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from llamabase.llama.timing import (
    N_CONTEXT,
    NOTHING,
    StepCost,
    by_turns,
    decode_step,
    in_rows,
    medians,
    open_context,
    timed,
)


def test_steps_take_turns_forwards_and_backwards() -> None:
    taken: list[str] = []

    def step(name: str) -> float:
        taken.append(name)
        return float(len(taken))

    seconds = by_turns({name: lambda name=name: step(name) for name in "abc"}, 3)
    assert "".join(taken) == "abc" + "cba" + "abc" + "cba"
    assert seconds == {"a": [6, 7, 12], "b": [5, 8, 11], "c": [4, 9, 10]}
    assert medians(seconds) == {"a": 7, "b": 8, "c": 9}


def test_without_patience_the_turn_that_warms_up_counts() -> None:
    slow = timed(lambda: time.sleep(0.01))
    assert len(by_turns({"a": slow}, 9, patience=0.0)["a"]) == 1
    assert 1 <= len(by_turns({"a": slow}, 99, patience=0.05)["a"]) <= 5
    assert min(by_turns({"a": slow}, 2)["a"]) >= 0.01


class Graphs:
    """A machine that prepares itself for a size in two slow steps, and again a little whenever the size changes."""

    def __init__(self, change: float) -> None:
        self.change, self.last, self.seen = change, 0, Counter[int]()

    def step(self, n: int) -> float:
        self.seen[n] += 1
        changed, self.last = n != self.last, n
        return 50.0 if self.seen[n] <= 2 else 4.0 + n + self.change * changed


def test_in_a_row_steps_cost_what_they_cost_and_a_change_its_price() -> None:
    graphs = Graphs(1.5)
    seconds, change = in_rows({n: partial(graphs.step, n) for n in (1, 2, 4)}, 2)
    assert {n: min(taken) for n, taken in seconds.items()} == {1: 5, 2: 6, 4: 8} and change == 1.5
    assert set(graphs.seen.values()) == {5}
    assert medians(by_turns({n: partial(graphs.step, n) for n in (1, 2, 4)}, 4)) != {1: 5, 2: 6, 4: 8}


def test_a_change_that_costs_next_to_nothing_costs_nothing() -> None:
    times = iter([9.0, 9.0, *[5.0, 6.0, 6.2, 6.1] * 2])
    seconds, change = in_rows({n: lambda: next(times) for n in "ab"}, 2)
    assert change == 0 and seconds == {"a": [5.0, 5.0, 6.0, 6.0], "b": [6.2, 6.2, 6.1, 6.1]}
    graphs = Graphs(0.9 * NOTHING * 5)
    assert in_rows({n: partial(graphs.step, n) for n in (1, 2, 4)}, 3)[1] == 0


def test_without_patience_only_the_first_step_has_a_row() -> None:
    graphs = Graphs(1.5)
    assert in_rows({n: partial(graphs.step, n) for n in (1, 2)}, 2, patience=-1.0) == ({1: [50.0, 5.0], 2: [50.0]}, 0.0)


@pytest.mark.parametrize("change", [-1.0, float("nan"), float("inf"), None, "x"])
def test_a_change_costs_no_less_than_nothing(change) -> None:
    with pytest.raises((ValueError, TypeError)):
        StepCost({1: 1.0}, change)


def test_where_changes_cost_sizes_are_prepared_that_were_measured() -> None:
    assert [n for n in range(1, 9) if StepCost({1: 1.0, 4: 2.0}, 0.1).prepared(n)] == [1, 4]
    assert all(StepCost({1: 1.0, 4: 2.0}).prepared(n) for n in range(1, 9))


@pytest.mark.parametrize("after", [0, N_CONTEXT])
def test_a_decode_step_takes_back_what_it_reads(toys: dict[str, Path], after: int) -> None:
    reads: list[tuple[int, int]] = []
    with contextlib.ExitStack() as stack:
        context = open_context(stack, toys["target"])

        def read(tokens, outputs) -> None:
            reads.append((len(tokens), outputs))
            context.decode(tokens, outputs)

        context.decode([1, 2, 3], 0)
        step = decode_step(context, 2, read, after)
        assert all(step() > 0 and context.n_past == after for _ in range(3))
    assert reads == ([(N_CONTEXT, 0)] if after else []) + [(2, 2)] * 3


def test_a_recurrent_cache_goes_on_until_it_is_full(toys: dict[str, Path]) -> None:
    with contextlib.ExitStack() as stack:
        context = open_context(stack, toys["target"])
        context.recurrent = True
        step = decode_step(context, 8)
        places = [(step(), context.n_past)[1] - N_CONTEXT for _ in range(6)]
    assert places == [8, 16, 24, 32, 8, 16]
