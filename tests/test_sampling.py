"""The filters are llama.cpp's, and the acceptance rule emits the target's own draws whatever was drafted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamabase.sampling.chain import Chain
from llamabase.sampling.noise import Distribution, Noise
from llamabase.sampling.settings import Sampling
from runner.loop.acceptance import accept

from .chains import llama_cpp_chain

V = 5


def law(seed: int, prefix: tuple[int, ...]) -> Distribution:
    """A target that depends on everything emitted so far, with some tokens left out."""
    rng = np.random.default_rng([seed, *prefix])
    ids = np.flatnonzero(np.append(rng.random(V - 1) > 0.3, True))
    weights = rng.random(len(ids))
    return Distribution(ids, weights / weights.sum())


@given(st.integers(0, 2**32), st.lists(st.lists(st.integers(0, V - 1), max_size=4), min_size=1, max_size=8))
def test_what_is_emitted_are_the_targets_own_draws(seed: int, rounds: list[list[int]]) -> None:
    """Whatever was drafted in each round; no row after the first rejection is asked for, and each at most once."""
    noise, text = Noise(seed), ()
    for drafts in rounds:
        asked: list[int] = []

        def p_at(i: int, text=text, drafts=drafts, asked=asked) -> Distribution:
            asked.append(i)
            return law(seed, (*text, *drafts[:i]))

        accepted, following = accept(p_at, drafts, noise, len(text))
        assert asked == list(range(accepted + 1))
        assert accepted == len(drafts) or drafts[accepted] != following
        text = (*text, *drafts[:accepted], following)
    assert all(law(seed, text[:i]).draw(noise, i) == token for i, token in enumerate(text))


def test_greedy_draws_nothing() -> None:
    """Accepted iff the draft is the argmax, replaced by the argmax; noise is not even asked for."""
    rows = np.eye(V)[[3, 1, 4]]
    for drafts, expected in (([0, 1], (0, 3)), ([3, 0], (1, 1)), ([3, 1], (2, 4))):
        assert accept(lambda i: Chain(Sampling(temp=0), ()).distribution(rows[i]), drafts, None, 0) == expected  # type: ignore[arg-type]


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
    found = Chain(chosen, ()).distribution(logits)
    assert abs(found.probs.sum() - 1) < 1e-9
    assert (found.probs >= 0).all()
    assert (np.diff(found.ids) > 0).all()
    assert logits[found.ids].max() == logits.max()


@given(logits_rows, settings_of)
def test_remapped_rows_are_the_same_distribution(logits: np.ndarray, chosen: Sampling) -> None:
    ids = np.arange(len(logits)) * 7 + 3
    plain, mapped = Chain(chosen, ()).distribution(logits), Chain(chosen, ()).distribution(logits, ids)
    assert (mapped.ids == ids[plain.ids]).all()
    assert (mapped.probs == plain.probs).all()


@given(logits_rows, st.integers(1, 70), st.sampled_from([0.3, 0.9, 1.0]), st.sampled_from([0.0, 0.1]))
@settings(max_examples=60)
def test_filters_agree_with_llama_cpps_own_chain(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> None:
    """The same logits through llama.cpp's samplers leave the same tokens with the same probabilities."""
    logits = np.unique(logits)  # equal logits at a filter's edge have no right answer
    sampling = Sampling(0.7, top_k, top_p, min_p)
    expected, found = llama_cpp_chain(sampling, logits), Chain(sampling, ()).distribution(logits)
    assert found.ids.tolist() == sorted(expected)
    assert found.probs == pytest.approx([expected[i] for i in found.ids.tolist()], abs=1e-5)
