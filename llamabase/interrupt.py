"""Ctrl-C before a command has begun, and while llama.cpp computes.

Imports nothing that takes time: the imports are what the first is about.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from types import FrameType
from typing import NoReturn


def leave_to_the_system() -> None:
    """Let Ctrl-C end the process at once and without a traceback, until `take_back`. A shell sees 130."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(module: str, name: str) -> NoReturn:
    """Be the console script `name`: the `main` of a module, which takes a while to import."""
    leave_to_the_system()
    sys.exit(import_module(module).main(prog_name=name))


def take_back() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
