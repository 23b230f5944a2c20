"""Many short turns and interruptions in one process: memory and file handles stay flat, the session stays usable."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner import SpeculativeLM

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")

GREEDY = {"temperature": 0, "max_tokens": 12}


@contextlib.contextmanager
def session(name: str, toys) -> Iterator[SpeculativeLM]:
    if name == "toy":
        with SpeculativeLM(toys["target"], toys["spec-trimmed"], n_ctx=512) as lm:
            yield lm
    else:
        with SpeculativeLM.from_pair("smollm2-135m", n_ctx=1024) as lm:
            yield lm


def own_memory() -> int:
    """Bytes of memory that are this process's own; pages of mapped model files come and go."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc's: what other tests have freed would hide what is kept here
        ctypes.CDLL(None).malloc_trim(0)
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def handles() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def turn(lm: SpeculativeLM, i: int) -> None:
    """A short answer, now and then one that is stopped, left or cancelled half-way."""
    settings = {**GREEDY, "temperature": i % 3 / 2, "seed": i}
    text = f"turn {i}: the {'king' * (i % 7)} and {i * 7919 % 1000}"
    match i % 5:
        case 1:
            for _ in lm.stream(text, **settings):
                break
        case 2:
            stream = lm.stream(text, **settings)
            next(stream, None)
            lm.cancel()
        case 3:
            lm.complete(text, stop=["a", "the"], **settings)
        case _:
            lm.chat([{"role": "user", "content": text}], **settings)


def growth(lm: SpeculativeLM, turns: int, warm: int, act=turn) -> tuple[int, int]:
    """Growth of (memory, handles) after the first `warm` turns."""
    for i in range(warm):
        act(lm, i)
    before = own_memory(), handles()
    for i in range(warm, turns):
        act(lm, i)
    return own_memory() - before[0], handles() - before[1]


def interrupt(lm: SpeculativeLM, after: float) -> None:
    """Ctrl-C `after` seconds into a long answer, wherever that is; again where one was swallowed by a callback."""
    over = threading.Event()

    def press() -> None:
        wait = after
        while not over.wait(wait):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            wait = 1.0

    presser = threading.Thread(target=press)
    end = time.monotonic() + after + 30
    try:
        with pytest.raises(KeyboardInterrupt):
            presser.start()
            while time.monotonic() < end:
                for _ in lm.stream("the king and the sea", temperature=1, max_tokens=400):
                    pass
    finally:
        over.set()
        presser.join()


def interruptions(lm: SpeculativeLM, n: int, longest: float) -> None:
    wanted = lm.chat("the sea", **GREEDY)
    rng = random.Random(0)
    for _ in range(n):
        interrupt(lm, rng.uniform(0, longest))
        done = lm.chat("the sea", **GREEDY)
        assert (done.text, done.tokens, done.finish_reason) == (wanted.text, wanted.tokens, wanted.finish_reason)


def test_short_turns_on_a_toy(toys) -> None:
    with session("toy", toys) as lm:
        memory, opened = growth(lm, turns=200, warm=60)
    assert memory < 4 << 20
    assert opened == 0


def test_a_leak_would_be_seen(toys) -> None:
    """The mutation of the test above: every turn keeps a megabyte and a file."""
    kept: list = []

    def leaking(lm: SpeculativeLM, i: int) -> None:
        turn(lm, i)
        kept.append((bytearray(os.urandom(1 << 20)), os.open("/dev/null", os.O_RDONLY)))

    with session("toy", toys) as lm:
        memory, opened = growth(lm, turns=200, warm=60, act=leaking)
    for _, file in kept:
        os.close(file)
    assert memory > 100 << 20
    assert opened == 140


def test_interruptions_on_a_toy(toys) -> None:
    with session("toy", toys) as lm:
        interruptions(lm, 20, longest=0.1)


@pytest.mark.slow
def test_short_turns_on_a_real_model(toys, smollm2) -> None:
    with session("smollm2", toys) as lm:
        memory, opened = growth(lm, turns=2000, warm=100)
    assert memory < 20 << 20
    assert opened == 0


@pytest.mark.slow
def test_interruptions_on_a_real_model(toys, smollm2) -> None:
    with session("smollm2", toys) as lm:
        interruptions(lm, 100, longest=1.0)
