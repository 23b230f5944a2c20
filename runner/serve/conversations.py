"""Several remembered conversations over one pair, computed one request at a time in order of arrival.

One thread computes. Each request goes on from the conversation that shares its beginning, so clients that take turns do
not have their prompts read again.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from runner.draft.reading import shared
from runner.loop.engine import Engine


@dataclass
class Job:
    """Something to compute: `run` is called with the conversation that shares the longest prefix with the prompt.

    A job that is `cancelled` ends at the next batch; `failed` is called with an error.
    """

    prompt: Sequence[int]
    run: Callable[[Engine], None]
    failed: Callable[[BaseException], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


def _wanted(job: Job) -> bool:
    return not job.cancelled.is_set()


class Unavailable(Exception):
    """No more jobs are taken now: the queue is full, or the server ends."""


@dataclass(frozen=True)
class Slot:
    """A conversation that may be remembered: tokens it holds, and whether it is being computed."""

    tokens: int = 0
    busy: bool = False


class Conversations:
    """The engine's own conversation and, as they are needed, others over its weights, `n` in all.

    At most `waiting` jobs wait; cancelled ones do not count.
    """

    def __init__(self, engine: Engine, n: int, waiting: int) -> None:
        self.engine, self.n, self._most = engine, n, waiting
        self._open = [engine]
        self._used = {engine: 0.0}  # when, by time.monotonic
        self._jobs: deque[Job] = deque()
        self._running: Job | None = None
        self._computing: Engine | None = None  # its conversation
        self._ending = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="computing", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        with self._changed:
            return sum(map(_wanted, self._jobs))

    @property
    def busy(self) -> bool:
        return self._running is not None

    @property
    def slots(self) -> list[Slot]:
        slots = [Slot(len(engine.reader.held), engine is self._computing) for engine in tuple(self._open)]
        return slots + [Slot()] * (self.n - len(slots))

    def submit(self, job: Job) -> None:
        """Raises Unavailable if as many wait as may, and once `stop` was called."""
        with self._changed:
            self._jobs = deque(filter(_wanted, self._jobs))
            if self._ending:
                raise Unavailable("the server ends")
            if len(self._jobs) >= self._most:
                raise Unavailable("too many requests are waiting; try again")
            self._jobs.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """Begin no more jobs, and fail those that wait or run; the one that runs ends at its next batch."""
        with self._changed:
            self._ending = True
            for job in (*([] if self._running is None else [self._running]), *self._jobs):
                job.failed(Unavailable("the server ends"))
                job.cancelled.set()
            self._jobs.clear()
            self._changed.notify()

    def close(self, patience: float | None = None) -> bool:
        """`stop`, and free the models; False, with nothing freed, if the last batch takes over `patience` seconds."""
        self.stop()
        self._thread.join(patience)
        if self._thread.is_alive():
            return False
        for other in self._open[:0:-1]:
            other.close()
        self.engine.close()
        return True

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                if _wanted(job):
                    self._computing = engine = self._take(job.prompt)
                    engine.set_cancel_check(partial(_wanted, job))
                    job.run(engine)
            except Exception as error:
                job.failed(error)
            finally:
                self._running = self._computing = None

    def _next(self) -> Job | None:
        """The job that came first, waiting for one; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._ending or self._jobs)
            self._running = None if self._ending else self._jobs.popleft()
            return self._running

    def _take(self, prompt: Sequence[int]) -> Engine:
        """The conversation that the prompt goes on from, of whose tokens it shares at least half; else a new one, or
        the one used least recently.
        """
        prefix = {engine: shared(engine.reader.held, prompt, len(prompt)) for engine in self._open}
        best = max(self._open, key=lambda engine: (prefix[engine], -len(engine.reader.held)))
        n_held = len(best.reader.held)
        if n_held and (2 * prefix[best] < n_held or not prefix[best]):
            if len(self._open) < self.n:
                best = self.engine.share_weights()
                self._open.append(best)
            else:
                best = min(self._open, key=self._used.__getitem__)
        self._used[best] = time.monotonic()
        return best
