"""The acceptance rule, by law: the emitted tokens follow p, whatever q is. Each law fails when the rule is broken."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.sampling import Distribution, Sampling
from runner import acceptance
from runner.acceptance import accept

from .chains import llama_cpp_chain

V = 5


def dist(weights: list[float], ids: list[int] | None = None) -> Distribution:
    probs = np.array(weights, np.float64)
    kept = np.flatnonzero(probs)
    return Distribution(kept if ids is None else np.array(ids), probs[kept] / probs.sum())


def toy_p(seed: int, prefix: tuple[int, ...]) -> Distribution:
    """A target that depends on everything emitted so far, with some tokens at zero."""
    rng = np.random.default_rng([seed, 1, *prefix])
    weights = rng.random(V) * (rng.random(V) > 0.3)
    weights[rng.integers(V)] += 0.1
    return dist(weights.tolist())


def toy_q(seed: int, prefix: tuple[int, ...]) -> Distribution:
    """A drafter over a part S of the vocabulary that depends on the past, as a trimmed or dynamic head's does."""
    rng = np.random.default_rng([seed, 2, *prefix])
    weights = rng.random(V) * (rng.random(V) > 0.5)
    weights[rng.integers(V)] += 0.1
    return dist(weights.tolist())


def exact_law(seed: int, gamma: int, length: int) -> dict[tuple[int, ...], float]:
    """The law of the first `length` tokens the loop emits, by enumerating every draft and every coin of the rule."""
    law: dict[tuple[int, ...], float] = {}

    def rounds(prefix: tuple[int, ...], mass: float) -> None:
        if len(prefix) >= length:
            law[prefix[:length]] = law.get(prefix[:length], 0.0) + mass
            return
        step(prefix, prefix, mass, 0)

    def step(start: tuple[int, ...], prefix: tuple[int, ...], mass: float, drafted: int) -> None:
        p = toy_p(seed, prefix)
        if drafted == gamma:
            for token, chance in zip(p.ids.tolist(), p.probs, strict=True):
                rounds((*prefix, token), mass * chance)
            return
        q = toy_q(seed, prefix)
        for token, drawn in zip(q.ids.tolist(), q.probs, strict=True):
            accepted = acceptance.acceptance(p, q, token)
            if accepted > 0:
                step(start, (*prefix, token), mass * drawn * accepted, drafted + 1)
            if accepted < 1:
                rest = acceptance.residual(p, q)
                for other, chance in zip(rest.ids.tolist(), rest.probs, strict=True):
                    rounds((*prefix, other), mass * drawn * (1 - accepted) * chance)

    rounds((), 1.0)
    return law


def target_law(seed: int, length: int) -> dict[tuple[int, ...], float]:
    """The law of plain sampling from the target."""
    law = {(): 1.0}
    for _ in range(length):
        law = {
            (*prefix, token): mass * chance
            for prefix, mass in law.items()
            for p in [toy_p(seed, prefix)]
            for token, chance in zip(p.ids.tolist(), p.probs, strict=True)
        }
    return law


def law_error(seed: int, gamma: int, length: int) -> float:
    found, wanted = exact_law(seed, gamma, length), target_law(seed, length)
    return max(abs(found.get(key, 0.0) - wanted.get(key, 0.0)) for key in found.keys() | wanted.keys())


def simulate(seed: int, gamma: int, length: int, n: int) -> dict[tuple[int, ...], int]:
    """n runs of the real `accept` over the same toy models."""
    rng = np.random.default_rng(seed)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(n):
        text: tuple[int, ...] = ()
        while len(text) < length:
            drafts: list[int] = []
            qs = []
            for _ in range(gamma):
                qs.append(toy_q(seed, (*text, *drafts)))
                drafts.append(qs[-1].draw(rng))
            prefixes = [(*text, *drafts[:i]) for i in range(gamma + 1)]
            accepted, following = accept(lambda i, prefixes=prefixes: toy_p(seed, prefixes[i]), drafts, qs, rng)
            text = (*text, *drafts[:accepted], following)
        counts[text[:length]] = counts.get(text[:length], 0) + 1
    return counts


def chi_square_z(seed: int, gamma: int, length: int, n: int) -> float:
    """Chi-square of simulated against target law, as standard deviations over its mean (cells under 5 pooled)."""
    counts, law = simulate(seed, gamma, length, n), target_law(seed, length)
    if any(key not in law for key in counts):
        return np.inf  # a token the target can never emit
    cells = [(counts.get(key, 0), mass * n) for key, mass in law.items()]
    big = [(o, e) for o, e in cells if e >= 5]
    pooled = (sum(o for o, e in cells if e < 5), sum(e for _, e in cells if e < 5))
    big += [pooled] if pooled[1] > 0 else []
    value = sum((o - e) ** 2 / e for o, e in big)
    freedom = len(big) - 1
    return (value - freedom) / np.sqrt(2 * freedom)


BROKEN = {
    "always accept": ("acceptance", lambda p, q, token: 1.0),
    "accept by p alone": ("acceptance", lambda p, q, token: p.of(token)),
    "accept by q / p": ("acceptance", lambda p, q, token: min(1.0, q.of(token) / max(p.of(token), 1e-12))),
    "redraw from p": ("residual", lambda p, q: p),
    "residual not clipped": (
        "residual",
        lambda p, q: dist([abs(p.of(i) - q.of(i)) + 1e-12 for i in range(V)]),
    ),
    "residual inside S only": (
        "residual",
        lambda p, q: dist([max(0.0, p.of(i) - q.of(i)) * (q.of(i) > 0) + 1e-12 for i in range(V)]),
    ),
}


@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_emitted_law_is_the_targets_exactly(gamma: int) -> None:
    assert max(law_error(seed, gamma, 3) for seed in range(4)) < 1e-12


def test_emitted_law_by_chi_square() -> None:
    assert max(abs(chi_square_z(seed, 2, 3, 4000)) for seed in range(3)) < 5


@pytest.mark.parametrize("name", BROKEN)
def test_both_laws_fail_when_the_rule_is_broken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, *BROKEN[name])
    assert max(law_error(seed, 2, 3) for seed in range(4)) > 1e-3
    assert max(chi_square_z(seed, 2, 3, 4000) for seed in range(3)) > 10


def test_greedy_is_the_same_rule_with_point_masses() -> None:
    """Accepted iff the draft is the argmax; the replacement is the argmax; no random number is drawn."""

    class NoRandom:
        def random(self) -> float:
            raise AssertionError("greedy decoding drew a random number")

    greedy = Sampling(temp=0)
    rows = np.eye(V)[[3, 1, 4]]
    for drafts in itertools.product(range(V), repeat=2):
        qs = [dist([1.0 if i == token else 0.0 for i in range(V)]) for token in drafts]
        accepted, following = accept(lambda i: greedy.distribution(rows[i]), drafts, qs, NoRandom())
        expected = 0 if drafts[0] != 3 else 1 if drafts[1] != 1 else 2
        assert (accepted, following) == (expected, [3, 1, 4][expected])


logits_rows = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=60).map(lambda x: np.array(x, np.float32))
settings_of = st.builds(
    Sampling,
    temp=st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.0]),
    top_k=st.integers(0, 70),
    top_p=st.sampled_from([0.1, 0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
)


@given(logits_rows, settings_of)
def test_distribution_is_one_and_keeps_the_best(logits: np.ndarray, chosen: Sampling) -> None:
    found = chosen.distribution(logits)
    assert abs(found.probs.sum() - 1) < 1e-9
    assert (found.probs >= 0).all()
    assert (np.diff(found.ids) > 0).all()
    assert logits[found.ids].max() == logits.max()


@given(logits_rows, settings_of)
def test_remapped_rows_are_the_same_distribution(logits: np.ndarray, chosen: Sampling) -> None:
    ids = np.arange(len(logits)) * 7 + 3
    plain, mapped = chosen.distribution(logits), chosen.distribution(logits, ids)
    assert (mapped.ids == ids[plain.ids]).all()
    assert (mapped.probs == plain.probs).all()


@given(logits_rows, st.integers(1, 70), st.sampled_from([0.3, 0.9, 1.0]), st.sampled_from([0.0, 0.1]))
@settings(max_examples=60)
def test_filters_agree_with_llama_cpps_own_chain(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> None:
    """The same logits through llama.cpp's samplers leave the same tokens with the same probabilities."""
    logits = np.unique(logits)  # equal logits at a filter's edge have no right answer
    sampling = Sampling(0.7, top_k, top_p, min_p)
    expected, found = llama_cpp_chain(sampling, logits), sampling.distribution(logits)
    assert found.ids.tolist() == sorted(expected)
    assert found.probs == pytest.approx([expected[i] for i in found.ids.tolist()], abs=1e-5)


def test_draw_follows_the_probabilities() -> None:
    found = dist([0.5, 0.0, 0.3, 0.2])
    rng = np.random.default_rng(0)
    counts = np.bincount([found.draw(rng) for _ in range(20000)], minlength=4)
    assert counts[1] == 0
    assert np.abs(counts / 20000 - [0.5, 0, 0.3, 0.2]).max() < 0.015
