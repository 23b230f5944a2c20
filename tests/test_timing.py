"""The clock: turns, what warms up, and a decode step that leaves the cache as it was."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from llamabase.llama.timing import N_CONTEXT, by_turns, decode_step, medians, open_context, timed


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
