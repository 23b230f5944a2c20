"""Ctrl-C while llama.cpp computes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Hold a Ctrl-C back while llama.cpp calls into Python, where ctypes would drop what is raised; then let it act.

    Yields a function that says whether to go on: not when KeyboardInterrupt is to come. Only the main thread gets
    signals, and one that is ignored or left to the system calls no Python: there nothing is changed.
    """
    pressed: list[tuple[int, FrameType | None]] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: True
        return
    signal.signal(signal.SIGINT, lambda *press: pressed.append(press))
    try:
        yield lambda: not pressed or before is not signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
        for press in pressed:
            before(*press)
