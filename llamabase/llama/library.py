"""The llama.cpp that llama-cpp-python has loaded: its start, its errors, its backends, and what owns its memory."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import llama_cpp
import numpy as np

LAST_ERRORS: deque[str] = deque(maxlen=8)
_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    """Keep llama.cpp's errors for our own messages."""
    if level == _ERROR_LEVEL:
        LAST_ERRORS.append(text.decode("utf-8", "replace").strip())


@lru_cache(maxsize=1)
def start() -> None:
    """Load llama.cpp's backends, and keep what it and ggml log off the user's screen."""
    llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


def last_error() -> str:
    """llama.cpp's own reason for the last failure: the first line that it logged, which says the most."""
    return LAST_ERRORS[0] if LAST_ERRORS else "llama.cpp gave no reason"


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Around a call into llama.cpp: forget older errors, and let Ctrl-C act after the call.

    During the call llama.cpp may call into Python, and ctypes drops what is raised there. Yields a function that is
    False once a KeyboardInterrupt is due. Only the main thread gets signals, and a signal that is ignored or left to
    the system calls no Python: then nothing is changed.
    """
    LAST_ERRORS.clear()
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


@lru_cache(maxsize=1)
def physical_cores() -> int:
    """Cores to compute on, as llama.cpp counts them: two threads on one core only slow each other down."""
    if sys.platform == "linux":
        siblings = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings")
        cores = {path.read_text() for path in siblings}
        allowed = len(os.sched_getaffinity(0))
        return min(len(cores), allowed) or allowed
    if sys.platform == "darwin":
        for name in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
            answer = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
            if answer.returncode == 0 and answer.stdout.strip().isdigit():
                return int(answer.stdout)
    return max(1, (os.cpu_count() or 2) // 2)


def backends() -> dict[str, str]:
    """What this llama.cpp computes with, and each backend's features: {"CPU": "AVX2 AVX512", ...}."""
    start()
    features: dict[str, str] = {}
    name = ""
    for part in llama_cpp.llama_print_system_info().decode("utf-8", "replace").split(" | "):
        head, colon, rest = part.partition(" : ")
        name, feature = (head.strip(), rest) if colon else (name, part)
        if (key := feature.partition(" = ")[0].strip()) and name:
            features[name] = f"{features.get(name, '')} {key}".strip()
    return features


def key_of(files: Iterable[Path], settings: Sequence[object]) -> str:
    """What a measurement holds for: these files as they are (if they exist), settings, machine and llama.cpp."""
    facts = [platform.node(), physical_cores(), backends(), version("llama-cpp-python"), *settings]
    for path in filter(Path.exists, files):
        stat = path.stat()
        facts += [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


T = TypeVar("T")


class Closing:
    """Holds memory of llama.cpp's, itself or through others, until `with` ends or close() is called."""

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError


class Owner(Closing):
    """Holds memory of llama.cpp's itself; the garbage collector closes it at the latest."""

    def __del__(self) -> None:
        self.close()


def floats(pointer: Any, n_rows: int, n_columns: int) -> np.ndarray:
    """A view of llama.cpp's memory, as `np.ctypeslib.as_array` gives it, in a fraction of the time."""
    memory: Any = (ctypes.c_float * (n_rows * n_columns)).from_address(ctypes.addressof(pointer.contents))
    return np.ndarray((n_rows, n_columns), np.float32, memory)
