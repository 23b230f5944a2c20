"""The loop with penalties and grammars on real llama.cpp: greedy texts and whole answers."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from llamabase.sampling.guidance import schema_guide
from llamabase.sampling.settings import Sampling
from runner.draft.contracts import NoDrafter
from runner.exact import plain_tokens
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .chains import llama_cpp_chain

PROMPT = "the king and the sea"


def tokens_of(engine: Engine, prompt: list[int], sampling: Sampling, n: int, **options: object) -> list[int]:
    rounds = engine.rounds(prompt, sampling, max_tokens=n, **options)
    return [token for round_ in rounds for token in round_.tokens]


GREEDY_PENALTIES = Sampling(
    temp=0, repeat_penalty=1.2, frequency_penalty=1.0, repeat_last_n=16, logit_bias={7: -np.inf}
)
GREEDY_GRAMMAR = Sampling(temp=0, grammar='root ::= ([a-z]+ [ ,.] [0-9] "é"?)+')


@pytest.mark.parametrize("sampling", [GREEDY_PENALTIES, GREEDY_GRAMMAR], ids=["penalties", "grammar"])
@pytest.mark.parametrize("name", ["target", "good-trimmed", "wrong", "tiny-trimmed", "spec-trimmed"])
def test_greedy_text_is_the_plain_one(engines, name: str, sampling: Sampling) -> None:
    """Whatever the drafter; and the plain text is what llama.cpp's own samplers give."""
    engine = engines(name)
    prompt = engine.model.tokenize(PROMPT)
    plain = tokens_of(engine, prompt, sampling, 40, draft_max=0, drafter=NoDrafter())
    assert len(set(plain)) > 5
    for draft_max in (1, 3, 8):
        assert tokens_of(engine, prompt, sampling, 40, draft_max=draft_max) == plain
    engine.reader.keep([], 0)
    assert plain != plain_tokens(engine.context, prompt, 40, lambda token: False)
    for i in range(0, 40, 7):
        engine.reader.settle()
        engine.reader.keep([], 0)
        logits = engine.reader.read([*prompt, *plain[:i]], 1)[0].copy()
        assert list(llama_cpp_chain(sampling, logits, prompt, plain[:i], engine.model)) == [plain[i]]


def test_penalties_reach_the_drafter(engines) -> None:
    """The target as its own drafter is accepted throughout also with penalties: q is p."""
    engine = engines("target")
    rounds = list(engine.rounds(engine.model.tokenize(PROMPT), GREEDY_PENALTIES, max_tokens=32, draft_max=3))
    assert all(round_.accepted == len(round_.drafted) for round_ in rounds)


def test_an_end_token_inside_a_draft_ends_a_grammar(engines) -> None:
    """Everything is drafted twice over, also what follows an end: the text is the grammar's, whole."""
    engine = engines(None)
    prompt = engine.model.tokenize(PROMPT)
    letter, end = engine.model.tokenize("a")[0], engine.model.tokenize("<|im_end|>")[0]

    class Ending(NoDrafter):
        def draft(self, text, n, sampling, noise) -> list[int]:
            return [letter, end, end, letter][:n]

    sampling = Sampling(temp=0, grammar='root ::= "a"', logit_bias={end: 50.0})
    (only,) = engine.rounds(prompt, sampling, max_tokens=20, draft_max=4, drafter=Ending())
    assert (only.tokens, only.finish) == ([letter, end], "stop")


def test_a_draft_that_a_schema_forbids_is_not_verified(engines) -> None:
    """Nor those after it; the drafter hears that it fell, and the text is the plain one."""
    engine = engines(None)
    prompt, tea = engine.model.tokenize(PROMPT), engine.model.tokenize('"tea"', special=False)
    sampling = Sampling(temp=0, guide=schema_guide('{"enum": ["tea", "tea and the sea"]}'))
    plain = tokens_of(engine, prompt, sampling, 12, draft_max=0)
    heard = []

    class Drafts(NoDrafter):
        def draft(self, text, n, sampling, noise) -> list[int]:
            return [*tea[:2], tea[0], tea[0]][:n] if len(text) == len(prompt) else []

        def learn(self, round_, made, read, batch) -> None:
            heard.append((made, read, round_.accepted))

    first, *rest = engine.rounds(prompt, sampling, max_tokens=12, draft_max=4, drafter=Drafts())
    assert (first.drafted, first.accepted, heard[0]) == (tea[:2], 2, (4, 3, 2))
    assert [token for round_ in (first, *rest) for token in round_.tokens] == plain


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
    sampling, whole = Sampling(temp=1.0, guide=schema_guide(json.dumps(SCHEMA)), **settings), 0
    for seed in range(n):
        rounds = list(engine.rounds(prompt, sampling, max_tokens=max_tokens, seed=seed))
        text = b"".join(engine.model.piece(token) for round_ in rounds for token in round_.tokens)
        if rounds[-1].finish == "stop":
            jsonschema.validate(json.loads(text), SCHEMA)
            whole += 1
        else:
            assert sum(len(round_.tokens) for round_ in rounds) == max_tokens
    assert whole > 0.8 * n


@pytest.mark.parametrize("n", [12, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["target", "wrong-trimmed"])
def test_every_answer_obeys_the_schema(engines, name: str, n: int) -> None:
    engine = engines(name)
    answers(engine, engine.model.tokenize(PROMPT), n, 150, top_k=0, top_p=1, min_p=0)


@pytest.mark.slow
def test_every_answer_of_a_real_model_obeys_the_schema(smollm2: Path) -> None:
    with Engine(LoadOptions(smollm2, smollm2, n_ctx=512)) as engine:
        prompt = engine.prompt([{"role": "user", "content": "Describe a house as JSON."}])
        answers(engine, prompt, 200, 120)
