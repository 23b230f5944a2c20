"""Several remembered conversations over one pair, computed one request at a time in order of arrival.

One thread computes. Each request takes the conversation that shares its beginning, so that clients who take turns do
not have their prompts read anew.
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
    """Something to compute: `run` is called with a conversation that has read as much of the prompt as any.

    One that is `cancelled` ends at the next batch; `failed` hears of an error.
    """

    prompt: Sequence[int]
    run: Callable[[Engine], None]
    failed: Callable[[BaseException], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


def _wanted(job: Job) -> bool:
    return not job.cancelled.is_set()


class Unavailable(Exception):
    """Nothing more is taken now: the queue is full, or the server ends."""


class Conversations:
    """The engine's own conversation and, as they are needed, others over its weights, `n` in all.

    At most `waiting` jobs wait; those that nobody wants any more do not count.
    """

    def __init__(self, engine: Engine, n: int, waiting: int) -> None:
        self.engine, self.n, self._most = engine, n, waiting
        self._open = [engine]
        self._used = {id(engine): 0.0}
        self._jobs: deque[Job] = deque()
        self._running: Job | None = None
        self._computing: Engine | None = None
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
    def slots(self) -> list[tuple[int, bool]]:
        """Of each conversation that may be remembered: tokens it holds, and whether it is being computed."""
        found = [(len(engine.reader.held), engine is self._computing) for engine in tuple(self._open)]
        return found + [(0, False)] * (self.n - len(found))

    def submit(self, job: Job) -> None:
        """Raises Unavailable where as many are waiting as may, and once `stop` was called."""
        with self._changed:
            self._jobs = deque(filter(_wanted, self._jobs))
            if self._ending:
                raise Unavailable("the server ends")
            if len(self._jobs) >= self._most:
                raise Unavailable("too many requests are waiting; try again")
            self._jobs.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """Begin nothing more, and tell whoever waits or is being answered; what runs ends at its next batch."""
        with self._changed:
            self._ending = True
            for job in (*([] if self._running is None else [self._running]), *self._jobs):
                job.failed(Unavailable("the server ends"))
                job.cancelled.set()
            self._jobs.clear()
            self._changed.notify()

    def close(self, patience: float | None = None) -> bool:
        """`stop`, and free the models; False, with nothing freed, where the last batch takes longer than `patience`."""
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
                self._computing = engine = self._take(job.prompt)
                engine.set_cancel_check(partial(_wanted, job))
                job.run(engine)
            except Exception as error:
                job.failed(error)
            finally:
                self._running = self._computing = None

    def _next(self) -> Job | None:
        """The job that came first, once there is one; None at the end."""
        with self._changed:
            while not self._ending:
                while self._jobs:
                    if _wanted(job := self._jobs.popleft()):
                        self._running = job
                        return job
                self._changed.wait()
        return None

    def _take(self, prompt: Sequence[int]) -> Engine:
        """The conversation that this prompt goes on with: it shares at least half of what that holds. Else a new one,
        or the one that was left alone longest.
        """
        held = {id(engine): shared(engine.reader.held, prompt, len(prompt)) for engine in self._open}
        best = max(self._open, key=lambda engine: (held[id(engine)], -len(engine.reader.held)))
        if 2 * held[id(best)] < len(best.reader.held) or (not held[id(best)] and best.reader.held):
            if len(self._open) < self.n:
                best = self.engine.share_weights()
                self._open.append(best)
            else:
                best = min(self._open, key=lambda engine: self._used[id(engine)])
        self._used[id(best)] = time.monotonic()
        return best
