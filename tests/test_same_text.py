"""Sampled text is the same however it is drafted, and follows the target's distribution; real llama.cpp, F32 toys."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from llamabase.sampling.chain import Chain
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import Sampling
from runner.draft.contracts import NoDrafter, Round
from runner.draft.drafters import ModelDrafter
from runner.draft.lookup import Lookup, LookupDrafter
from runner.loop import speculative
from runner.loop.engine import Engine

from .chains import llama_cpp_chain

PROMPT = "tea and tea and the sea and tea and the"  # whose repetitions lookup can draft
N = 30
SCHEMA = {
    "type": "array", "minItems": 20, "items": {"type": "string", "pattern": "^[a-z]{2,4}[0-9]$"},
    "x-guidance": {"whitespace_flexible": False},
}  # fmt: skip
SAMPLINGS = {
    "all ids": Sampling(temp=1.2, top_k=0, top_p=1, min_p=0),
    "filters": Sampling(temp=1.2, top_k=20, top_p=0.9, min_p=0.02, typical_p=0.95),
    "penalties": Sampling(
        temp=0.8,
        repeat_penalty=1.3,
        frequency_penalty=0.7,
        presence_penalty=-1.0,
        repeat_last_n=9,
        logit_bias={32: 2.0},
    ),
    "grammar": Sampling(temp=1.5, top_k=8, grammar="root ::= ([a-z]+ [ ,.] [0-9])+"),
    "schema": Sampling(temp=1.5, top_k=8, guide=json.dumps({"grammars": [{"json_schema": SCHEMA}]})),
    "XTC and dynamic temperature": Sampling(
        temp=1.0, dynatemp_range=0.8, dynatemp_exponent=1.5, xtc_probability=0.5, xtc_threshold=0.05, top_n_sigma=3.0
    ),
    "DRY": Sampling(temp=0.7, dry_multiplier=1.5, dry_allowed_length=1, dry_penalty_last_n=32),
    "another order": Sampling(  # infill ends a text if no token is likely: not so warm
        0.6, 30, repeat_penalty=1.2, samplers=("temperature", "min_p", "top_k", "penalties", "infill")
    ),
}
DRAFTERS = ("target", "good-trimmed", "wrong", "wrong-trimmed", "tiny-trimmed", "spec-trimmed")
SEEDS = (3, 4)


def rounds_of(engine: Engine, sampling: Sampling, n: int = N, **settings: object) -> list[Round]:
    return list(engine.rounds(engine.model.tokenize(PROMPT), sampling, max_tokens=n, **settings))


def text_of(engine: Engine, sampling: Sampling, n: int = N, **settings: object) -> list[int]:
    return [token for round_ in rounds_of(engine, sampling, n, **settings) for token in round_.tokens]


@pytest.fixture(scope="module")
def plain(engines) -> Callable[[str, int], list[int]]:
    """The text without any drafter."""
    texts: dict[tuple[str, int], list[int]] = {}

    def get(kind: str, seed: int) -> list[int]:
        if (kind, seed) not in texts:
            texts[kind, seed] = text_of(engines(None), SAMPLINGS[kind], draft_max=0, seed=seed)
            assert len(set(texts[kind, seed])) > 8  # a text of one token would prove little
        return texts[kind, seed]

    return get


class Moody(NoDrafter):
    """Drafts at random in each round: a model's, the text's own suggestions, anything, or nothing; any number."""

    def __init__(self, drafter: ModelDrafter, seed: int) -> None:
        self._drafter, self._lookup, self._rng = drafter, Lookup(), np.random.default_rng(seed)

    def draft(self, text, n, sampling, noise) -> list[int]:
        n = min(n, int(self._rng.integers(0, 12)))
        self._lookup.follow(text)
        kind = self._rng.integers(4)
        if kind < 2:
            return self._drafter.draft(text, n, sampling, noise)
        guess = [proposal.token for proposal in self._lookup.guess(n)]
        return guess if kind == 2 else self._rng.integers(0, 600, n).tolist()

    def settle(self) -> None:
        self._drafter.settle()


@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("name", DRAFTERS)
def test_text_is_the_plain_one_whatever_the_drafter(engines, plain, eager, name: str, kind: str) -> None:
    """Whatever its vocabulary and the draft length, also if a clock or chance decides the length."""
    engine, sampling = engines(name), SAMPLINGS[kind]
    engine.measure()
    for seed in SEEDS:
        for draft_max in (1, 3, 8, None):
            rounds = rounds_of(engine, sampling, draft_max=draft_max, seed=seed)
            assert [token for round_ in rounds for token in round_.tokens] == plain(kind, seed), draft_max
            assert any(round_.drafted for round_ in rounds)
        for mood in range(2):
            moody = Moody(engine.drafter, mood)
            assert text_of(engine, sampling, draft_max=12, seed=seed, drafter=moody) == plain(kind, seed)
    assert plain(kind, SEEDS[0]) != plain(kind, SEEDS[1])


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_text_is_the_plain_one_with_the_texts_own_suggestions(engines, plain, eager, kind: str) -> None:
    engine, drafted = engines(None), 0
    engine.measure()
    for seed in SEEDS:
        for settings in ({"draft_max": 3, "drafter": LookupDrafter()}, {"draft_max": None}):
            rounds = rounds_of(engine, SAMPLINGS[kind], seed=seed, **settings)
            assert [token for round_ in rounds for token in round_.tokens] == plain(kind, seed)
            drafted += sum(len(round_.drafted) for round_ in rounds)
    assert drafted > 0


@pytest.mark.parametrize("kind", ["all ids", "filters", "penalties"])
def test_drafts_are_accepted_where_laws_agree(engines, kind: str) -> None:
    """All if q is p, some of good drafts, hardly any of wrong ones. (Only p knows the grammar.)"""
    rates = {}
    for name in ("target", "good-trimmed", "wrong"):
        rounds = [r for seed in range(6) for r in rounds_of(engines(name), SAMPLINGS[kind], draft_max=3, seed=seed)]
        rates[name] = sum(r.accepted for r in rounds) / sum(len(r.drafted) for r in rounds)
    assert rates["target"] == 1
    assert rates["wrong"] < 0.05 < 0.3 < rates["good-trimmed"] < 1


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_goes_on_as_it_would_have(engines, plain, kind: str) -> None:
    """The same seed again after stopping in the middle, drafting by cost; without a grammar also from there on."""
    engine, sampling = engines("good-trimmed"), SAMPLINGS[kind]
    engine.measure()
    prompt = engine.model.tokenize(PROMPT)
    stopped = engine.rounds(prompt, sampling, max_tokens=N, seed=5)
    next(stopped)
    stopped.close()
    assert text_of(engine, sampling, seed=SEEDS[0]) == plain(kind, SEEDS[0])
    if not sampling.grammar and not sampling.guide:
        rest = engine.rounds(
            [*prompt, *plain(kind, SEEDS[0])[:7]], sampling, max_tokens=N - 7, draft_max=3, seed=SEEDS[0]
        )
        assert [token for round_ in rest for token in round_.tokens] == plain(kind, SEEDS[0])[7:]


def accept_all(p_at, drafts, noise, position):
    for i in range(len(drafts)):
        p_at(i)
    return len(drafts), p_at(len(drafts)).draw(noise, position + len(drafts))


def draw_anew(p_at, drafts, noise, position):
    for i, token in enumerate(drafts):
        p = p_at(i)
        if p.draw(noise, position + i) != token:
            return i, p.draw(Noise(77), position + i)
    return len(drafts), p_at(len(drafts)).draw(noise, position + len(drafts))


def draw_with_the_first_rows(p_at, drafts, noise, position):
    for i, token in enumerate(drafts):
        if (own := p_at(i).draw(noise, position)) != token:
            return i, own
    return len(drafts), p_at(len(drafts)).draw(noise, position)


def mix_rows_up(logits, chain, drafts, i):
    return P_AT(logits[::-1], chain, drafts, i)


def tell_the_chain_of_every_draft(logits, chain, drafts, i):
    for token in drafts if i == 0 else ():
        chain.accept(token)
    return chain.distribution(logits[i])


def tell_the_chain_of_none(logits, chain, drafts, i):
    return chain.distribution(logits[i])


def forget_the_grammar_on_the_bonus_token(logits, chain, drafts, i):
    p = P_AT(logits, chain, drafts, i)
    return Chain(replace(chain._sampling, grammar=""), ()).distribution(logits[i]) if i == len(drafts) else p


P_AT, EXPONENTIALS, UNIFORM = speculative._p_at, Noise.exponentials, Noise.uniform
ACCEPT = (accept_all, draw_anew, draw_with_the_first_rows)
STATE = (tell_the_chain_of_every_draft, tell_the_chain_of_none)


class HalfRight(NoDrafter):
    """Drafts a text that it knows, except every fourth token."""

    def __init__(self, engine: Engine, answer: list[int]) -> None:
        self._start, self._answer = len(engine.model.tokenize(PROMPT)), answer

    def draft(self, text, n, sampling, noise) -> list[int]:
        first = len(text) - self._start
        return [token if i % 4 else 0 for i, token in enumerate(self._answer[first : first + n], first)]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        *((fault, "all ids") for fault in (*ACCEPT, mix_rows_up)),
        *((fault, kind) for fault in STATE for kind in ("penalties", "grammar", "schema")),
        (forget_the_grammar_on_the_bonus_token, "grammar"),
        *((fault, "DRY") for fault in STATE),
        (tell_the_chain_of_none, "XTC and dynamic temperature"),  # whose coin is the position's
    ],
)
def test_a_fault_of_the_loop_changes_the_text(engines, plain, fault, kind: str, monkeypatch) -> None:
    monkeypatch.setattr(speculative, "accept" if fault in ACCEPT else "_p_at", fault)
    try:
        engine, wanted = engines(None), plain(kind, SEEDS[0])
        found = text_of(engine, SAMPLINGS[kind], draft_max=3, seed=1, drafter=HalfRight(engine, wanted))
    except ValueError as error:  # what breaks a grammar is refused before llama.cpp sees it
        assert "does not allow" in str(error)
    else:
        assert found != wanted


# Few tokens, all of them likely. The bias repeats the same ones; with negative penalties the tokens of the same round
# matter.
LAWS = {
    "bias": Sampling(temp=3.0, top_k=4, top_p=1, min_p=0, logit_bias=dict.fromkeys(range(65, 70), 60.0)),
    "penalties": Sampling(
        temp=3.0, top_k=3, top_p=1, min_p=0, repeat_penalty=1.3, presence_penalty=-9.0, frequency_penalty=-2.0,
        repeat_last_n=3, logit_bias={32: 2.0},
    ),
    "grammar": Sampling(temp=3.0, top_k=3, top_p=1, min_p=0, grammar="root ::= [a-e] [0-9] [a-c] [f-z]*"),
    "XTC": Sampling(temp=3.0, top_k=4, top_p=1, min_p=0, xtc_probability=0.4, xtc_threshold=0.1),
    "DRY": Sampling(temp=3.0, top_k=3, top_p=1, min_p=0, dry_multiplier=2.0, dry_allowed_length=1),
    "filters": Sampling(
        temp=2.0, top_k=6, typical_p=0.9, top_p=0.9, min_p=0.05, top_n_sigma=2.5, dynatemp_range=1.5, min_keep=2
    ),
    "another order": Sampling(
        temp=2.5, top_k=3, repeat_penalty=0.7, samplers=("temperature", "top_k", "penalties", "infill")
    ),
}  # fmt: skip
LENGTH = 3


def wanted_law(engine: Engine, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """The distribution of the target alone under llama.cpp's own samplers."""
    prompt, law = engine.model.tokenize(PROMPT), {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for said, mass in law.items():
            engine.reader.keep([], 0)
            logits = engine.reader.read([*prompt, *said], 1)[0].copy()
            # At every position a coin of its own decides whether XTC acts.
            for acts, share in ((1.0, sampling.xtc_probability), (0.0, 1 - sampling.xtc_probability)):
                one = replace(sampling, xtc_probability=acts)
                for token, chance in llama_cpp_chain(one, logits, prompt, said, engine.model).items():
                    longer[(*said, token)] = longer.get((*said, token), 0.0) + mass * chance * share
        law = longer
    return law


def law_error(engine: Engine, sampling: Sampling, n: int = 800, **settings: object) -> float:
    """Chi-square of the first tokens over seeds, in standard deviations above its mean; inf if one cannot occur."""
    wanted = wanted_law(engine, sampling)
    counts = dict.fromkeys(wanted, 0)
    for seed in range(n):
        found = tuple(text_of(engine, sampling, LENGTH, seed=seed, draft_max=2, **settings))
        if found not in counts:
            return float("inf")
        counts[found] += 1
    wanted = {key: mass for key, mass in wanted.items() if mass}
    cells = np.array([(counts[key], n * mass) for key, mass in wanted.items()])
    rare = cells[:, 1] < 5
    cells = np.append(cells[~rare], [cells[rare].sum(axis=0)] if rare.any() else np.empty((0, 2)), axis=0)
    freedom = len(cells) - 1
    return float((((cells[:, 0] - cells[:, 1]) ** 2 / cells[:, 1]).sum() - freedom) / np.sqrt(2 * freedom))


class Likely(NoDrafter):
    """Drafts the likeliest answer whatever the text and the noise are: often right."""

    def __init__(self, engine: Engine, sampling: Sampling) -> None:
        wanted = wanted_law(engine, sampling)
        self._start, self._likely = len(engine.model.tokenize(PROMPT)), max(wanted, key=wanted.__getitem__)

    def draft(self, text, n, sampling, noise) -> list[int]:
        return list(self._likely[len(text) - self._start :][:n])


OTHERS = ("lookup", "wrong", "spec-trimmed")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("likely", kind) for kind in LAWS),
        *((name, "bias") for name in OTHERS),  # the text is the same, as the first test above says
        *(pytest.param(name, kind, marks=pytest.mark.slow) for name in OTHERS for kind in LAWS if kind != "bias"),
    ],
)
def test_what_is_emitted_follows_llama_cpps_law(engines, name: str, kind: str) -> None:
    engine, sampling = engines(None if name in ("likely", "lookup") else name), LAWS[kind]
    own = {"likely": Likely(engine, sampling), "lookup": LookupDrafter()}
    assert abs(law_error(engine, sampling, drafter=own.get(name))) < 5


def draw_the_same_at_every_position(self, position, ids):
    return EXPONENTIALS(self, 0, ids)


def toss_one_coin(self, position):
    return UNIFORM(self, 0)


@pytest.mark.parametrize(
    ("fault", "kind", "name"),
    [
        *((fault, "bias", "likely") for fault in (accept_all, draw_anew, mix_rows_up)),
        *((fault, "bias", "target") for fault in (draw_with_the_first_rows, draw_the_same_at_every_position)),
        *((fault, "penalties", "likely") for fault in STATE),
        (toss_one_coin, "XTC", "likely"),
    ],
)
def test_the_law_fails_with_a_fault(engines, fault, kind: str, name: str, monkeypatch) -> None:
    engine, sampling = engines(None if name == "likely" else name), LAWS[kind]
    drafter = Likely(engine, sampling) if name == "likely" else None
    if fault is draw_the_same_at_every_position:
        monkeypatch.setattr(Noise, "exponentials", fault)
    elif fault is toss_one_coin:
        monkeypatch.setattr(Noise, "uniform", fault)
    else:
        monkeypatch.setattr(speculative, "accept" if fault in ACCEPT else "_p_at", fault)
    assert law_error(engine, sampling, drafter=drafter) > 10
