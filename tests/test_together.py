"""Conversations that are computed together say what each says alone: real llama.cpp, F32 toys."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_trim.format.mtp import OWN_BLOCK, DrafterSource
from llamabase.errors import EngineError
from llamabase.llama import meeting as meetings
from llamabase.llama.context import F32, Context, Part, read_parts
from llamabase.llama.meeting import Meeting
from llamabase.llama.model import Model
from runner.bench.__main__ import main as bench
from runner.bench.machine import resident
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .hybrid_toys import write_hybrid
from .test_same_text import SAMPLINGS
from .test_serve import serving
from .test_state_fed import SAMPLINGS as STATE_FED_SAMPLINGS
from .toy import write_head, write_model, write_mtp
from .toy_gemma import write_assistant, write_gemma4

PROMPTS = ["tea and tea and the sea and tea and the", "a", "once more into the house of tea", "the king " * 24]
N = 24
MOST = 8
FEW = STATE_FED_SAMPLINGS["few"]  # likely tokens, so that some drafts stand by chance


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
OURS = {"stock": "target", "wrong": "wrong", "trimmed": "good-trimmed", "spec": "spec-trimmed", "none": None}
SHARED = [*OURS, "EAGLE-3", "MTP", "hybrid drafter"]  # whose targets' caches conversations share
FAMILIES = [*SHARED, "hybrid target", "assistant"]


def pair_of(family: str, toys: dict[str, Path], folder: Path) -> tuple[Path, DrafterSource | None]:
    """A target, and a drafter of the family."""
    if family in OURS:
        name = OURS[family]
        return toys["target"], toys[name] if name else None
    if family == "EAGLE-3":
        return write_model(folder / "target.gguf", seed=1, n_layer=4), write_head(folder / "head.gguf")
    if family == "MTP":
        return write_mtp(folder / "target.gguf", "glm4moe", seed=1), OWN_BLOCK
    if family == "assistant":
        return write_gemma4(folder / "target.gguf"), write_assistant(folder / "assistant.gguf")
    hybrid = write_hybrid(folder / "hybrid.gguf", "qwen35", seed=1)
    return toys["target"] if family == "hybrid drafter" else hybrid, hybrid


class Company:
    """Engines over one cache, a meeting of theirs, and one engine that says the same alone."""

    def __init__(
        self, target: Path, drafter: DrafterSource | None, n_ctx: int = 1024, n_batch: int | None = None
    ) -> None:
        self.plain = Engine(LoadOptions(target, n_ctx=256, cache=F32))
        self.texts: dict[tuple, list[int]] = {}
        options = LoadOptions(target, drafter, n_ctx=n_ctx, cache=F32, cache_draft=F32, n_batch=n_batch)
        self.first = Engine(options, MOST)
        self.meeting = Meeting()
        self.free = [self.first, *(self.first.share_weights() for _ in range(MOST - 1))]
        self.engines = list(self.free)
        for engine in self.engines:
            engine.meet(self.meeting)
        self.largest = 0

    def alone(self, asked: Asked) -> list[int]:
        """What the target says by plain decoding, one answer after another."""
        key = asked.prompt, asked.sampling, asked.seed, asked.n
        if key not in self.texts:
            prompt, sampling = self.plain.model.tokenize(asked.prompt), SAMPLINGS[asked.sampling]
            rounds = self.plain.rounds(prompt, sampling, max_tokens=asked.n, draft_max=0, seed=asked.seed)
            self.texts[key] = [token for round_ in rounds for token in round_.tokens]
        return self.texts[key]

    def say(self, schedule: list[Asked]) -> dict[int, list[int]]:
        """The answers, by place in the schedule; of one whose client went away, what it heard."""
        said: dict[int, list[int]] = {}

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
            assert step < 2000, "conversations wait for each other for ever"
        return said

    def require_said(self, schedule: list[Asked]) -> None:
        """Each says what it says alone, or a beginning of that if its client goes away."""
        said = self.say(schedule)
        for i, asked in enumerate(schedule):
            text = self.alone(asked)
            assert said[i] == text[: len(said[i])]
            assert asked.leaves is not None or said[i] == text
        assert len(self.free) == MOST and not len(self.meeting)

    def close(self) -> None:
        for engine in [*self.engines[::-1], self.plain]:
            engine.close()


@pytest.fixture(scope="module")
def company(toys, request, tmp_path_factory) -> Iterator[Company]:
    found = Company(*pair_of(request.param, toys, tmp_path_factory.mktemp("pair")))
    yield found
    found.close()


each = partial(pytest.mark.parametrize, "company", indirect=True, scope="module")


@each(argvalues=FAMILIES)
@settings(max_examples=8, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=st.lists(ASKED, min_size=1, max_size=12))
def test_each_says_what_it_says_alone(company: Company, eager, schedule: list[Asked]) -> None:
    company.require_said(schedule)


@each(argvalues=FAMILIES)
def test_drafts_of_every_drafter_stand(company: Company, eager) -> None:
    """Some of them, so the test above has seen it, also of heads that read states which a batch of several left."""
    if company.first.drafter is None:
        return
    drafted = accepted = 0

    def run(engine: Engine, seed: int) -> None:
        nonlocal drafted, accepted
        engine.set_cancel_check(lambda: True)
        prompt = engine.model.tokenize(PROMPTS[0])
        for round_ in engine.rounds(prompt, FEW, max_tokens=40, draft_max=3, seed=seed):
            drafted, accepted = drafted + len(round_.drafted), accepted + round_.accepted

    for seed, engine in enumerate(company.engines[:4]):
        company.meeting.begin(partial(run, engine, seed))
    while len(company.meeting):
        company.meeting.go_on()
    assert 0 < accepted <= drafted


@each(argvalues=FAMILIES)
@pytest.mark.parametrize("after", [False, True])
def test_an_interruption_leaves_them_usable(company: Company, eager, monkeypatch, after: bool) -> None:
    """Ctrl-C before or after any batch: the meeting ends, and the next answers are right."""
    schedule = [Asked(0, PROMPTS[i % 4], sorted(SAMPLINGS)[i % 3], i, (3, 0, None)[i % 3], "auto") for i in range(6)]
    for at in (1, 2, 5, 9):
        left = at

        def interrupted(parts):
            nonlocal left
            left -= 1
            rows = read_parts(parts) if left or after else []
            if not left:
                raise KeyboardInterrupt
            return rows

        monkeypatch.setattr(meetings, "read_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            company.say(schedule)
        company.meeting.close()
        monkeypatch.setattr(meetings, "read_parts", read_parts)
        company.require_said(schedule)


@each(argvalues=SHARED)
def test_they_share_batches(company: Company, eager, monkeypatch) -> None:
    """Four plain conversations take little more batches than one."""
    sizes = list[int]()

    def counted(parts):
        sizes.append(len(parts))
        return read_parts(parts)

    monkeypatch.setattr(meetings, "read_parts", counted)
    schedule = [Asked(0, PROMPTS[0], "all ids", seed, 0, "auto") for seed in range(4)]
    said = company.say(schedule)
    assert [said[i] for i in range(4)] == list(map(company.alone, schedule))
    longest = max(map(len, map(company.alone, schedule)))
    assert len(sizes) <= longest + 4
    assert max(sizes) == 4


def test_a_long_prompt_does_not_stop_the_others(toys, monkeypatch) -> None:
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


def test_a_batch_has_room_for_all_and_for_a_prompt_whatever_size_is_asked_for(toys) -> None:
    """Rounds of drafts that fill it must not keep a prompt out, and a drafter needs a row of each conversation."""
    company = Company(toys["target"], toys["good-trimmed"], n_batch=4)
    try:
        drafting = [Asked(0, PROMPTS[i % 3], "all ids", i, 15, "auto") for i in range(MOST - 1)]
        company.require_said([*drafting, Asked(2, PROMPTS[3], "all ids", 9, 3, "auto")])
        assert company.largest == MOST
    finally:
        company.close()


def test_an_answer_without_drafts_frees_what_the_drafter_held(toys) -> None:
    company = Company(toys["target"], toys["good-trimmed"])
    try:
        engine, texts = company.first, [company.first.model.tokenize(prompt) for prompt in PROMPTS]
        for text, draft_max, held in ((texts[3], 3, len(texts[3])), (texts[0], 0, 0), (texts[3], 3, len(texts[3]))):
            for _ in engine.rounds(text, SAMPLINGS["all ids"], max_tokens=4, draft_max=draft_max, seed=1):
                pass
            assert held <= engine.drafter.reading.context.recount() <= held + 4
        for _ in engine.rounds(texts[3], SAMPLINGS["all ids"], max_tokens=4, draft_max=0, seed=1):
            pass
        assert engine.drafter.reading.context.recount() == len(texts[3]) - 1  # what belongs to the text stays
        with pytest.raises(ValueError, match="the prompt is empty"):
            next(engine.rounds([], SAMPLINGS["all ids"], max_tokens=4, draft_max=3, seed=1))
        assert engine.drafter.reading.context.recount() == 0
    finally:
        company.close()


@pytest.mark.parametrize("drafts", [(0, 0, 0), (3, 0, 0), (0, 3, 3)])
def test_a_full_cache_forgets_idle_conversations_and_fails_only_whom_it_must(toys, drafts: tuple[int, ...]) -> None:
    company = Company(toys["target"], toys["good-trimmed"], n_ctx=256)
    try:
        model = company.first.model
        errors, heard = list[str](), dict[int, int]()

        def run(i: int, engine: Engine) -> None:
            try:
                prompt = model.tokenize("the king " * 40)[:100]
                for round_ in engine.rounds(prompt, SAMPLINGS["all ids"], max_tokens=60, draft_max=drafts[i], seed=i):
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
        assert heard[0] == 60  # whoever began first goes on
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


def leave_nothing(company: Company, times: int) -> None:
    """Sixty conversations, so many times: memory stays, and caches end empty."""
    schedule = [
        Asked(i, PROMPTS[i % 4], sorted(SAMPLINGS)[i % 3], i % 4, (0, 3, None)[i % 3], "auto", 8, (None, 2)[i % 2])
        for i in range(60)
    ]
    company.say(schedule)
    company.say(schedule)
    gc.collect()
    before = resident()
    for _ in range(times):
        company.say(schedule)
    gc.collect()
    assert resident() - before < 8 << 20
    for engine in company.engines:
        engine.forget()
        assert all(context.recount() == 0 for context in engine.contexts)


@each(argvalues=["spec", "EAGLE-3", "hybrid target"])
def test_nothing_leaks(company: Company, eager) -> None:
    leave_nothing(company, 2)


@pytest.mark.slow
@each(argvalues=["spec", "EAGLE-3"])
def test_ten_thousand_conversations_leave_nothing_behind(company: Company, eager) -> None:
    leave_nothing(company, 84)


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


def test_the_bench_asks_several_clients_and_servers_by_turns(toys, tmp_path: Path) -> None:
    files = ["--target", str(toys["target"]), "--draft", str(toys["good-trimmed"])]
    out, prompts = tmp_path / "clients.json", tmp_path / "prompts.jsonl"
    asked = ["clients", *files, "--clients", "1,2", "--modes", "plain,1", "--prompts", str(prompts), "-n", "8"]
    prompts.write_text("".join(json.dumps({"id": str(i), "prompt": text}) + "\n" for i, text in enumerate(PROMPTS[:3])))
    with serving(Engine(LoadOptions(toys["target"], n_ctx=512, n_threads=1), 2), parallel=2) as (url, _):
        done = CliRunner().invoke(bench, [*asked, "--server", f"plain-server={url}/", "-o", str(out)])
    assert done.exit_code == 0, done.output
    runs = json.loads(out.read_text())["runs"]
    assert [(run["clients"], run["mode"]) for run in runs] == [
        (n, mode) for n in (1, 2) for mode in ("plain", "1", "plain-server")
    ]
    assert {run["tokens"] for run in runs} == {24} and {len(run["first"]) for run in runs} == {3}
    assert all(run["drafted"] > 0 for run in runs if run["mode"] == "1")
    gone = CliRunner().invoke(bench, [*asked, "--server", f"gone={url}"])
    assert gone.exit_code == 1 and f"Error: {url}: did not answer as llama-server does" in gone.output
    for wrong in ("http://127.0.0.1", "auto=http://127.0.0.1", "x=127.0.0.1"):
        assert CliRunner().invoke(bench, [*asked, "--server", wrong]).exit_code == 2
