"""The planner's arithmetic against brute force: every k, every draft length, to the last position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_trim.fit.calibrate import share
from gguf_trim.format.memory_bound import mbsu
from gguf_trim.plan.matches import Matches, beaters, grid, interval, run_lengths, tau_of

V = 12


@st.composite
def cases(draw):
    """Rows of logits with many ties, the target's tokens, and a keep order."""
    n = draw(st.integers(1, 14))
    values = st.integers(-3, 3).map(float)
    logits = np.array([draw(st.lists(values, min_size=V, max_size=V)) for _ in range(n)], np.float32)
    targets = draw(st.lists(st.integers(0, V + 1), min_size=n, max_size=n))
    order = np.array(draw(st.permutations(range(V))))
    return logits, targets, order


def replayed(logits: np.ndarray, targets: list[int], order: np.ndarray, k: int) -> list[bool]:
    """Brute force: cut the head to its first k rows, ascending as the file has them, and take the argmax."""
    kept = np.sort(order[:k])
    return [int(kept[np.argmax(row[kept])]) == target for row, target in zip(logits, targets, strict=True)]


def live(right: list[bool], draft_max: int) -> tuple[int, int]:
    """Tokens and rounds of the loop, step by step."""
    i = rounds = 0
    while i < len(right):
        drafted = min(draft_max, len(right) - i - 1)
        accepted = 0
        while accepted < drafted and right[i + accepted]:
            accepted += 1
        i += accepted + 1
        rounds += 1
    return len(right), rounds


def found_in(case) -> Matches:
    logits, targets, order = case
    rank = np.argsort(order)
    intervals = [interval(target, beaters(row, target), rank) for row, target in zip(logits, targets, strict=True)]
    return Matches([np.array(intervals)], ["all"], V)


@given(cases())
def test_every_k_is_as_brute_force_says(case) -> None:
    logits, targets, order = case
    found = found_in(case)
    curve = found.curve()
    for k in range(1, V + 1):
        wanted = replayed(logits, targets, order, k)
        assert found.right(k)[0].tolist() == wanted
        assert curve[k] == sum(wanted)
        assert share(found.right(k)) == pytest.approx(sum(wanted) / len(wanted))


@given(cases(), st.integers(1, 6))
def test_tau_is_the_loops(case, draft_max: int) -> None:
    logits, targets, order = case
    for k in (1, 3, V):
        tokens, rounds = live(replayed(logits, targets, order, k), draft_max)
        assert tau_of(found_in(case).right(k), draft_max) == pytest.approx(tokens / rounds)


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_run_lengths(right: list[bool]) -> None:
    for i, length in enumerate(run_lengths(np.array(right))):
        assert all(right[i : i + length])
        assert i + length == len(right) or not right[i + length]


def test_answers_add_up() -> None:
    found = Matches([np.array([[0, 5], [3, 9]]), np.array([[1, 2]])], ["en", "de"], V)
    assert found.positions == 3
    assert share(found.right(2)[1:]) == 1.0
    assert share(Matches([], [], V).right(3)) == tau_of(Matches([], [], V).right(3), 2) == 0.0


def test_grid_ends_with_the_whole_head() -> None:
    assert grid(151936)[0] == 2048
    assert grid(151936)[-1] == 151936
    assert grid(600) == [600]
    assert {8192, 16384, 32768, 65536} <= set(grid(151936))


def test_mbsu_reproduces_the_published_ablation() -> None:
    """VocabTrim's EAGLE drafter for Llama-3.2-3B at gamma 4: 1.70, 1.95, 1.90 from its tau (DESIGN, section 6).

    c by parameters: embedding is a look-up of full size there too; fc (2 n -> n), one layer and the head are read.
    """
    n, v, intermediate, kv = 3072, 128256, 8192, 1024
    layer = 2 * n * n + 2 * n * kv + 3 * n * intermediate
    for rows, tau, published in ((v, 3.63, 1.70), (32768, 3.43, 1.95), (16384, 3.25, 1.90)):
        c = (v * n + 2 * n * n + layer + rows * n) / 3.21e9
        assert mbsu(tau, c, 4) == pytest.approx(published, abs=0.03)
