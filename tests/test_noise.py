"""Shared noise: its numbers are exponential and independent, draws follow p, and `agreement` is how often two agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamabase.sampling import noise as noise_module
from llamabase.sampling.noise import Distribution, Noise

MASK = 2**64 - 1
N = 20_000
IDS = np.arange(N)


def dist(weights: np.ndarray, ids: np.ndarray | None = None) -> Distribution:
    weights = np.asarray(weights, np.float64)
    return Distribution(np.arange(len(weights)) if ids is None else np.asarray(ids), weights / weights.sum())


def z(counts: np.ndarray, expected: np.ndarray) -> float:
    """Chi-square as standard deviations over its mean."""
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def flat(uniform: np.ndarray, bins: int) -> float:
    return z(np.bincount((uniform * bins).astype(int), minlength=bins), np.full(bins, len(uniform) / bins))


def series() -> dict[str, np.ndarray]:
    """Uniforms of many seeds, of many positions and of many ids, with the other two fixed."""
    return {
        "seeds": np.exp(-np.array([Noise(seed).exponentials(9, IDS[5:6])[0] for seed in range(N // 4)])),
        "positions": np.exp(-np.array([Noise(1).exponentials(at, IDS[5:6])[0] for at in range(N // 4)])),
        "ids": np.exp(-Noise(1).exponentials(9, IDS)),
    }


def pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Uniforms of neighbours, in every direction."""

    def row(seed: int, position: int, first: int = 0) -> np.ndarray:
        return np.exp(-Noise(seed).exponentials(position, IDS + first))

    here = row(1, 9)
    return {
        "next id": (here, row(1, 9, 1)),
        "next position": (here, row(1, 10)),
        "next seed": (here, row(2, 9)),
        "next position, id before": (here[1:], row(1, 10)[:-1]),
        "next position, next id": (here, row(1, 10, 1)),
        "next seed, position before": (here, row(2, 8)),
        "position 256 on": (here, row(1, 265)),
    }


def worst_series() -> float:
    return max(abs(flat(found, 64)) for found in series().values())


def worst_pair() -> float:
    """A joint histogram of 16 by 16 and the correlation, of every pair."""
    worst = 0.0
    for one, other in pairs().values():
        joint = flat(((one * 16).astype(int) * 16 + (other * 16).astype(int) + 0.5) / 256, 256)
        worst = max(worst, abs(joint), abs(np.corrcoef(one, other)[0, 1]) * np.sqrt(len(one)))
    return worst


def test_numbers_are_uniform_and_neighbours_independent() -> None:
    assert worst_series() < 5
    assert worst_pair() < 5


HONEST = Noise.exponentials
FAULTS = {
    "the same at every position": lambda self, position, ids: HONEST(self, 0, ids),
    "the same for pairs of ids": lambda self, position, ids: HONEST(self, position, ids // 2),
    "the next position's moved by one": lambda self, position, ids: HONEST(self, 0, ids + position),
    "the same for every seed": lambda self, position, ids: HONEST(Noise(0), position, ids),
}


@pytest.mark.parametrize("name", FAULTS)
def test_dependent_numbers_are_seen(name: str, monkeypatch) -> None:
    monkeypatch.setattr(Noise, "exponentials", FAULTS[name])
    assert worst_pair() > 20


def test_numbers_that_are_not_mixed_are_seen(monkeypatch) -> None:
    monkeypatch.setattr(noise_module, "_mixed", lambda bits: bits)
    assert worst_series() > 20
    assert worst_pair() > 20


def mixed(bits: int) -> int:
    bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) & MASK
    return bits ^ bits >> 31


@given(st.integers(0, 2**70), st.integers(0, 10**6), st.lists(st.integers(0, 2**18), min_size=1, max_size=9))
def test_a_number_is_a_function_of_seed_position_and_id(seed: int, position: int, ids: list[int]) -> None:
    """And of nothing else, such as other ids or earlier draws. Computed again with Python's integers."""
    found = Noise(seed).exponentials(position, np.array(ids))
    key, step = int(Noise(seed)._key[0]), 0x9E3779B97F4A7C15
    first, second = (mixed((key + (2 * position + i) * step) & MASK) for i in range(2))
    for token, value in zip(ids, found, strict=True):
        bits = mixed(((first + token * step) & MASK) ^ second)
        assert value == pytest.approx(-np.log(((bits >> 12) + 0.5) / 2**52), rel=1e-15)


@pytest.mark.parametrize("bits", [0, MASK])
def test_every_number_is_above_zero_and_finite(bits: int, monkeypatch) -> None:
    monkeypatch.setattr(noise_module, "_mixed", lambda x: np.full(len(x), bits, np.uint64))
    assert 0 < Noise(1).exponentials(3, IDS[:1])[0] < 40


def test_without_a_seed_every_noise_is_another() -> None:
    assert Noise().exponentials(0, IDS[:1]) != Noise().exponentials(0, IDS[:1])
    assert Noise([1, 2]).exponentials(0, IDS[:1]) != Noise([1, 3]).exponentials(0, IDS[:1])


LAW = np.array([0.4, 0.0, 0.25, 0.2, 0.1, 0.04, 0.0099, 0.0001])


@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_draws_follow_p(over: str) -> None:
    p, n = dist(LAW, [3, 7, 8, 50, 51, 151_000, 151_001, 151_935]), 15_000
    if over == "seeds":
        drawn = [p.draw(Noise(seed), 12) for seed in range(n)]
    else:
        drawn = [p.draw(Noise(1), position) for position in range(n)]
    counts = np.array([drawn.count(token) for token in p.ids.tolist()])
    assert counts[1] == 0
    assert counts.sum() == n
    assert abs(z(np.delete(counts, 1), np.delete(LAW, 1) * n)) < 5


weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1.0)), min_size=1, max_size=12).filter(any)


@given(weights, st.integers(0, 2**32), st.integers(0, 10**5))
def test_a_draw_is_the_argmax_of_log_p_and_gumbel_noise(values: list[float], seed: int, position: int) -> None:
    p = dist(np.array(values))
    with np.errstate(divide="ignore"):
        scores = np.log(p.probs) - np.log(Noise(seed).exponentials(position, p.ids))
    assert p.draw(Noise(seed), position) == int(np.argmax(scores))


def agreement_by_hand(p: Distribution, q: Distribution) -> float:
    """The formula, term by term."""
    ids = np.union1d(p.ids, q.ids).tolist()
    common = [x for x in ids if p.of(x) > 0 and q.of(x) > 0]
    return sum(1 / sum(max(p.of(y) / p.of(x), q.of(y) / q.of(x)) for y in ids) for x in common)


@given(weights, weights, st.integers(0, 6))
def test_agreement_is_the_formula(a: list[float], b: list[float], moved: int) -> None:
    """For overlapping ids, zeros and ties; it is symmetric, and lies within the known bounds."""
    p, q = dist(np.array(a)), dist(np.array(b), np.arange(len(b)) + moved)
    found = p.agreement(q)
    assert found == pytest.approx(agreement_by_hand(p, q), rel=1e-9, abs=1e-12)
    assert found == pytest.approx(q.agreement(p), rel=1e-9, abs=1e-12)
    overlap = sum(min(p.of(x), q.of(x)) for x in p.ids.tolist())
    assert overlap / (2 - overlap) - 1e-9 <= found <= overlap + 1e-9
    assert p.agreement(p) == pytest.approx(1)


@given(st.integers(0, 2**32), st.integers(2, 12), st.sampled_from([0.2, 1.0, 5.0]))
@settings(max_examples=12)
def test_agreement_is_how_often_two_draws_are_the_same(seed: int, n: int, spread: float) -> None:
    rng, noise, times = np.random.default_rng(seed), Noise(seed), 4000
    p, q = (dist(np.exp(spread * rng.standard_normal(n)), np.sort(rng.choice(15, n, False))) for _ in range(2))
    same = sum(p.draw(noise, position) == q.draw(noise, position) for position in range(times))
    expected = p.agreement(q)
    assert abs(same - times * expected) < 5.5 * np.sqrt(times * expected * (1 - expected)) + 2


def test_agreement_of_laws_over_a_whole_vocabulary() -> None:
    """Half the ids are twice as likely under p, the other half under q: each term is 1 / 228,000, the sum 2/3."""
    twice = np.where(np.arange(152_000) % 2, 1.0, 2.0)
    assert dist(twice).agreement(dist(3 - twice)) == pytest.approx(2 / 3)
