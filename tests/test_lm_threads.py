"""SpeculativeLM: one answer at a time, and one that is ended: by another thread, a signal handler, Ctrl-C, an error."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from llamabase.errors import EngineError
from llamabase.llama.context import Context
from runner import Record, SpeculativeLM
from runner.loop.engine import Engine
from runner.loop.stops import TextPiece

from .conftest import engine_of

GREEDY = {"temperature": 0, "max_tokens": 40}
LONG = {"temperature": 0, "max_tokens": 400}


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


@pytest.mark.parametrize("whose", ["target", "drafter"])
def test_cancel_while_a_long_prompt_is_read(toys, monkeypatch, whose: str) -> None:
    """It ends after the batch that is read, not after the prompt."""
    with SpeculativeLM(toys["target"], toys["good-trimmed"], n_ctx=512) as lm:
        wanted = lm.chat("the sea", **GREEDY, draft_max=3).text
        engine = engine_of(lm)
        context = {"target": engine.context, "drafter": engine.drafter.reading.context}[whose]
        context.n_batch = 64
        decode, batches = Context._decode, []

        def cancelling(self, batch) -> None:
            decode(self, batch)
            if self is context:
                batches.append(batch.struct.n_tokens)
                lm.cancel()

        with monkeypatch.context() as patch:
            patch.setattr(Context, "_decode", cancelling)
            assert list(lm.stream("x" * 400, **GREEDY, draft_max=3)) == []
        assert batches == [64]
        assert lm.chat("the sea", **GREEDY, draft_max=3).text == wanted


@pytest.mark.parametrize("moment", range(4))
def test_close_waits_for_what_llama_cpp_computes(toys, slowly, moment: int) -> None:
    lm = SpeculativeLM(toys["target"], toys["spec-trimmed"], n_ctx=512)
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
    engine_of(lm).context.close()
    assert slowly["closed under one"] > 0
    lm.cancel()
    thread.join()


def test_a_stream_that_is_left_says_how_far_it_was_read(lm, monkeypatch) -> None:
    for most in range(4, 12):  # so that some last rounds have several tokens
        settings: Any = {"temperature": 0, "draft_max": 3, "max_tokens": most}
        whole = lm.chat("the king", **settings)
        for n in (1, len(list(lm.stream("the king", **settings))) - 1):
            record = Record()
            with contextlib.closing(lm.stream("the king", record=record, **settings)) as stream:
                read = "".join(next(stream) for _ in range(n))
            assert (record.text, record.finish_reason) == (read, "cancelled") and record.tokens < most
            assert record.token_ids == whole.token_ids[: record.tokens]
    monkeypatch.setattr(Engine, "token_texts", lambda *_, **__: (piece for piece in [TextPiece("helloSTOP", False)]))
    record = Record()
    with contextlib.closing(lm.stream("x", stop="STOP", record=record)) as stream:
        assert next(stream) == "hello"
    assert (record.text, record.finish_reason) == ("hello", "stop")


def test_close_ends_a_stream_that_nobody_reads_just_now(toys) -> None:
    lm = SpeculativeLM(toys["target"], n_ctx=512)
    stream, unread = lm.stream("the king", **LONG), lm.stream("the king", **LONG)
    next(stream)
    lm.close()
    assert list(stream) == []
    with pytest.raises(EngineError, match="used after it was closed"):
        next(unread)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("what", ["cancel", "close"])
def test_from_a_signal_handler_in_the_middle_of_a_decode(toys, monkeypatch, what: str, number: int) -> None:
    lm = SpeculativeLM(toys["target"], toys["good-trimmed"], n_ctx=512)
    decode = llama_cpp.llama_decode

    def signalled(context, batch) -> int:
        signal.raise_signal(number)
        return decode(context, batch)

    before = signal.signal(number, lambda *_: getattr(lm, what)())
    try:
        record = Record()
        stream = lm.stream("the king", record=record, **LONG)
        next(stream)
        monkeypatch.setattr(llama_cpp, "llama_decode", signalled)
        list(stream)
        assert record.rounds <= 2  # the one that was computed
        monkeypatch.undo()
    finally:
        signal.signal(number, before)
    if what == "close":
        assert engine_of(lm).context._ctx is None
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


def test_ctrl_c_while_step_costs_are_measured(lm, monkeypatch) -> None:
    decode = Context._decode
    engine_of(lm).weights.answers = None  # an answer that repeats an earlier one takes too few batches
    for stop in range(0, 40, 3):
        calls = iter(range(100))

        def interrupted(self, batch, calls=calls, stop=stop) -> None:
            decode(self, batch)
            if next(calls) == stop:
                raise KeyboardInterrupt

        engine_of(lm).measure()
        with monkeypatch.context() as patch:
            patch.setattr(Context, "_decode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                lm.chat("the sea", **GREEDY)
        assert lm.chat("the sea", **GREEDY).tokens == 40


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
    with pytest.raises(EngineError, match=r"does not fit a context of \d+: raise --ctx-size \(n_ctx;"):
        lm.chat("x" * 600)
    assert lm.chat("the king", **GREEDY).tokens == 40


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_threads_that_helped_to_compute_are_gone(toys) -> None:
    """Those that wait for one thread slow down, with OpenMP, whatever another one computes."""

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    with ThreadPoolExecutor(1) as another:  # which has not computed for other tests
        another.submit(int).result()
        before = threads()
        open_ = another.submit(lambda: SpeculativeLM(toys["target"], toys["spec-trimmed"], n_ctx=512, n_threads=2))
        with open_.result() as lm:
            for act in (int, lambda: lm.complete("the king", max_tokens=8), lambda: engine_of(lm).measure()):
                another.submit(act).result()
                end = time.monotonic() + 5
                while threads() > before and time.monotonic() < end:
                    time.sleep(0.01)
                assert threads() <= before
