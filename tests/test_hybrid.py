"""Hybrid and recurrent models (Qwen3.5, LFM2, Falcon-H1, Mamba and others): cut bit for bit, drafters that go back to
what stood, and targets."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Quant
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from corpus.answers import TargetAnswer
from gguf_trim.cut import lay_out, write
from gguf_trim.fit.calibrate import TeacherForced
from gguf_trim.format.companion import Trimmed
from gguf_trim.prove import prove
from llamabase.errors import EngineError, FileFormatError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.context import COPIES, F32, Cache, Context, ContextParams
from llamabase.llama.model import Model
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import GREEDY, Sampling
from runner import SpeculativeLM
from runner.chat.__main__ import main as chat
from runner.draft.contracts import Reading, Step
from runner.draft.drafters import ModelDrafter
from runner.draft.opening import DraftOptions, open_drafter
from runner.draft.reading import AHEAD, PARTING
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .conftest import keep_spread, with_speculator
from .hybrid_toys import TOYS, write_hybrid
from .test_draft_model import Watched as WatchedDraft
from .test_draft_model import llama, say
from .test_mrope import text_of
from .test_soak import own_memory
from .toy import write_model

QUICK = ("qwen35", "lfm2")
# Rows cannot be added to these: llama.cpp gives hidden states or logits, not both, or it scales the logits.
NO_ROWS = ("lfm2", "lfm2moe", "granitehybrid")
KINDS = [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in TOYS]
FIRST_QUICK = [pytest.param(kind, marks=() if kind == QUICK[0] else pytest.mark.slow) for kind in TOYS]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A file of an architecture, or "llama"; with " other", one of other weights; with " cut", a cut of it."""
    folder = tmp_path_factory.mktemp("hybrids")

    def get(name: str) -> Path:
        path = folder / f"{name}.gguf"
        kind, *more = name.split()
        if path.exists():
            pass
        elif "cut" in more:
            write(lay_out(get(name.removesuffix(" cut")), keep_spread(400)), path)
            if kind not in NO_ROWS:
                with_speculator(path, 32)
        else:
            (write_model if kind == "llama" else write_hybrid)(path, kind, seed=2 if "other" in more else 1)
        return path

    return get


def vocabs_of(kind: str) -> list[str]:
    """What a cut with a speculator may draft from."""
    return ["auto", "trim"] if kind in NO_ROWS else ["auto", "trim", "context", "spec"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_toy_remembers_what_it_read_and_stays_in_range(files: Callable[[str], Path], kind: str) -> None:
    """Logits hang on the token before the last one, and are as large after 400 tokens as after 10."""
    text = np.random.default_rng(0).integers(0, 600, 400).tolist()
    with Model(files(kind)) as model, Context(model, 512, ContextParams(1, cache=F32), n_outputs=400) as context:
        assert model.recurrent
        logits = context.decode(text, 400).copy()
        context.truncate(0)
        changed = context.decode([*text[:-2], (text[-2] + 17) % 600, text[-1]]).copy()
    spread = np.ptp(logits, axis=1)
    assert (0.5 * spread[10] < spread[10:]).all() and (spread[10:] < 2 * spread[10]).all()
    assert np.abs(changed[0] - logits[-1]).max() > 0.1 * spread[-1]
    assert len(set(logits.argmax(1))) > 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_is_its_source_bit_for_bit(tmp_path: Path, kind: str) -> None:
    for type_ in (Quant.F32, Quant.Q8_0, Quant.Q4_0):
        source = write_hybrid(tmp_path / "m.gguf", kind, type_)
        for k in (288, 352):
            write(lay_out(source, keep_spread(k)), tmp_path / "t.gguf")
            found = prove(tmp_path / "t.gguf", source)
            assert found.ok and found.max_logit_difference == 0 and found.kept == k, found.differences
            assert found.positions > 100 and found.logit_range is not None and found.logit_range > 1


LIKELY = dict.fromkeys((97, 101, 116, 104, 32), 60.0)  # so likely that some drafts stand by chance
SAMPLINGS = {"greedy": GREEDY, "sampled": Sampling(temp=3.0, top_k=4, top_p=1, min_p=0, logit_bias=LIKELY)}
TARGETS = ("qwen35", "lfm2", "falcon-h1")


@pytest.fixture(scope="module")
def plain(files: Callable[[str], Path]) -> Iterator[Callable[[str, str], list[int]]]:
    """The text of a target without a drafter."""
    engines: dict[str, Engine] = {}
    texts: dict[tuple[str, str], list[int]] = {}

    def get(name: str, sampling: str) -> list[int]:
        if name not in engines:
            engines[name] = Engine(LoadOptions(files(name), n_ctx=128, n_threads=1, cache=F32))
        if (name, sampling) not in texts:
            texts[name, sampling], _ = text_of(engines[name], SAMPLINGS[sampling], 0)
        return texts[name, sampling]

    yield get
    for engine in engines.values():
        engine.close()


PAIRS = [("llama", kind) for kind in TOYS] + [(kind, kind) for kind in TARGETS]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    "target, draft",
    [pytest.param(*pair, marks=() if pair[1] in QUICK else pytest.mark.slow, id=" ".join(pair)) for pair in PAIRS],
)
def test_the_text_is_the_plain_one(files, plain, target: str, draft: str, sampling: str) -> None:
    """Of drafters with the target's weights, whose drafts stand if they have the rows, and with others'."""
    right = [(draft, "auto"), *((f"{draft} cut", vocab) for vocab in vocabs_of(draft)[1:])]
    wrong = [(f"{draft} other", "auto"), (f"{draft} other cut", "trim")]
    for name, vocab in [*right, *wrong]:
        options = {"n_ctx": 128, "n_threads": 1, "vocab": vocab, "cache": F32, "cache_draft": F32}
        with Engine(LoadOptions(files(target), files(name), **options)) as engine:
            for draft_max in (1, 3, 12):
                text, accepted = text_of(engine, SAMPLINGS[sampling], draft_max)
                assert text == plain(target, sampling) and len(accepted) >= 15
                if target == draft and (name, vocab) in right:
                    assert all(accepted) if vocab in ("auto", "spec") else sum(accepted) >= 5
                elif sampling == "greedy":
                    assert sum(accepted) < 0.2 * len(accepted)


@pytest.mark.parametrize("kind", NO_ROWS)
def test_rows_that_cannot_be_added_are_refused_or_left_out(files, kind: str) -> None:
    with pytest.raises(EngineError, match="rows cannot be added; use vocabulary trim"):
        Engine(LoadOptions(files("llama"), files(f"{kind} cut"), n_ctx=64, vocab="context"))
    with Engine(LoadOptions(files("llama"), files(f"{kind} cut"), n_ctx=64)) as engine:
        assert engine.drafter is not None and engine.drafter.vocabs == ["auto"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_drafter_makes_of_answers_is_its_own(files, kind: str) -> None:
    """Of LFM2, llama.cpp gives no logits beside the hidden states: the head is multiplied here."""
    with Model(files(kind)) as model, Context(model, 64, ContextParams(1), n_outputs=64) as context:
        text = list(range(100, 130))
        for _ in range(6):
            text.append(int(context.decode(text[context.n_past :], 1)[0].argmax()))
    found = TeacherForced.of(files(kind), [TargetAnswer("0", "all", text[:30], text[30:])], n_threads=1)
    assert found.rights[0].tolist() == [True] * 6


class Watched:
    """A reading that keeps the logits of its steps."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self.logits: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reading, name)

    def begin(self, text: list[int]) -> Step:
        self.logits = []
        return self._kept(self._reading.begin(text))

    def follow(self, token: int) -> Step:
        return self._kept(self._reading.follow(token))

    def _kept(self, step: Step) -> Step:
        self.logits.append(step.logits.copy())
        return step


class Bench:
    """Opens drafters over one model, fresh ones at will."""

    def __init__(self, path: Path, n_ctx: int = 256, vocab: str = "auto", cache: Cache = F32) -> None:
        self._options = DraftOptions(path, n_ctx, vocab, how=ContextParams(1, cache))
        file = GGUFFile(path)
        self._vocabulary = Trimmed.open(path).vocabulary if "gguf_trim.d2t" in file.fields else Vocabulary(file)
        self.model = Model(path)

    @contextlib.contextmanager
    def drafter(self) -> Iterator[ModelDrafter]:
        drafter = open_drafter(self._options, self._vocabulary, model=self.model)
        drafter.reading = Watched(drafter.reading)
        with contextlib.closing(drafter):
            yield drafter

    def compare(self, used: ModelDrafter, text: list[int], n: int) -> list[int]:
        """The drafts of a drafter that has been used, which must be those of a fresh one; returns them."""
        with self.drafter() as fresh:
            found, expected = (drafter.draft(text, n, GREEDY, Noise(0)) for drafter in (used, fresh))
            for i, (ours, theirs) in enumerate(zip(used.reading.logits, fresh.reading.logits, strict=True)):
                near = 1e-4 * np.ptp(theirs)
                assert np.abs(ours - theirs).max() <= near, f"step {i}"
                if found[i] != expected[i]:  # at a near-tie, and then what follows is of other texts
                    best = np.sort(theirs)[-2:]
                    assert best[1] - best[0] <= 2 * near, f"step {i}"
                    return found
        assert found == expected
        return found


@pytest.fixture(scope="module")
def benches(files) -> Iterator[Callable[..., Bench]]:
    opened: dict[tuple[Any, ...], Bench] = {}

    def get(name: str, **settings: Any) -> Bench:
        key = (name, *settings.items())
        if key not in opened:
            opened[key] = Bench(files(name), **settings)
        return opened[key]

    yield get
    for bench in opened.values():
        bench.model.close()


ROUNDS = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 0, 0, 1, 2, 3, 5, 14, 1000]),  # tokens that the text loses at its end
        st.integers(0, 12),  # drafts that it then gains, if it lost none
        st.integers(0, 9),  # other tokens
        st.integers(0, 12),  # drafts asked for
        st.booleans(),  # whether it is prepared first
        st.booleans(),  # whether it is settled afterwards
    ),
    min_size=2,
    max_size=8,
)


def follow_rounds(
    bench: Bench, drafter: ModelDrafter, rounds: list[tuple[int, int, int, int, bool, bool]], seed: int
) -> None:
    """Draft after texts that continue, fork, shrink and begin anew."""
    rng = np.random.default_rng(seed)
    text: list[int] = []
    drafts: list[int] = []
    for lost, gained, others, n, prepared, settled in rounds:
        text = text[: max(0, len(text) - lost)] + ([] if lost else drafts[:gained])
        text += rng.integers(0, 600, others if text else max(1, others)).tolist()
        if prepared:
            drafter.prepare(text, 50)
        drafts = bench.compare(drafter, text, n) if n else drafter.draft(text, 0, GREEDY, Noise(0))
        if settled:
            drafter.settle()


@pytest.mark.parametrize("kind", KINDS)
@given(rounds=ROUNDS, seed=st.integers(0, 99))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_drafts_are_those_of_a_fresh_drafter(benches, kind: str, rounds, seed: int) -> None:
    for name, vocab in ((kind, "auto"), (f"{kind} cut", vocabs_of(kind)[-1])):
        with benches(name, vocab=vocab).drafter() as drafter:
            follow_rounds(benches(name, vocab=vocab), drafter, rounds, seed)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("decode"), st.integers(1, 20)),
        st.tuples(st.just("checkpoint"), st.just(0)),
        st.tuples(st.just("rewind"), st.sampled_from([0, 1, 1, 2, 3, 4, 7, 20, 1000])),
        st.tuples(st.just("copy"), st.just(0)),
        st.tuples(st.just("recount"), st.just(0)),
    ),
    max_size=20,
)


DECODED = [("decode", 5), ("checkpoint", 0), ("decode", 5)]


@pytest.mark.parametrize("kind", KINDS)
@given(steps=STEPS, rewinds=st.sampled_from([0, 3]), seed=st.integers(0, 99), n_ubatch=st.sampled_from([1, 3, 8]))
@example([*DECODED, ("copy", 0), ("decode", 2), ("rewind", 6), ("decode", 10), ("rewind", 4)], 0, 0, 8)  # stale copy
@example([("decode", 5), ("rewind", 2), ("checkpoint", 0), ("decode", 3), ("rewind", 3)], 3, 0, 8)  # of a batch's state
@example([("decode", 5), ("rewind", 1), ("rewind", 1)], 3, 0, 8)  # a batch is undone once
@example([*DECODED, ("rewind", 8), ("decode", 9), ("rewind", 4)], 0, 0, 8)  # a checkpoint is stale
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_cache_goes_back_to_where_it_says(benches, kind: str, steps, rewinds: int, seed: int, n_ubatch: int) -> None:
    """Batches, checkpoints, copies and rewinds in any order: the cache holds the beginning of the text that it says it
    does, at least up to its checkpoint or a copy."""
    rng, model = np.random.default_rng(seed), benches(kind).model
    text: list[int] = []
    checkpoint, copies = 0, []
    with (
        Context(model, 512, ContextParams(1, F32, 8, n_ubatch), rewinds=rewinds) as used,
        Context(model, 512, ContextParams(1, cache=F32)) as fresh,
    ):
        for what, n in [*steps, ("decode", 1)]:
            if what == "decode":
                new = rng.integers(0, 600, n).tolist()
                text += new
                found = used.decode(new)[0].copy()
                fresh.truncate(0)
                expected = fresh.decode(text)[0]
                assert np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)
            elif what == "checkpoint":
                if used.undoable == used.n_ctx:
                    checkpoint = len(text)
                used.checkpoint()
            elif what == "copy":
                copies = [*copies, len(text)][-COPIES:] if len(text) not in [0, *copies] else copies
                used.copy_state()
            elif what == "rewind":
                to = max(0, len(text) - n)
                reached = used.reach(to)
                assert max(place for place in (0, checkpoint, *copies) if place <= to) <= reached <= to
                assert used.rewind(to) == reached
                if checkpoint >= reached < len(text):  # it is gone back to once
                    checkpoint = 0
                del text[reached:]
                copies = [place for place in copies if place <= reached]
            else:
                used.recount()
            assert used.n_past == len(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_reads_what_is_new_of_the_text(benches, monkeypatch, kind: str) -> None:
    """And with it drafts that were accepted and taken back; all drafts are kept if all were accepted."""
    read: list[int] = []
    decode = Context.decode
    monkeypatch.setattr(
        Context, "decode", lambda self, inputs, *how: read.append(len(inputs)) or decode(self, inputs, *how)
    )
    with benches(kind).drafter() as drafter:
        text = list(range(100, 130))
        for accepted, unread in ((0, 30), (0, 1), (1, 1), (2, 2), (3, 1), (0, 2)):
            assert drafter.unread(text) == unread
            read.clear()
            drafts = drafter.draft(text, 3, GREEDY, Noise(0))
            assert read == [unread, 1, 1]
            text += [*drafts[:accepted], 200]


@pytest.mark.parametrize("kind", TARGETS)
def test_a_target_reads_what_is_new_of_the_text(files, plain, monkeypatch, kind: str) -> None:
    """In rounds of any length, whatever falls: the drafts, and what was accepted of those of the round before."""
    read: list[int] = []
    options = {"n_ctx": 128, "n_threads": 1, "cache": F32}
    with Engine(LoadOptions(files(kind), files(f"{kind} cut"), vocab="trim", **options)) as engine:
        decode = engine.context.decode
        monkeypatch.setattr(
            engine.context, "decode", lambda inputs, *how: read.append(len(inputs)) or decode(inputs, *how)
        )
        for draft_max in (1, 3, 4, 12):
            read.clear()
            text, accepted = text_of(engine, GREEDY, draft_max)
            assert text == plain(kind, "greedy") and not all(accepted)
            assert max(read[1:]) <= 2 * draft_max + 1  # after the prompt


def claims_to(context: Context, n: int) -> int:
    """Goes on from the drafts as if they had been taken back."""
    return n


def leaves_the_state(context: Context, n: int) -> int:
    """Takes back what attention has read, not the running state."""
    flags = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: nothing but the running state
    size = llama_cpp.llama_state_seq_get_size_ext(context.handle, 0, flags)
    state = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data_ext(context.handle, state, size, 0, flags) == size
    to = REWIND(context, n)
    assert llama_cpp.llama_state_seq_set_data_ext(context.handle, state, size, 0, flags) == size
    return to


REWIND = Context.rewind


def copies_nothing(context: Context, n: int) -> int:
    """A llama_memory_seq_cp that does nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "llama_memory_seq_cp", lambda *_: None)
        return REWIND(context, n)


FORGETFUL = (claims_to, leaves_the_state, copies_nothing)
TWO_ROUNDS = [(0, 0, 20, 4, False, False), (0, 1, 2, 4, False, False)]


@pytest.mark.parametrize("forgetful", FORGETFUL)
@pytest.mark.parametrize("kind", KINDS)
def test_a_drafter_that_does_not_go_back_is_seen(benches, kind: str, forgetful) -> None:
    with benches(kind).drafter() as drafter:
        follow_rounds(benches(kind), drafter, TWO_ROUNDS, 0)
    with benches(kind).drafter() as drafter:
        drafter.reading.context.rewind = partial(forgetful, drafter.reading.context)
        with pytest.raises((AssertionError, EngineError), match=r"step 0|could not decode"):
            follow_rounds(benches(kind), drafter, TWO_ROUNDS, 0)


@pytest.mark.parametrize("forgetful", FORGETFUL)
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_go_back_is_refused(files, monkeypatch, kind: str, forgetful) -> None:
    target, drafts = files("llama"), [files(kind), files(f"{kind} cut")]  # made with a cache that goes back
    monkeypatch.setattr(Context, "rewind", forgetful)
    for draft in drafts:
        said = rf"{draft.name}: llama\.cpp cannot copy the state of a {kind} model"
        with pytest.raises(EngineError, match=said):
            Engine(LoadOptions(target, draft, n_ctx=64))


PLACES = ("llama/context.py", "draft/reading.py", "draft/drafters.py", "loop/speculative.py")


SET_STATE = "llama_state_seq_set_data_ext"


def interrupted(at: int, call: Callable[[], object]) -> bool:
    """Whether Ctrl-C at the `at`-th line that a call runs in PLACES came before its end."""
    n = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal n
        if not frame.f_code.co_filename.endswith(PLACES):
            return None
        if event == "line":
            n += 1
            if n == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_at_any_line_of_a_draft(benches, kind: str) -> None:
    """And at any of settling it: what is drafted next, whatever the text, is what a fresh drafter drafts."""
    bench, rng, at = benches(kind), np.random.default_rng(7), 0
    begun, step = rng.integers(0, 600, 30).tolist(), 2 if kind == "qwen35" else 7
    with bench.drafter() as drafter:
        going = True
        while going:
            at += step
            drafts = drafter.draft(begun, 3, GREEDY, Noise(0))
            text = [*begun, *drafts[: at % 4], *rng.integers(0, 600, 1 + at % 2).tolist()]
            going = interrupted(at, partial(drafter.draft, text, 4, GREEDY, Noise(0)))
            interrupted(at % 23, drafter.settle)
            drafter.settle()
            filling = rng.integers(0, 600, 240).tolist()  # which a cell that is still in use would not leave room for
            bench.compare(drafter, (text, text[:20], filling)[at % 3], 3)
    assert at > 100


@pytest.mark.parametrize("first", ["before", "after"])
@pytest.mark.parametrize("name", ["llama_decode", "llama_memory_seq_rm", "llama_memory_seq_cp", SET_STATE])
@pytest.mark.parametrize("kind", FIRST_QUICK)
def test_ctrl_c_at_a_call_of_llama_cpp(benches, monkeypatch, kind: str, name: str, first: str) -> None:
    """A checkpoint of a text that was given up is not gone back to from another one."""
    bench, rng, honest = benches(kind), np.random.default_rng(11), getattr(llama_cpp, name)
    begun, at, going = rng.integers(0, 600, 60).tolist(), 0, True
    with bench.drafter() as drafter:
        while going:
            drafter.prepare(begun, 50)
            drafts = drafter.draft(begun, 3, GREEDY, Noise(0))
            calls = iter(range(at, -1, -1))

            def pressed(*arguments: Any, calls: Iterator[int] = calls) -> Any:
                due = next(calls, None) == 0
                if due and first == "before":
                    signal.raise_signal(signal.SIGINT)
                done = honest(*arguments)
                if due and first == "after":
                    signal.raise_signal(signal.SIGINT)
                return done

            monkeypatch.setattr(llama_cpp, name, pressed)
            try:
                for text in ([*begun, drafts[0], 200], [*begun[:50], 201, 202], [*begun, 203]):
                    drafter.draft(text, 3, GREEDY, Noise(0))
                going = False
            except KeyboardInterrupt:
                at += 1
            monkeypatch.setattr(llama_cpp, name, honest)
            drafter.settle()
            other = rng.integers(0, 600, 70).tolist()
            bench.compare(drafter, other, 1)
            bench.compare(drafter, other[:65], 3)
    assert at > 0


@pytest.mark.parametrize("target", [pytest.param("llama", marks=pytest.mark.slow), *TARGETS])
def test_ctrl_c_at_any_line_of_a_round(files, plain, target: str) -> None:
    """The next answer is the one of a fresh session, and the drafts of it are as right."""
    kind, at, going = "qwen35" if target == "llama" else target, 0, True
    options = {"n_ctx": 128, "n_threads": 1, "vocab": "trim", "cache": F32, "cache_draft": F32}
    with Engine(LoadOptions(files(target), files(f"{kind} cut"), **options)) as engine:
        wanted = text_of(engine, GREEDY, 4)
        while going:
            at += 17
            rounds = engine.rounds(engine.model.tokenize("of tea"), GREEDY, max_tokens=20, draft_max=4)
            next(rounds)
            going = interrupted(at, partial(list, islice(rounds, 2)))
            rounds.close()
            found = text_of(engine, GREEDY, 4)
            assert found[0] == plain(target, "greedy") and sum(found[1]) == sum(wanted[1])
    assert at > 200


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_prompt_is_read_from_near_where_it_parts(benches, kind: str) -> None:
    """As prompts of a chat do, where the answer begins; a copy is held of each of the last ones."""
    rng = np.random.default_rng(8)
    prompts = [rng.integers(0, 600, 60).tolist()]
    with benches(kind).drafter() as drafter:
        for _ in range(4):
            drafter.prepare(prompts[-1], 50)
            drafts = benches(kind).compare(drafter, prompts[-1], 6)
            drafter.draft([*prompts[-1], *drafts[:3], 200], 6, GREEDY, Noise(0))
            prompts.append([*prompts[-1][:-5], *rng.integers(0, 600, 20).tolist()])
            assert drafter.unread(prompts[-1]) <= PARTING + 20
        for prompt in prompts[::-1]:
            assert drafter.unread(prompt) <= (PARTING + 20 if prompt is not prompts[0] else 60)
            benches(kind).compare(drafter, prompt, 3)


def state_bytes(context: Context) -> int:
    """What llama.cpp would save: all cells in use, and the states."""
    return int(llama_cpp.llama_state_get_size(context.handle))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
@pytest.mark.parametrize("kind", KINDS)
def test_three_hundred_rounds_leave_nothing_behind(benches, kind: str) -> None:
    """No cell, no memory; then the context is filled to its last token."""
    rng = np.random.default_rng(9)
    with benches(kind).drafter() as drafter:
        context, text, sizes = drafter.reading.context, list(range(100, 130)), []
        for i in range(300):
            if i % 10 == 0:  # another text, or one that forks
                text = text[: (0, 5, 20)[i // 10 % 3]] + rng.integers(0, 600, 30).tolist()
                drafter.prepare(text, 50)
            drafts = drafter.draft(text, 4, GREEDY, Noise(0))
            text += [*drafts[: i % 5], int(rng.integers(0, 600))]
            if i % 60 == 59:
                drafter.prepare(list(range(200, 240)), 50)
                drafter.draft(list(range(200, 240)), 4, GREEDY, Noise(0))
                sizes.append((state_bytes(context), own_memory()))
        assert len({cells for cells, _ in sizes}) == 1
        assert sizes[-1][1] - sizes[0][1] < 4 << 20
        text = rng.integers(0, 600, 200).tolist()
        assert len(benches(kind).compare(drafter, text, 1000)) == context.n_ctx - 200


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_longer_than_the_context_moves_through_it(benches, kind: str) -> None:
    """The window of it that is read moves by half a context at a time, and is then read anew."""
    bench, rng, text = benches(kind, n_ctx=64), np.random.default_rng(10), list(range(100, 120))
    with bench.drafter() as drafter:
        unread = []
        for i in range(60):
            unread.append(drafter.unread(text))
            drafts = bench.compare(drafter, text, 4)
            text += [*drafts[: i % 5], int(rng.integers(0, 600))]
        assert len(text) > 190
    assert sum(n > 10 for n in unread) == 1 + -(-(len(text) + AHEAD - 64) // 32) and max(unread[1:]) <= 48


@pytest.mark.parametrize("kind", TARGETS)
def test_a_rounded_cache_and_a_small_context(files, plain, kind: str) -> None:
    """Of the drafter: most of what it drafts still stands."""
    for more in (
        {"cache_draft": Cache("q8_0", "q8_0")},
        {"n_ctx_draft": 64},
        {"cache": Cache(), "cache_draft": Cache()},
    ):
        options = {"n_ctx": 128, "n_threads": 1, "cache": F32, **more}
        with Engine(LoadOptions(files(kind), files(kind), **options)) as engine:
            text, accepted = text_of(engine, GREEDY, 3)
            assert text == plain(kind, "greedy") or "cache" in more
            assert sum(accepted) >= 0.6 * len(accepted) > 10


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("full_attention_interval", 0, "full_attention_interval is not a number of layers"),
        ("rope.dimension_count", 63, "that 63 of the 64 numbers of a head are rotated"),
        ("rope.dimension_count", 1 << 20, "that 1048576 of the 64 numbers of a head are rotated"),
        ("ssm.inner_size", 128, "that its 4 recurrent heads of 64 numbers have 128 in all"),
    ],
)
def test_numbers_that_would_end_the_process_are_refused(files, tmp_path: Path, key: str, value: int, said: str) -> None:
    file = GGUFFile(files("qwen35"))
    data = bytearray(file.path.read_bytes())
    np.frombuffer(data, "<u4", 1, file.fields[f"qwen35.{key}"].value)[:] = value
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(FileFormatError, match=rf"bad\.gguf: .*{said}"):
        Engine(LoadOptions(tmp_path / "bad.gguf", n_ctx=64))


@pytest.mark.parametrize("kind", TARGETS)
def test_a_context_of_a_few_tokens_is_filled(files, kind: str) -> None:
    """llama.cpp ends the process if it is to keep the states of as many tokens as it computes together."""
    for n_ctx, n_ubatch in (*((n, 512) for n in range(2, 8)), *((8, n) for n in range(1, 8))):
        options = LoadOptions(files(kind), files(kind), n_ctx, 1, cache=F32, n_ubatch=n_ubatch)
        with Engine(options) as engine:
            plain, drafted = (
                [token for round_ in rounds for token in round_.tokens]
                for rounds in (engine.rounds([100], GREEDY, max_tokens=20, draft_max=n) for n in (0, 5))
            )
        assert plain == drafted and len(plain) == n_ctx


@pytest.mark.parametrize("name", ["qwen35 cut", "qwen35", pytest.param("mamba2 cut", marks=pytest.mark.slow)])
def test_llama_cpp_pythons_own_loop_drafts_with_it(files, name: str) -> None:
    """The texts of a `Llama` are the same: new ones, and ones that begin like the last."""
    plain = llama(files("llama"))
    with WatchedDraft(files(name), target=files("llama"), n_threads=1) as draft:
        speculating = llama(files("llama"), draft)
        for prompt in ("the king and the sea", "of tea", "the king and the sea, the second"):
            draft.calls = []
            text = say(speculating, prompt)
            assert text == say(plain, prompt) and draft.figures(text)[0] >= 40


@pytest.mark.parametrize("kind", TARGETS)
def test_a_session_with_one(files, eager, kind: str) -> None:
    """Chat, streams that are left half-way and long answers, greedy and at a temperature, by cost and by number."""
    settings = {"temperature": 0.8, "seed": 5, "max_tokens": 60}
    with SpeculativeLM(files(kind), n_ctx=256, n_threads=1, cache=F32) as lm:
        wanted = [lm.chat([{"role": "user", "content": text}], **settings).text for text in ("the sea", "tea")]
    with SpeculativeLM(files(kind), files(f"{kind} cut"), n_ctx=256, n_threads=1, cache=F32, cache_draft=F32) as lm:
        for draft_max in (3, 12, None):
            for _ in lm.stream("of tea and the", **settings):
                break
            found = [
                lm.chat([{"role": "user", "content": text}], draft_max=draft_max, **settings)
                for text in ("the sea", "tea")
            ]
            assert [answer.text for answer in found] == wanted
            assert draft_max is None or sum(answer.accepted for answer in found) > 5


def test_chat_runs_one(files) -> None:
    """With the same answer as without."""
    answers = []
    for draft in ([], ["--draft", str(files("lfm2 cut")), "--draft-max", "5"]):
        command = ["--target", str(files("lfm2")), *draft, "-p", "the sea", "--max-tokens", "20", "--temp", "0"]
        done = CliRunner().invoke(chat, [*command, "--ctx-size", "128", "--threads", "1"])
        assert done.exit_code == 0, done.stderr
        answers.append(done.stdout)
    assert answers[0] == answers[1] and len(answers[0]) > 10
