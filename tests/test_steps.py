"""What measured steps mean: from which acceptance per draft drafting pays, and what it then brings."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.bench.steps import (
    ACCEPTANCES,
    BATCHES,
    DRAFT_LENGTHS,
    PARTS,
    best_speed,
    least_acceptance,
    paying,
    paying_table,
)

seconds = st.floats(1e-3, 10)
verifies = st.fixed_dictionaries({1: seconds, 2: seconds}, optional=dict.fromkeys(BATCHES[2:], seconds))
FLAT = dict.fromkeys(BATCHES, 1.0)  # memory is the limit: a batch takes what one token takes


@given(seconds, verifies)
def test_at_the_least_acceptance_drafting_begins_to_pay(draft: float, verify: dict[int, float]) -> None:
    least = least_acceptance(draft, verify)
    if least is None:
        assert best_speed(1.0, draft, verify)[0] <= 1
        return
    x = best_speed(least, draft, verify)[0]
    assert x > 1
    if least > 0:  # with no draft right it may pay by more, where a batch of two takes less than one token
        assert best_speed(least - 1 / PARTS, draft, verify)[0] <= 1
        steepest = sum(DRAFT_LENGTHS) * verify[1] / min(verify[n] for n in verify if n > 1)
        assert x == pytest.approx(1, abs=steepest / PARTS)


@given(seconds, verifies, st.lists(st.floats(0, 1), min_size=2))
def test_speed_rises_with_acceptance_and_falls_with_what_a_draft_costs(
    draft: float, verify: dict[int, float], acceptances: list[float]
) -> None:
    for low, high in pairwise(sorted(acceptances)):
        assert best_speed(low, draft, verify)[0] <= best_speed(high, draft, verify)[0] * (1 + 1e-12)
        assert best_speed(high, 2 * draft, verify)[0] < best_speed(high, draft, verify)[0]


@given(st.floats(0, 0.99), seconds, verifies)
def test_no_draft_length_that_was_timed_brings_more(a: float, draft: float, verify: dict[int, float]) -> None:
    speeds = {
        m: (1 - a ** (m + 1)) / (1 - a) / (verify[m + 1] + m * draft) * verify[1]
        for m in DRAFT_LENGTHS
        if m + 1 in verify
    }
    x, m = best_speed(a, draft, verify)
    assert x == pytest.approx(speeds[m])
    assert x == pytest.approx(max(speeds.values()))


def test_by_hand() -> None:
    """A drafter of a quarter of the target's step pays from a quarter, and where all stand in the longest drafts."""
    assert least_acceptance(0.25, FLAT) == pytest.approx(0.25, abs=2 / PARTS)
    assert best_speed(1.0, 0.25, FLAT) == (pytest.approx(8 / 2.75), 7)  # nine at once are not timed
    assert best_speed(0.6, 0.25, {n: FLAT[n] for n in (1, 2)}) == (pytest.approx(1.6 / 1.25), 1)
    assert least_acceptance(0.25, {n: float(n) for n in BATCHES}) is None  # computing is the limit


def _record(verify: dict[int, float]) -> dict:
    drafts = {"full": 0.5, "trim@131072": 0.25}
    steps = {name: ("full", [step / 2, step, 9.0]) for name, step in drafts.items()}
    steps["head full"] = "head full", [0.1]
    steps |= {f"verify {n}": ("verify 1", [found]) for n, found in verify.items()}
    return {
        "seconds": {name: found for name, (_, found) in steps.items()},
        "base": {name: base for name, (base, _) in steps.items()},
    }


def test_every_drafter_has_its_line() -> None:
    """By median steps; the head alone and batches draft nothing."""
    record = _record(FLAT)
    found = paying(record)
    assert found.keys() == {"full", "trim@131072"}
    assert found["full"]["from"]["acceptance"] == pytest.approx(0.5, abs=2 / PARTS)
    assert found["trim@131072"]["from"] == {
        "acceptance": pytest.approx(0.25, abs=2 / PARTS),
        "speedup_over_plain": pytest.approx(1, abs=1e-5),
        "draft_max": 1,
    }
    assert [point["acceptance"] for point in found["full"]["at"]] == list(ACCEPTANCES)
    lines = paying_table(record).splitlines()
    assert max(map(len, lines)) <= 100
    cells = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    assert cells == ["trim@131072", "0.250 (1)", "1.31 (2)", "1.46 (2)", "1.69 (3)"]


def test_where_nothing_pays_there_is_a_dash() -> None:
    record = _record({n: float(n) for n in BATCHES})
    assert [point["from"] for point in paying(record).values()] == [None, None]
    assert [line.split("|")[2].strip() for line in paying_table(record).splitlines()[-2:]] == ["-", "-"]
