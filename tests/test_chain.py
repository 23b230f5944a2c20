"""The whole sampler chain: the same distribution as llama.cpp's own samplers', and a grammar that is never broken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llamabase.errors import EngineError
from llamabase.llama.model import Model
from llamabase.sampling import chain as samplers_module
from llamabase.sampling.chain import Chain, likeliest
from llamabase.sampling.grammar import Grammar
from llamabase.sampling.noise import Distribution, Noise
from llamabase.sampling.settings import DEFAULT, LETTERS, Sampling

from .chains import llama_cpp_chain

GRAMMARS = (
    'root ::= "the" [a-z]*',
    'root ::= [eta]+ ("ing" | "tion")?',
    r'root ::= "\"" [^"]* "\"" | [0-9]+',
    'root ::= "é" "ñ"?',
)


@pytest.fixture(scope="module")
def model(toys: dict[str, Path]) -> Iterator[Model]:
    with Model(toys["target"], vocab_only=True) as opened:
        yield opened


def same(found: Distribution, expected: dict[int, float]) -> None:
    assert found.ids.tolist() == sorted(expected)
    assert found.probs == pytest.approx([expected[i] for i in found.ids.tolist()], abs=1e-5)


samplings = st.builds(
    Sampling,
    temp=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 40]),
    typical_p=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
    top_p=st.sampled_from([0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05]),
    repeat_penalty=st.sampled_from([0.8, 1.0, 1.5]),
    repeat_last_n=st.sampled_from([-1, 0, 1, 4, 64]),
    presence_penalty=st.sampled_from([-0.5, 0.0, 1.5]),
    frequency_penalty=st.sampled_from([-0.5, 0.0, 1.5]),
    logit_bias=st.dictionaries(st.integers(0, 9), st.sampled_from([-np.inf, -2.5, 3.0]), max_size=4),
    top_n_sigma=st.sampled_from([-1.0, 0.5, 2.0]),
    xtc_probability=st.sampled_from([0.0, 0.5, 1.0]),
    xtc_threshold=st.sampled_from([0.02, 0.1, 0.6]),
    dynatemp_range=st.sampled_from([0.0, 0.0, 0.5]),
    dynatemp_exponent=st.sampled_from([1.0, 2.0]),
    dry_multiplier=st.sampled_from([0.0, 0.8, -0.5]),
    dry_base=st.sampled_from([0.5, 1.75]),
    dry_allowed_length=st.sampled_from([0, 2]),
    dry_penalty_last_n=st.sampled_from([0, 5, 64]),
    min_keep=st.sampled_from([0, 0, 3]),
    samplers=st.one_of(
        st.just(DEFAULT),
        st.permutations(DEFAULT).map(tuple),
        st.lists(st.sampled_from(DEFAULT), max_size=5).map(tuple),
    ),
)
NOISE = Noise(5)


def row(seed: int, n: int) -> np.ndarray:
    """Logits without ties: if a filter's edge falls on a tie there is no right answer."""
    return np.random.default_rng(seed).normal(0, 4, n).astype(np.float32)


@given(
    samplings, st.integers(0, 10**6), st.integers(10, 50), st.lists(st.integers(0, 9), max_size=9), st.integers(0, 9)
)
@settings(max_examples=300)
def test_chain_agrees_with_llama_cpps_own(sampling: Sampling, seed: int, n: int, tokens: list[int], split: int) -> None:
    """With earlier tokens given at the start, or accepted one by one."""
    logits = row(seed, n)
    before = logits.copy()
    chain = Chain(sampling, tokens[:split], noise=NOISE)
    for token in tokens[split:]:
        chain.accept(token)
    same(chain.distribution(logits), llama_cpp_chain(sampling, logits, tokens, noise=NOISE))
    assert (logits == before).all()  # a view of llama.cpp's own memory


@given(samplings, st.integers(0, 10**6), st.lists(st.integers(0, 9), max_size=9))
@settings(max_examples=300)
def test_rows_of_a_trimmed_head_are_biased_and_penalised_by_their_ids(
    sampling: Sampling, seed: int, tokens: list[int]
) -> None:
    """A token that the head lacks acts like a banned one, except that the dynamic temperature counts tokens."""
    logits, sampling = row(seed, 30), replace(sampling, dynatemp_range=0.0)
    ids = np.flatnonzero(np.random.default_rng(seed).random(30) < 0.7)
    if not any(sampling.logit_bias.get(i) != -np.inf for i in ids.tolist()):
        return
    masked = np.full(30, -np.inf, np.float32)
    masked[ids] = logits[ids]
    found = Chain(sampling, tokens, noise=NOISE).distribution(logits[ids], ids)
    same(found, llama_cpp_chain(sampling, masked, tokens, noise=NOISE))


@given(samplings, st.sampled_from(GRAMMARS), st.integers(0, 10**6), st.integers(0, 5))
@settings(max_examples=60)
@example(Sampling(temp=1, top_k=0, top_p=1, min_p=0), GRAMMARS[0], 0, 3)
def test_grammar_agrees_with_masking_everything(
    model: Model, sampling: Sampling, grammar: str, seed: int, length: int
) -> None:
    """Asking the grammar about the likeliest few gives the same as about every token, at every step of a text."""
    sampling = Sampling(**{**vars(sampling), "grammar": grammar})
    rng, noise = np.random.default_rng(seed), Noise(seed)
    prompt = rng.integers(0, 10, 5).tolist()
    chain, answer = Chain(sampling, prompt, model, noise), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers_module, "STEPS", (1, 8, 40))
        for step in range(length + 1):
            logits = row(seed + step, model.n_vocab)
            logits[65:] += 4 * rng.integers(0, 2)  # now and then the likeliest are allowed
            found = chain.distribution(logits)
            same(found, llama_cpp_chain(sampling, logits, prompt, answer, model, noise))
            answer.append(found.draw(noise, step))
            chain.accept(answer[-1])


def test_the_grammar_is_asked_about_few_tokens_where_few_decide(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, honest = [], Grammar.allowed
    logits = row(0, model.n_vocab)
    logits[64] = 99

    def allowed(self: Grammar, ids: np.ndarray) -> np.ndarray:
        asked.append(len(ids))
        return honest(self, ids)

    monkeypatch.setattr(Grammar, "allowed", allowed)
    for top_k, temp, expected in ((40, 0.0, [1]), (1, 1.0, [1]), (40, 1.0, [64, 600]), (0, 1.0, [600])):
        asked.clear()
        Chain(Sampling(temp, top_k, grammar="root ::= [a-z]+"), [], model).distribution(logits)
        assert len(asked) == len(expected)
        assert all(n <= found <= 1.5 * n for found, n in zip(asked, expected, strict=True))


@given(st.integers(0, 10**6), st.integers(1, 3000), st.integers(1, 300), st.booleans())
def test_the_likeliest_are_all_there(seed: int, n: int, m: int, ties: bool) -> None:
    """No score that is left out is greater than one that is returned, and at least m are returned."""
    scores = row(seed, n).round(0 if ties else 6)
    places = likeliest(scores, m)
    assert (np.diff(places) > 0).all()
    assert len(places) >= min(m, n)
    assert np.delete(scores, places).max(initial=-np.inf) <= scores[places].min()


@pytest.mark.parametrize("name", LETTERS)
def test_every_sampler_changes_the_distribution(model: Model, name: str) -> None:
    busy = Sampling(
        0.7, 20, 0.9, 0.1, 0.8, 1.3, top_n_sigma=0.5, xtc_probability=1.0, xtc_threshold=0.02, dry_multiplier=3.0
    )
    text, logits = [3, 4, 5, 3, 4], row(0, model.n_vocab)
    logits[5] = logits.max() + 1
    one = Chain(replace(busy, samplers=(name,)), text, model, NOISE).distribution(logits)
    none = Chain(replace(busy, samplers=()), text, model, NOISE).distribution(logits)
    assert len(one.ids) != len(none.ids) or not np.allclose(one.probs, none.probs)


def test_ties_are_decided_as_without_a_grammar(model: Model) -> None:
    logits = np.zeros(model.n_vocab, np.float32)
    assert Chain(Sampling(temp=0, grammar="root ::= [^é]+"), [], model).distribution(logits).ids.tolist() == [0]


def test_a_complete_grammar_allows_only_ends_and_a_token_against_it_is_refused(model: Model) -> None:
    chain = Chain(Sampling(1, 0, 1, 0, grammar='root ::= "a"'), [], model)
    letter = model.tokenize("a")[0]
    logits = row(0, model.n_vocab)
    assert chain.distribution(logits).ids.tolist() == [letter]
    with pytest.raises(ValueError, match=f"does not allow token {letter + 1}"):
        chain.accept(letter + 1)
    chain.accept(letter)
    for _ in range(2):  # also after the end
        ends = chain.distribution(logits).ids.tolist()
        assert ends == [i for i in range(model.n_vocab) if model.is_end(i)]
        chain.accept(ends[0])


def test_nothing_left_and_a_bias_of_no_token(model: Model) -> None:
    letter = model.tokenize("a")[0]
    chain = Chain(Sampling(grammar='root ::= "a"', logit_bias={letter: -np.inf}), [], model)
    with pytest.raises(EngineError, match="no token is left"):
        chain.distribution(row(0, model.n_vocab))
    with pytest.raises(EngineError, match="has no token 600"):
        Chain(Sampling(logit_bias={600: 1.0}), [], model)
