"""The loop with penalties and grammars on real llama.cpp: the law of what it emits, exactly, and greedy texts.

The law is no estimate: every draft, every coin of the acceptance rule and every draw is gone through, each run of the
whole loop being one leaf with its probability.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from corpus.grammar import schema_grammar
from corpus.sampling import Distribution, Sampling
from runner import acceptance, speculative
from runner.drafter import Draft, NoDrafter
from runner.engine import Engine
from runner.exact import plain_greedy

from .chains import llama_cpp_chain
from .test_chain import obeys

PROMPT = "the king and the sea"
# Negative penalties draw repetitions in, so that a token said in the same round changes what follows it.
PENALTIES = Sampling(
    temp=3.0,
    top_k=3,
    top_p=1,
    min_p=0,
    repeat_penalty=1.3,
    presence_penalty=-9.0,
    frequency_penalty=-2.0,
    repeat_last_n=3,
    logit_bias={32: 2.0},
)
GRAMMAR = Sampling(temp=3.0, top_k=3, top_p=1, min_p=0, grammar="root ::= [a-e] [0-9] [a-c] [f-z]*")
LENGTH = 3


@pytest.fixture(scope="module")
def engines(toys: dict[str, Path]) -> Iterator[Callable[[str | None], Engine]]:
    opened: dict[str | None, Engine] = {}

    def get(name: str | None) -> Engine:
        if name not in opened:
            opened[name] = Engine(toys["target"], toys[name] if name else None, n_ctx=256)
        return opened[name]

    yield get
    for engine in opened.values():
        engine.close()


def tokens_of(engine: Engine, prompt: list[int], sampling: Sampling, n: int, **options: object) -> list[int]:
    rounds = engine.rounds(prompt, sampling, max_tokens=n, **options)
    return [token for round_ in rounds for token in round_.tokens]


class ScriptedDrafter(NoDrafter):
    """Drafts from a law of its own, blind to the text: rejected often, in every way."""

    def __init__(self, ids: list[int]) -> None:
        self.q = Distribution(np.sort(ids), np.full(len(ids), 1 / len(ids)))

    def draft(self, text, n, sampling, rng) -> Draft:
        return Draft([self.q.draw(rng) for _ in range(n)], [self.q] * n)


class Branches:
    """Stands where the random generator stands and goes through all outcomes, one run of the loop after another."""

    def __init__(self) -> None:
        self.path: list[int] = []
        self.again = True

    def begin(self) -> None:
        self.depth, self.mass, self.sizes = 0, 1.0, []

    def pick(self, probs: np.ndarray) -> int:
        """The outcome of this run; those of no probability are passed over."""
        possible = np.flatnonzero(np.asarray(probs) > 0)
        if self.depth == len(self.path):
            self.path.append(0)
        chosen = int(possible[self.path[self.depth]])
        self.sizes.append(len(possible))
        self.depth += 1
        self.mass *= float(probs[chosen])
        return chosen

    def end(self) -> None:
        """The next path: the last choice that has another outcome takes it."""
        while self.path and self.path[-1] + 1 == self.sizes[len(self.path) - 1]:
            self.path.pop()
        self.again = bool(self.path)
        if self.again:
            self.path[-1] += 1

    def random(self) -> Coin:
        return Coin(self)


class Coin:
    def __init__(self, branches: Branches) -> None:
        self.branches = branches

    def __ge__(self, chance: float) -> bool:
        return bool(self.branches.pick(np.array([chance, 1 - chance])))


def loop_law(engine: Engine, sampling: Sampling, drafter: object, monkeypatch) -> dict[tuple[int, ...], float]:
    """The law of the first LENGTH tokens that the loop emits, by running it once for every leaf."""
    branches, law = Branches(), {}
    monkeypatch.setattr(Distribution, "draw", lambda self, rng: int(self.ids[rng.pick(self.probs)]))
    monkeypatch.setattr(np.random, "default_rng", lambda seed=None: branches)
    prompt = engine.model.tokenize(PROMPT)
    while branches.again:
        branches.begin()
        found = tuple(tokens_of(engine, prompt, sampling, LENGTH, drafter=drafter, draft_max=2))
        law[found] = law.get(found, 0.0) + branches.mass
        branches.end()
    assert sum(law.values()) == pytest.approx(1)
    return law


def wanted_law(engine: Engine, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """The law of the target alone under llama.cpp's own samplers."""
    prompt, law = engine.model.tokenize(PROMPT), {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for said, mass in law.items():
            engine.reader.keep([], 0)
            logits = engine.reader.read([*prompt, *said], 1)[0].copy()
            for token, chance in llama_cpp_chain(sampling, logits, prompt, said, engine.model).items():
                longer[(*said, token)] = mass * chance
        law = longer
    return law


def error(engine: Engine, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> float:
    """Between the law of the loop and the wanted one, the greatest difference. Drafts: likely, unlikely, impossible."""
    monkeypatch.setattr(engine.model, "is_end", lambda token: False)
    wanted = wanted_law(engine, sampling)
    likely = max(wanted, key=wanted.__getitem__)
    drafter = ScriptedDrafter(list({*likely[:2], max(wanted)[2], 1}))
    found = loop_law(engine, sampling, drafter, monkeypatch)
    return max(abs(found.get(key, 0.0) - wanted.get(key, 0.0)) for key in found.keys() | wanted.keys())


@pytest.mark.parametrize("sampling", [PENALTIES, GRAMMAR], ids=["penalties", "grammar"])
def test_emitted_law_is_the_targets(engines, sampling: Sampling, monkeypatch) -> None:
    assert error(engines(None), sampling, monkeypatch) < 1e-4


def feed_all(chain, drafts, i) -> None:
    """The state takes in every draft, also those that will be rejected."""
    for token in drafts if i == 0 else ():
        chain.accept(token)


def feed_none(chain, drafts, i) -> None:
    """The state knows nothing of the drafts of its round."""


@pytest.mark.parametrize("feed", [feed_all, feed_none])
def test_law_of_penalties_fails_with_a_wrong_state(engines, feed, monkeypatch) -> None:
    def broken(logits, chain, drafts, i):
        feed(chain, drafts, i)
        return chain.distribution(logits[i])

    monkeypatch.setattr(speculative, "_p_at", broken)
    assert error(engines(None), PENALTIES, monkeypatch) > 1e-2


@pytest.mark.parametrize("fault", ["bonus token unmasked", "residual over the unmasked p"])
def test_law_of_a_grammar_fails_where_the_mask_is_left_out(engines, fault: str, monkeypatch) -> None:
    honest, residual = speculative._p_at, acceptance.residual
    unmasked: list[Distribution] = []

    def p_at(logits, chain, drafts, i):
        p = honest(logits, chain, drafts, i)
        unmasked[:] = [chain._sampling.distribution(logits[i])]
        return unmasked[0] if fault.startswith("bonus") and i == len(drafts) else p

    monkeypatch.setattr(speculative, "_p_at", p_at)
    if fault.startswith("residual"):
        monkeypatch.setattr(acceptance, "residual", lambda p, q: residual(unmasked[0], q))
    # What breaks the grammar is refused before llama.cpp sees it.
    with pytest.raises(ValueError, match="does not allow"):
        error(engines(None), GRAMMAR, monkeypatch)


def test_a_grammar_that_is_fed_rejected_drafts_is_seen(engines, monkeypatch) -> None:
    def broken(logits, chain, drafts, i):
        feed_all(chain, drafts, i)
        return chain.distribution(logits[i])

    monkeypatch.setattr(speculative, "_p_at", broken)
    with pytest.raises(ValueError, match="does not allow"):
        error(engines(None), GRAMMAR, monkeypatch)


GREEDY_PENALTIES = Sampling(
    temp=0, repeat_penalty=1.2, frequency_penalty=1.0, repeat_last_n=16, logit_bias={7: -np.inf}
)
GREEDY_GRAMMAR = Sampling(temp=0, grammar='root ::= ([a-z]+ [ ,.] [0-9] "é"?)+')


@pytest.mark.parametrize("sampling", [GREEDY_PENALTIES, GREEDY_GRAMMAR], ids=["penalties", "grammar"])
@pytest.mark.parametrize("name", ["target", "good-trimmed", "wrong", "tiny-trimmed", "spec-trimmed"])
def test_greedy_text_is_the_plain_one(engines, name: str, sampling: Sampling, monkeypatch) -> None:
    """Whatever the drafter; and the plain text is what llama.cpp's own samplers give."""
    engine = engines(name)
    monkeypatch.setattr(engine.model, "is_end", lambda token: False)
    prompt = engine.model.tokenize(PROMPT)
    plain = tokens_of(engine, prompt, sampling, 40, draft_max=0, drafter=NoDrafter())
    assert len(set(plain)) > 5
    for draft_max in (1, 3, 8):
        assert tokens_of(engine, prompt, sampling, 40, draft_max=draft_max) == plain
    engine.reader.keep([], 0)
    assert plain != plain_greedy(engine.context, prompt, 40, lambda token: False)[0]
    for i in range(0, 40, 7):
        engine.reader.settle()
        engine.reader.keep([], 0)
        logits = engine.reader.read([*prompt, *plain[:i]], 1)[0].copy()
        assert list(llama_cpp_chain(sampling, logits, prompt, plain[:i], engine.model)) == [plain[i]]


def test_penalties_reach_the_drafter(engines, monkeypatch) -> None:
    """The target as its own drafter is accepted throughout also with penalties: q is p."""
    engine = engines("target")
    monkeypatch.setattr(engine.model, "is_end", lambda token: False)
    rounds = list(engine.rounds(engine.model.tokenize(PROMPT), GREEDY_PENALTIES, max_tokens=32, draft_max=3))
    assert all(round_.accepted == len(round_.drafted) for round_ in rounds)


@pytest.mark.parametrize("sampling", [PENALTIES, GRAMMAR], ids=["penalties", "grammar"])
def test_same_seed_same_text_also_after_stopping_in_the_middle(engines, sampling: Sampling) -> None:
    engine = engines("good-trimmed")
    prompt = engine.model.tokenize(PROMPT)
    texts = []
    for seed in (1, 1, 2):
        stopped = engine.rounds(prompt, sampling, max_tokens=20, seed=5)
        next(stopped)
        stopped.close()
        texts.append(tokens_of(engine, prompt, sampling, 20, seed=seed))
    assert texts[0] == texts[1] != texts[2]


def test_an_end_token_inside_a_draft_ends_a_grammar(engines) -> None:
    """Everything is drafted twice over, also what follows an end: the text is the grammar's, whole."""
    engine = engines(None)
    prompt = engine.model.tokenize(PROMPT)
    letter, end = engine.model.tokenize("a")[0], engine.model.tokenize("<|im_end|>")[0]

    class Ending(NoDrafter):
        def draft(self, text, n, sampling, rng) -> Draft:
            tokens = [letter, end, end, letter][:n]
            return Draft(tokens, [Distribution(np.array([token]), np.ones(1)) for token in tokens])

    sampling = Sampling(temp=0, grammar='root ::= "a"', logit_bias={end: 50.0})
    (only,) = engine.rounds(prompt, sampling, max_tokens=20, draft_max=4, drafter=Ending())
    assert (only.tokens, only.finish) == ([letter, end], "stop")


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["sea", 'king\'s "house"', "tea"]},
        "counts": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
        "old": {"type": "boolean"},
    },
    "required": ["name", "kind", "counts"],
}


def answers(engine: Engine, prompt: list[int], n: int, max_tokens: int, **settings: object) -> None:
    sampling, whole = Sampling(temp=1.0, grammar=schema_grammar(json.dumps(SCHEMA)), **settings), 0
    for seed in range(n):
        rounds = list(engine.rounds(prompt, sampling, max_tokens=max_tokens, seed=seed))
        text = b"".join(engine.model.piece(token) for round_ in rounds for token in round_.tokens)
        if rounds[-1].finish == "stop":
            assert obeys(json.loads(text), SCHEMA), text
            whole += 1
        else:
            assert sum(len(round_.tokens) for round_ in rounds) == max_tokens
    assert whole > 0.8 * n


@pytest.mark.parametrize("n", [12, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["target", "wrong-trimmed"])
def test_every_answer_obeys_the_schema(engines, name: str, n: int) -> None:
    engine = engines(name)
    # llama.cpp's grammars take bytes for letters that are no UTF-8, which a model of random weights will emit.
    no_text = {i: -np.inf for i in range(600) if any(byte > 127 for byte in engine.model.piece(i))}
    answers(engine, engine.model.tokenize(PROMPT), n, 150, top_k=0, top_p=1, min_p=0, logit_bias=no_text)


@pytest.mark.slow
def test_every_answer_of_a_real_model_obeys_the_schema(smollm2: Path) -> None:
    with Engine(smollm2, smollm2, n_ctx=512) as engine:
        prompt = engine.prompt([{"role": "user", "content": "Describe a house as JSON."}])
        answers(engine, prompt, 200, 120)
