"""SpeculativeLM: the engine's own text, whatever cuts it short, from whichever thread."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import runner.lm
from corpus.errors import EngineError, FileFormatError, VocabularyMismatch
from corpus.llama import Context
from corpus.sampling import Sampling
from gguf_trim.prepare import Prepared
from runner import Record, SpeculativeLM
from runner.engine import Engine
from runner.lm import until

GREEDY = {"temperature": 0, "max_tokens": 40}
LONG = {"temperature": 0, "max_tokens": 400}


@pytest.fixture
def lm(toys) -> Iterator[SpeculativeLM]:
    with SpeculativeLM(toys["target"], toys["good-trimmed"], n_ctx=512) as lm:
        lm._engine.model.is_end = lambda token: False
        yield lm


@pytest.fixture
def slowly(monkeypatch) -> dict[str, int]:
    """Every decode takes a while; counts those that run, and the contexts closed under one."""
    seen = {"running": 0, "decodes": 0, "closed": 0, "closed under one": 0}
    decode, close = Context._decode, Context.close

    def slow(self, batch) -> None:
        seen["running"] += 1
        seen["decodes"] += 1
        time.sleep(0.005)
        decode(self, batch)
        seen["running"] -= 1

    def watched(self) -> None:
        if self._ctx is not None:
            seen["closed"] += 1
            seen["closed under one"] += seen["running"]
        if not seen["running"]:
            close(self)

    monkeypatch.setattr(Context, "_decode", slow)
    monkeypatch.setattr(Context, "close", watched)
    return seen


def started(lm: SpeculativeLM, **settings) -> tuple[threading.Thread, list]:
    """A thread that reads a long stream; the list fills with chunks, then with "end" or the error."""
    read: list = []

    def go() -> None:
        try:
            for chunk in lm.stream("the king", **{**LONG, **settings}):
                read.append(chunk)
            read.append("end")
        except BaseException as error:
            read.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    while not read:
        time.sleep(0.001)
    return thread, read


# --- the text


def test_it_is_the_engines_own_text(toys, lm) -> None:
    with Engine(toys["target"], None, n_ctx=512) as engine:
        engine.model.is_end = lambda token: False
        messages = [{"role": "user", "content": "the king and the sea"}]
        wanted = Record()
        "".join(engine.answer(engine.prompt(messages), Sampling(temp=0), wanted, max_tokens=40))
        raw = Record()
        "".join(engine.answer(engine.model.tokenize("the king"), Sampling(temp=0), raw, max_tokens=40))
    done = lm.chat(messages, **GREEDY)
    assert (done.text, done.token_ids, done.finish_reason) == (wanted.text, wanted.token_ids, "length")
    assert done.accepted > 0 and done.tau > 1
    assert lm.chat("the king and the sea", **GREEDY).text == wanted.text
    assert lm.chat(messages, draft_max=0, **GREEDY).text == wanted.text
    assert lm.chat(messages, draft_max=0, **GREEDY).drafted == 0
    assert lm.complete("the king", **GREEDY).text == raw.text != wanted.text
    record = Record()
    chunks = list(lm.stream(messages, record=record, **GREEDY))
    assert len(chunks) > 2 and "".join(chunks) == record.text == wanted.text


def test_a_seed_fixes_the_text(lm) -> None:
    texts = [lm.chat("tea", temperature=1.5, max_tokens=30, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_every_field_of_sampling_is_a_setting(lm, monkeypatch) -> None:
    @dataclass(frozen=True)
    class More(Sampling):
        brand_new: float = 0.0

    monkeypatch.setattr(runner.lm, "Sampling", More)
    assert runner.lm._sampling({"temperature": 0.1, "top_k": 3, "brand_new": 2.0}) == More(0.1, 3, brand_new=2.0)
    assert runner.lm._sampling({}) == More()
    for wrong in ("temp", "n_predict"):
        with pytest.raises(TypeError, match=rf"'{wrong}'.*temperature, top_k.*brand_new.*draft_max"):
            lm.stream("x", **{wrong: 1})
    with pytest.raises(ValueError, match="not a number"):
        lm.chat("x", temperature=float("nan"))
    with pytest.raises(ValueError, match="at least one"):
        lm.chat("x", max_tokens=0)
    with pytest.raises(ValueError, match="no empty stop"):
        lm.chat("x", stop="")
    with pytest.raises(TypeError, match="a string"):
        lm.stream([{"role": "user", "content": "x"}], template=False)


# --- stop strings

TEXT = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(st.lists(TEXT, max_size=5), STOPS)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    ends = [(end, end - len(s)) for s in stops for end in range(len(text) + 1) if text[:end].endswith(s)]
    record, given_out = Record(), []
    for piece in until(pieces, stops, record):
        given_out.append(piece)
        assert piece
    wanted = text[: min(ends)[1]] if ends else text
    assert "".join(given_out) == record.text == wanted
    assert (record.finish_reason == "stop") == bool(ends)


def test_stop_strings_end_an_answer(lm) -> None:
    whole = lm.chat("the king", **GREEDY).text
    stop = whole[10:14]
    at = whole.index(stop)
    done = lm.chat("the king", stop=["never said", stop], **GREEDY)
    assert (done.text, done.finish_reason) == (whole[:at], "stop")
    assert lm.chat("the king", stop=stop, **GREEDY).text == whole[:at]
    assert done.tokens < 40
    assert lm.chat("the king", **GREEDY).text == whole


# --- one at a time, from any thread


def test_a_second_answer_is_refused_while_one_is_read(lm) -> None:
    wanted = lm.chat("the sea", **GREEDY).text
    idle = lm.stream("never read", **GREEDY)  # claims nothing
    stream = lm.stream("the king", **LONG)
    next(stream)
    for second in (lm.stream("the sea", **GREEDY), idle):
        with pytest.raises(EngineError, match="busy with another answer"):
            next(second)
    assert next(stream)
    stream.close()
    assert lm.chat("the sea", **GREEDY).text == wanted
    for _ in lm.stream("the king", **LONG):  # left, and so dropped
        break
    assert lm.chat("the sea", **GREEDY).text == wanted
    kept = lm.stream("the king", **LONG)
    next(kept)
    lm.cancel()
    assert list(kept) == []
    lm.cancel()
    assert lm.chat("the sea", **GREEDY).text == wanted


def test_a_second_thread_is_refused_without_waiting(lm, slowly) -> None:
    thread, _ = started(lm)
    with pytest.raises(EngineError, match="busy with another answer"):
        lm.chat("x")
    lm.cancel()
    thread.join()


def test_cancel_from_another_thread(lm, slowly) -> None:
    wanted = lm.chat("the sea", **GREEDY).text
    record = Record()
    thread, read = started(lm, record=record)
    lm.cancel()
    assert slowly["running"] == 0
    assert lm.chat("the sea", **GREEDY).text == wanted  # at once
    thread.join()
    assert read[-1] == "end" and "".join(read[:-1]) == record.text
    assert record.finish_reason == "cancelled" and record.tokens < 400


def test_cancel_while_a_long_prompt_is_read(toys, monkeypatch) -> None:
    """It ends after the batch that is read, not after the prompt."""
    with SpeculativeLM(toys["target"], n_ctx=512) as lm:
        lm._engine.context.n_batch = 64
        wanted = lm.chat("the sea", **GREEDY).text
        decode, batches = Context._decode, []

        def cancelling(self, batch) -> None:
            batches.append(batch.struct.n_tokens)
            decode(self, batch)
            lm.cancel()

        with monkeypatch.context() as patch:
            patch.setattr(Context, "_decode", cancelling)
            assert list(lm.stream("x" * 400, **GREEDY)) == []
        assert batches == [64]
        assert lm.chat("the sea", **GREEDY).text == wanted


@pytest.mark.parametrize("moment", range(4))
def test_close_waits_for_what_llama_cpp_computes(toys, slowly, moment: int) -> None:
    lm = SpeculativeLM(toys["target"], toys["spec-trimmed"], n_ctx=512)
    lm._engine.model.is_end = lambda token: False
    thread, read = started(lm)
    time.sleep(random.Random(moment).uniform(0, 0.03))
    lm.close()
    assert (slowly["closed"], slowly["closed under one"]) == (2, 0)
    thread.join()
    assert read[-1] == "end" and len(read) > 1
    for call in (lm.chat, lm.stream, lm.complete):
        with pytest.raises(EngineError, match="used after it was closed"):
            call("x")
    lm.close()
    lm.cancel()


def test_the_watch_sees_a_context_closed_under_a_decode(lm, slowly) -> None:
    """The mutation of the test above: close that does not wait."""
    thread, _ = started(lm)
    while not slowly["running"]:
        pass
    lm._engine.context.close()
    assert slowly["closed under one"] > 0
    lm.cancel()
    thread.join()


def test_close_ends_a_stream_that_nobody_reads_just_now(toys) -> None:
    lm = SpeculativeLM(toys["target"], n_ctx=512)
    stream, unread = lm.stream("the king", **LONG), lm.stream("the king", **LONG)
    next(stream)
    lm.close()
    assert list(stream) == []
    with pytest.raises(EngineError, match="used after it was closed"):
        next(unread)


@pytest.mark.parametrize("what", ["cancel", "close"])
def test_from_a_signal_handler_in_the_middle_of_a_decode(toys, monkeypatch, what: str) -> None:
    lm = SpeculativeLM(toys["target"], toys["good-trimmed"], n_ctx=512)
    lm._engine.model.is_end = lambda token: False
    decode = Context._decode

    def signalled(self, batch) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        decode(self, batch)

    before = signal.signal(signal.SIGUSR1, lambda *_: getattr(lm, what)())
    try:
        stream = lm.stream("the king", **LONG)
        next(stream)
        monkeypatch.setattr(Context, "_decode", signalled)
        assert len(list(stream)) <= 1
        monkeypatch.undo()
    finally:
        signal.signal(signal.SIGUSR1, before)
    if what == "close":
        assert lm._engine.context._ctx is None
        with pytest.raises(EngineError, match="used after it was closed"):
            lm.chat("x")
    else:
        assert lm.chat("the king", **GREEDY).tokens == 40
        lm.close()


def test_ctrl_c_at_every_round(lm, monkeypatch) -> None:
    wanted = lm.chat("the sea", **GREEDY).text
    decode = Context._decode
    for stop in range(6):
        calls = iter(range(100))

        def interrupted(self, batch, calls=calls, stop=stop) -> None:
            if next(calls) == stop:
                raise KeyboardInterrupt
            decode(self, batch)

        stream = lm.stream("the king", **LONG)  # still referred to afterwards, as by a traceback
        with monkeypatch.context() as patch:
            patch.setattr(Context, "_decode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(stream)
        assert lm.chat("the sea", **GREEDY).text == wanted


def test_a_ctrl_c_that_keeps_an_answer_from_being_let_go(lm, monkeypatch) -> None:
    """Interrupted where it would have noted that it is over, at the end of an answer and of one left half-way."""
    wanted = lm.chat("the sea", **GREEDY).text

    def interrupted(answer) -> None:
        raise KeyboardInterrupt

    for whole in (True, False):
        stream = lm.stream("the king", **GREEDY)
        next(stream)
        with monkeypatch.context() as patch:
            patch.setattr(lm, "_release", interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(stream) if whole else stream.close()
        assert lm.chat("the sea", **GREEDY).text == wanted


def test_an_error_leaves_it_usable(lm) -> None:
    with pytest.raises(EngineError, match="does not fit a context"):
        lm.chat("x" * 600)
    assert lm.chat("the king", **GREEDY).tokens == 40


# --- opening


def test_wrong_files_are_refused(toys, tmp_path) -> None:
    with pytest.raises(EngineError, match="is a trimmed drafter"):
        SpeculativeLM(toys["good-trimmed"])
    with pytest.raises(VocabularyMismatch):
        SpeculativeLM(str(toys["target"]), str(toys["foreign"]))
    with pytest.raises(FileFormatError):
        SpeculativeLM(tmp_path / "missing.gguf")


def test_a_pair_by_name(toys, monkeypatch) -> None:
    names = []

    def prepare(name: str) -> Prepared:
        names.append(name)
        return Prepared(toys["target"], toys["target"], toys["good-trimmed"])

    monkeypatch.setattr(runner.lm, "prepare", prepare)
    with SpeculativeLM.from_pair("a-pair", n_ctx=256, vocab="trim") as lm:
        assert lm._engine.context.n_ctx == 256
        assert lm.chat("the king", **GREEDY).accepted > 0
    assert names == ["a-pair"]


@pytest.mark.slow
def test_the_default_pair_by_name() -> None:
    with SpeculativeLM.from_pair("qwen2.5-coder-1.5b") as lm:
        done = lm.chat("Name the largest planet.", temperature=0, max_tokens=30)
        assert "Jupiter" in done.text and done.accepted > 0


def test_importing_the_package_loads_nothing() -> None:
    root = Path(__file__).parent.parent
    code = "import sys, runner; print({'numpy', 'llama_cpp', 'runner.lm'} & set(sys.modules), runner.SpeculativeLM)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.startswith("set() <class 'runner.lm.SpeculativeLM'>"), done.stderr
    code = "import sys, runner.chat; print('runner.lm' in sys.modules, 'runner.draft_model' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "False False", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        runner.nothing  # noqa: B018
    assert {"SpeculativeLM", "TrimmedDraft"} <= set(dir(runner))
