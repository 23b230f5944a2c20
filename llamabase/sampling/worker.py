"""A process of its own for code that some input ends or starves: llama.cpp's grammars, and compiling JSON schemas.

llama.cpp reads `root ::= "a"{3,1}` until memory is full, and ends the process over parentheses that nest too deep. No
list of such inputs is complete, so one rule holds for all: a call may take SECONDS and MEMORY, in a process that may be
lost.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

SECONDS = 2.0  # that a call may take: forty times a step of llama.cpp's grammar for JSON over 150,000 tokens
MEMORY = 500 << 20  # bytes that calls may add to what the worker has loaded
TICK = 0.1  # seconds between looking whether a call takes too long
START = 60.0  # seconds in which the worker has to start and to import what a call needs
LIMITS = f"{SECONDS:g} s or {MEMORY >> 20} MB"

T = TypeVar("T")


class WorkerEnded(Exception):
    """A call took more than its limits, or ended the worker."""


class Worker:
    """Calls functions in another process, which is started when it is first needed and anew after it has ended.

    Functions are those of modules, and whatever they keep is lost when the worker ends. May be used by several threads.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._deadline = math.inf  # of the call that runs
        self._modules: set[str] = set()
        self._lock = threading.RLock()

    def call(self, function: Callable[..., T], *arguments: Any, bounded: bool = True) -> T:
        """What the function gives, or raises. Raises WorkerEnded if it reaches a limit or ends the worker.

        Without `bounded` it may take START seconds and any memory, for what was not given by a stranger.
        """
        with self._lock:
            try:
                if self._process is None:
                    self._start()
                if function.__module__ not in self._modules:
                    self._ask(_load, (function.__module__,), False)
                    self._modules.add(function.__module__)
                return self._ask(function, arguments, bounded)
            except (OSError, EOFError, pickle.UnpicklingError) as error:
                self.end()
                raise WorkerEnded(f"it took over {LIMITS}, or ended the process") from error

    def _ask(self, function: Callable[..., T], arguments: tuple[Any, ...], bounded: bool) -> T:
        assert self._process is not None
        ended = False
        self._deadline = time.monotonic() + (SECONDS if bounded else START)
        try:
            pickle.dump((function, arguments, bounded), self._process.stdin)  # type: ignore[arg-type]
            self._process.stdin.flush()  # type: ignore[union-attr]
            found: T
            raised, found = pickle.load(self._process.stdout)  # type: ignore[arg-type]
            ended = True
        finally:
            self._deadline = math.inf
            if not ended:  # an interruption may have come between question and answer
                self.end()
        if raised:
            raise found  # type: ignore[misc]
        return found

    def _start(self) -> None:
        # The worker finds modules where this process does. A terminal's Ctrl-C does not reach it.
        code = "import sys; sys.path[:] = sys.argv[1:]; from llamabase.sampling.worker import work; work()"
        self._modules.clear()
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
        atexit.register(self.end)
        threading.Thread(target=self._watch, args=(self._process,), name="worker", daemon=True).start()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """End a process that a call takes too long in. Looking now and then costs a call nothing."""
        while process.poll() is None:
            time.sleep(TICK)
            if time.monotonic() > self._deadline and process is self._process:
                process.kill()

    def end(self) -> None:
        """End the process; what it kept is lost."""
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                atexit.unregister(self.end)
                process.kill()
                with contextlib.suppress(OSError):
                    process.stdin.close()  # type: ignore[union-attr]
                process.stdout.close()  # type: ignore[union-attr]
                process.wait()


def work() -> None:
    """Answer calls until there are no more: the worker's own main."""
    # What a library prints to stdout must not get between the answers.
    answers: BinaryIO = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _limit("RLIMIT_CORE", 0)
    was_bounded, renewed = False, -START
    while True:
        try:
            function, arguments, bounded = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if bounded != was_bounded:
            _limit_memory(bounded)
            was_bounded = bounded
        if time.process_time() > renewed + START:  # ends a call if nobody is left to do that
            renewed = time.process_time()
            _limit("RLIMIT_CPU", int(renewed + 2 * START) + 1)
        try:
            answer = False, function(*arguments)
        except Exception as error:
            answer = True, error
        pickle.dump(answer, answers)
        answers.flush()


def _load(module: str) -> None:
    """In the worker: import what a call needs, which takes its own time."""
    import_module(module)


def _limit_memory(bounded: bool) -> None:
    """Bound what calls may take beside what is loaded, where the system does that."""
    if not bounded:
        _limit("RLIMIT_AS", None)
        return
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _limit("RLIMIT_AS", pages * os.sysconf("SC_PAGE_SIZE") + MEMORY)


def _limit(name: str, value: int | None) -> None:
    """Set a soft limit; None lifts it as far as it can be."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has none, macOS not all
        import resource

        number = getattr(resource, name)
        most = resource.getrlimit(number)[1]
        resource.setrlimit(number, (most if value is None else value, most))


@contextlib.contextmanager
def stderr_lines(most: int = 4096) -> Iterator[list[str]]:
    """The first `most` bytes that C code writes to stderr meanwhile, in lines; for the worker, where stderr is free."""
    said: list[str] = []
    data = b""
    kept, (reading, writing) = os.dup(2), os.pipe()

    def drain() -> None:
        nonlocal data
        while part := os.read(reading, 1 << 16):
            data += part[: most - len(data)]

    os.dup2(writing, 2)
    os.close(writing)
    thread = threading.Thread(target=drain)
    thread.start()
    try:
        yield said
    finally:
        os.dup2(kept, 2)
        thread.join()
        os.close(reading)
        os.close(kept)
        said += data.decode("utf-8", "replace").splitlines()
