"""A process of its own for code that some inputs crash or starve: llama.cpp's grammars, and compiling JSON schemas.

llama.cpp reads `root ::= "a"{3,1}` until memory is full, and ends the process over parentheses that nest too deep. No
list of such inputs is complete, so one rule holds for all: a call may take SECONDS and MEMORY, in a process that may be
lost. Grammars and schemas have a worker each, because the grammars in use are lost with their worker.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

SECONDS = 2.0  # of a call: forty times a step of llama.cpp's grammar for JSON over 150,000 tokens
MEMORY = 500 << 20  # bytes that all bounded calls together may add to what is loaded
START = 60.0  # seconds of a call without bounds, such as the import of a module
LIMITS = f"{SECONDS:g} s or {MEMORY >> 20} MB"

T = TypeVar("T")


class WorkerEnded(Exception):
    """A call exceeded its limits, or ended the worker."""


class Worker:
    """Calls functions of modules in another process, which starts on the first call and again after it has ended.

    `module` is imported as the process starts, so that no call spends its time on that. Whatever the functions keep is
    lost when the process ends. Several threads may use one worker.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()
        atexit.register(self.end)

    def call(self, function: Callable[..., T], *arguments: Any, bounded: bool = True) -> T:
        """What the function returns or raises. Raises WorkerEnded if it exceeds a limit or ends the process.

        Without `bounded` it may take START seconds and any memory: for input that no stranger gave.
        """
        with self._lock:
            try:
                if self._process is None:
                    self._process = self._started()
                    self.call(_load, self._module, bounded=False)
                seconds = SECONDS if bounded else START
                pickle.dump((function, arguments, seconds, bounded), self._process.stdin)  # type: ignore[arg-type]
                self._process.stdin.flush()  # type: ignore[union-attr]
                raised, result = pickle.load(self._process.stdout)  # type: ignore[arg-type]
            except BaseException as error:
                self.end()  # also after an interruption: the answer would be taken for that to the next call
                if isinstance(error, OSError | EOFError | pickle.UnpicklingError):
                    raise WorkerEnded(f"it took over {LIMITS}, or ended the process") from error
                raise
        if raised:
            raise result
        return result  # type: ignore[no-any-return]

    def _started(self) -> subprocess.Popen[bytes]:
        # The process finds modules where this one does. A terminal's Ctrl-C does not reach it.
        code = f"import sys; sys.path[:] = sys.argv[1:]; from {__name__} import work; work()"
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )

    def end(self) -> None:
        """End the process; what it kept is lost."""
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                process.kill()
                with contextlib.suppress(OSError):
                    process.stdin.close()  # type: ignore[union-attr]
                process.stdout.close()  # type: ignore[union-attr]
                process.wait()


def work() -> None:
    """Answer calls until stdin ends: the main function of the process."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints to stdout must not get between the answers
    _limit("RLIMIT_CORE", 0)
    was_bounded = False
    while True:
        try:
            function, arguments, seconds, bounded = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if bounded != was_bounded:
            _limit_memory(bounded)
            was_bounded = bounded
        faulthandler.dump_traceback_later(seconds, exit=True)  # by a thread that needs no lock of Python's
        try:
            answer = False, function(*arguments)
        except Exception as error:
            answer = True, error
        finally:
            faulthandler.cancel_dump_traceback_later()
        pickle.dump(answer, answers)
        answers.flush()


def _load(module: str) -> None:
    import_module(module)


def _limit_memory(bounded: bool) -> None:
    """Bound what calls may take beside what is loaded, if the system can."""
    if not bounded:
        _limit("RLIMIT_AS", None)
        return
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _limit("RLIMIT_AS", pages * os.sysconf("SC_PAGE_SIZE") + MEMORY)


def _limit(name: str, value: int | None) -> None:
    """Set a soft limit; None lifts it as far as allowed."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no limits, macOS not all
        import resource

        number = getattr(resource, name)
        most = resource.getrlimit(number)[1]
        resource.setrlimit(number, (most if value is None else value, most))
