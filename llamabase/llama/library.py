"""The llama.cpp that llama-cpp-python has loaded: its start, its errors, its backends, and what owns its memory."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what `signal` wraps, raising and catching four exceptions
import ctypes
import hashlib
import os
import platform
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, TypeVar

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


class _Held:
    """The handler of SIGINT while llama.cpp is called: it holds back what the handler `before` would do."""

    def __init__(self, before: Callable[[int, FrameType | None], object]) -> None:
        self.before = before
        self.pressed: list[tuple[int, FrameType | None]] = []

    def __call__(self, *press: Any) -> None:
        self.pressed.append(press)

    def act(self) -> None:
        while self.pressed:
            self.before(*self.pressed.pop(0))


class interruptible:
    """Around a call into llama.cpp: forget older errors, and let Ctrl-C act after the call.

    During the call llama.cpp may call into Python, and ctypes drops what is raised there. Enters with a function that
    is False once a KeyboardInterrupt is due. Only the main thread gets signals, and a signal that is ignored or left to
    the system calls no Python: then nothing is changed.

    Around several calls, each `interruptible` itself, Ctrl-C still acts after each of them, and the handler is changed
    only once: changing it for every call takes a tenth of a millisecond where the caches are cold.
    """

    _held: ClassVar[_Held | None] = None  # of the outermost one
    _own: _Held | None = None

    def __enter__(self) -> Callable[[], bool]:
        LAST_ERRORS.clear()
        self._in_main = threading.get_ident() == threading.main_thread().ident
        if self._in_main and interruptible._held is None and callable(before := _signal.getsignal(signal.SIGINT)):
            self._own = _Held(before)
            _signal.signal(signal.SIGINT, self._own)
            interruptible._held = self._own
        return self._going_on

    def __exit__(self, *raised: object) -> None:
        held = interruptible._held if self._in_main else None
        if self._own is not None:
            interruptible._held = None
            _signal.signal(signal.SIGINT, self._own.before)
            self._own = None
        if held is not None:
            held.act()

    def __del__(self) -> None:
        """A tracing function, as debuggers have, may raise where a block ends, and then `__exit__` is not called."""
        if self._own is not None:
            self.__exit__()

    def _going_on(self) -> bool:
        held = interruptible._held if self._in_main else None
        return held is None or not held.pressed or held.before is not signal.default_int_handler


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


@cache
def addressed(name: str) -> Callable[[Any], int]:
    """llama.cpp's function of a context that returns a pointer, with the address in its place."""
    function: Any = llama_cpp.llama_cpp._lib[name]  # another object than llama_cpp's own, which gives pointers
    function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    return function  # type: ignore[no-any-return]


@lru_cache(maxsize=256)  # llama.cpp mostly returns the same address again
def floats(address: int, n_rows: int, n_columns: int) -> np.ndarray:
    """A view of llama.cpp's memory, valid as long as that is."""
    memory: Any = (ctypes.c_float * (n_rows * n_columns)).from_address(address)
    return np.ndarray((n_rows, n_columns), np.float32, memory)
