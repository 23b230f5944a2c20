"""Conversations that are computed together say what each says alone: real llama.cpp, F32 toys."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamabase.errors import EngineError
from llamabase.llama import meeting as meetings
from llamabase.llama.context import F32, Context, Part, read_parts
from llamabase.llama.meeting import Meeting
from llamabase.llama.model import Model
from runner.bench.machine import resident
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .test_same_text import SAMPLINGS

PROMPTS = ["tea and tea and the sea and tea and the", "a", "once more into the house of tea", "the king " * 24]
N = 24
MOST = 8


@dataclass(frozen=True)
class Asked:
    """A conversation: when it comes (in batches), what is asked, and after how many rounds its client goes away."""

    arrives: int
    prompt: str
    sampling: str
    seed: int
    draft_max: int | None
    vocab: str
    n: int = N
    leaves: int | None = None


ASKED = st.builds(
    Asked,
    arrives=st.integers(0, 30),
    prompt=st.sampled_from(PROMPTS),
    sampling=st.sampled_from(sorted(SAMPLINGS)),
    seed=st.integers(0, 3),
    draft_max=st.sampled_from([0, 1, 3, 12, None]),
    vocab=st.sampled_from(["auto", "trim", "context", "spec"]),
    leaves=st.sampled_from([None, None, 0, 3]),
)
FAMILIES = {"stock": "target", "wrong": "wrong", "trimmed": "good-trimmed", "spec": "spec-trimmed", "none": None}


@pytest.fixture(scope="module")
def alone(toys) -> Iterator[Callable[[Asked], list[int]]]:
    """What the target says by plain decoding, one answer after another."""
    texts: dict[tuple, list[int]] = {}
    with Engine(LoadOptions(toys["target"], n_ctx=256, cache=F32)) as engine:

        def text(asked: Asked) -> list[int]:
            key = asked.prompt, asked.sampling, asked.seed, asked.n
            if key not in texts:
                prompt, sampling = engine.model.tokenize(asked.prompt), SAMPLINGS[asked.sampling]
                rounds = engine.rounds(prompt, sampling, max_tokens=asked.n, draft_max=0, seed=asked.seed)
                texts[key] = [token for round_ in rounds for token in round_.tokens]
            return texts[key]

        yield text


class Company:
    """Engines over one cache, and a meeting of theirs."""

    def __init__(self, target, drafter, n_ctx: int = 1024) -> None:
        self.first = Engine(LoadOptions(target, drafter, n_ctx=n_ctx, cache=F32, cache_draft=F32), MOST)
        self.meeting = Meeting()
        self.free = [self.first, *(self.first.share_weights() for _ in range(MOST - 1))]
        self.engines = list(self.free)
        for engine in self.engines:
            engine.meet(self.meeting)
        self.largest = 0

    def say(self, schedule: list[Asked]) -> dict[int, list[int] | str]:
        """The answers, by place in the schedule; of one whose client went away, what it heard."""
        said: dict[int, list[int] | str] = {}

        def run(i: int, asked: Asked, engine: Engine) -> None:
            heard = list[int]()
            said[i] = heard
            if engine.drafter is not None:
                engine.drafter.vocab = asked.vocab if asked.vocab in engine.drafter.vocabs else "auto"
            try:
                engine.set_cancel_check(lambda: asked.leaves is None or len(heard) <= asked.leaves)
                prompt = engine.model.tokenize(asked.prompt)
                for round_ in engine.rounds(
                    prompt, SAMPLINGS[asked.sampling], max_tokens=asked.n, draft_max=asked.draft_max, seed=asked.seed
                ):
                    heard += round_.tokens
            except EngineError as error:
                assert "cancelled" in str(error) and asked.leaves is not None
            finally:
                self.free.append(engine)

        waiting = sorted(enumerate(schedule), key=lambda item: item[1].arrives)
        step = 0
        while waiting or len(self.meeting):
            while waiting and self.free and (waiting[0][1].arrives <= step or not len(self.meeting)):
                i, asked = waiting.pop(0)
                self.meeting.begin(partial(run, i, asked, self.free.pop(0)))
            self.largest = max(self.largest, len(self.meeting))
            self.meeting.go_on()
            step += 1
        return said

    def close(self) -> None:
        for engine in self.engines[::-1]:
            engine.close()


@pytest.fixture(scope="module", params=FAMILIES)
def company(toys, request) -> Iterator[Company]:
    name = FAMILIES[request.param]
    found = Company(toys["target"], toys[name] if name else None)
    yield found
    found.close()


@settings(max_examples=8, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=st.lists(ASKED, min_size=1, max_size=12))
def test_each_says_what_it_says_alone(company: Company, alone, eager, schedule: list[Asked]) -> None:
    said = company.say(schedule)
    for i, asked in enumerate(schedule):
        text = alone(asked)
        assert said[i] == text[: len(said[i])]
        assert asked.leaves is not None or said[i] == text
    assert len(company.free) == MOST and not len(company.meeting)


def test_they_share_batches(company: Company, alone, eager, monkeypatch) -> None:
    """Four plain conversations take little more batches than one."""
    sizes = list[int]()

    def counted(parts):
        sizes.append(len(parts))
        return read_parts(parts)

    monkeypatch.setattr(meetings, "read_parts", counted)
    schedule = [Asked(0, PROMPTS[0], "all ids", seed, 0, "auto") for seed in range(4)]
    said = company.say(schedule)
    assert [said[i] for i in range(4)] == list(map(alone, schedule))
    longest = max(map(len, map(alone, schedule)))
    assert len(sizes) <= longest + 4
    assert max(sizes) == 4


def test_a_long_prompt_does_not_stop_the_others(toys, alone, monkeypatch) -> None:
    """While it is read, in pieces, an answer beside it goes on."""
    monkeypatch.setattr(meetings, "PIECE", 16)
    company, order = Company(toys["target"], None), list[str]()
    try:
        company.meeting._delay = 1e-9  # pieces stay as small as may be

        def run(name: str, engine: Engine, prompt: list[int], n: int) -> None:
            for _ in engine.rounds(prompt, SAMPLINGS["all ids"], max_tokens=n, draft_max=0, seed=1):
                order.append(name)

        model, engines = company.first.model, company.engines
        company.meeting.begin(partial(run, "short", engines[0], model.tokenize("tea"), 30))
        for _ in range(3):
            company.meeting.go_on()
        company.meeting.begin(partial(run, "long", engines[1], model.tokenize("the king " * 60)[:300], 2))
        while len(company.meeting):
            company.meeting.go_on()
    finally:
        company.close()
    first = order.index("long")
    assert order[:first].count("short") > 12


def test_a_full_cache_forgets_idle_conversations_and_fails_only_whom_it_must(toys) -> None:
    company = Company(toys["target"], None, n_ctx=256)
    try:
        model = company.first.model
        errors, heard = list[str](), dict[int, int]()

        def run(i: int, engine: Engine) -> None:
            try:
                prompt = model.tokenize("the king " * 40)[:100]
                for round_ in engine.rounds(prompt, SAMPLINGS["all ids"], max_tokens=60, draft_max=0, seed=i):
                    heard[i] = heard.get(i, 0) + len(round_.tokens)
            except EngineError as error:
                errors.append(str(error))
            finally:
                engine.forget()

        for i in range(3):
            company.meeting.begin(partial(run, i, company.engines[i]))
        while len(company.meeting):
            company.meeting.go_on()
        assert errors and all("which conversations share, is full" in error for error in errors)
        assert max(heard.values()) > 30  # whoever fits goes on
        assert sum(engine.context.recount() for engine in company.engines) == 0
        company.say([Asked(0, PROMPTS[3], "all ids", 1, 0, "auto")])
    finally:
        company.close()


def test_conversations_with_caches_of_their_own_are_not_in_company(toys, eager) -> None:
    with (
        Engine(LoadOptions(toys["target"], toys["good-trimmed"], n_ctx=256)) as engine,
        engine.share_weights() as other,
    ):
        prompt = engine.model.tokenize(PROMPTS[0])
        for each in (engine, other):
            assert any(round_.drafted for round_ in each.rounds(prompt, SAMPLINGS["all ids"], max_tokens=N, seed=1))
            assert each.auto._beside.n == 0


def test_nothing_leaks(company: Company, eager) -> None:
    schedule = [
        Asked(i, PROMPTS[i % 4], sorted(SAMPLINGS)[i % 3], i % 4, (0, 3, None)[i % 3], "auto", 8, (None, 2)[i % 2])
        for i in range(60)
    ]
    company.say(schedule)
    before = None
    for _ in range(4):
        company.say(schedule)
        gc.collect()
        now = resident()
        if before is not None:
            assert now - before < 8 << 20
        before = now
    for engine in company.engines:
        engine.forget()
        assert all(context.recount() == 0 for context in engine.contexts)


@settings(max_examples=30, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_parts_of_one_batch_are_read_as_alone(toys, data) -> None:
    """Any lengths, rewinds in between, outputs as wanted."""
    with Model(toys["target"]) as model, Context(model, 256, n_outputs=64, n_parallel=4) as first:
        both = [first, *map(first.beside, range(1, 4))]
        texts = [list[int]() for _ in both]
        for _ in range(5):
            parts, chosen = [], data.draw(st.sets(st.integers(0, 3), min_size=1))
            for i in chosen:
                back = data.draw(st.integers(0, min(4, len(texts[i]))))
                if back:
                    both[i].rewind(len(texts[i]) - back)
                    del texts[i][len(texts[i]) - back :]
                more = data.draw(st.lists(st.integers(3, 500), min_size=1, max_size=12))
                texts[i] += more
                parts.append(Part(both[i], more, data.draw(st.integers(0, len(more))), False))
            rows = [row.copy() for row in read_parts(parts)]
            for part, row in zip(parts, rows, strict=True):
                text = texts[both.index(part.context)]
                with Context(model, 128, n_outputs=64) as own:
                    wanted = own.decode(text, part.outputs)
                    assert row.shape == wanted.shape
                    assert not part.outputs or np.abs(row - wanted).max() <= 2e-2 * np.ptp(wanted)
                assert part.context.recount() == len(text)
