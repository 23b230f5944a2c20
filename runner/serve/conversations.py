"""Conversations over one pair, computed together: each batch of the target holds the rows of all that go on.

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

from llamabase.llama.context import Context
from llamabase.llama.meeting import Meeting
from runner.draft.reading import shared
from runner.loop.engine import Engine


@dataclass(eq=False)
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
    """The engine's own conversation and, as they are needed, others over its weights, `n` in all, each computed as soon
    as there is a job for it, whose prompt the cache has room for. Jobs begin in the order in which they came.

    At most `waiting` jobs wait; cancelled ones do not count.
    """

    def __init__(self, engine: Engine, n: int, waiting: int) -> None:
        self.engine, self.n, self._most = engine, n, waiting
        self._open = [engine]
        self._used = {engine: 0.0}  # when, by time.monotonic
        self._jobs: deque[Job] = deque()
        self._running: dict[Job, Engine | None] = {}  # None until a job has its conversation
        self._ending = False
        self._changed = threading.Condition()
        self._meeting = Meeting()
        self._meeting.make_room = self._make_room
        engine.meet(self._meeting)
        self._thread = threading.Thread(target=self._work, name="computing", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        with self._changed:
            return sum(map(_wanted, self._jobs))

    @property
    def busy(self) -> int:
        """How many conversations are being computed."""
        return len(self._running)

    @property
    def slots(self) -> list[Slot]:
        computing = tuple(self._running.values())
        slots = [Slot(len(engine.reader.held), engine in computing) for engine in tuple(self._open)]
        return slots + [Slot()] * (self.n - len(slots))

    def submit(self, job: Job) -> None:
        """Raises Unavailable if as many wait as may, and once `stop` was called."""
        with self._changed:
            self._jobs = deque(filter(_wanted, self._jobs))
            if self._ending:
                raise Unavailable("the server ends")
            if len(self._jobs) >= self._most + self.n - len(self._running):  # some will begin at once
                raise Unavailable("too many requests are waiting; try again")
            self._jobs.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """Begin no more jobs, and fail those that wait or run; those that run end at their next batch."""
        with self._changed:
            self._ending = True
            for job in (*self._running, *self._jobs):
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
        while self._took_jobs():
            self._meeting.go_on()

    def _took_jobs(self) -> bool:
        """Begin the jobs that there are conversations for, waiting for one if nothing runs; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._ending or self._jobs or self._running)
            if self._ending and not self._running:
                return False
            jobs, self._jobs = list[Job](), deque(filter(_wanted, self._jobs))
            while self._jobs and len(self._running) < self.n and self._fits(self._jobs[0]):
                jobs.append(self._jobs.popleft())
                self._running[jobs[-1]] = None  # so that `stop` finds it
        for job in jobs:
            try:
                self._running[job] = engine = self._take(job.prompt)
            except Exception as error:  # no room for another conversation
                del self._running[job]
                job.failed(error)
            else:
                engine.set_cancel_check(partial(_wanted, job))
                self._meeting.begin(partial(self._run, job, engine))
        return True

    def _fits(self, job: Job) -> bool:
        """Whether the cache has room for a prompt beside those that are computed, if they share it."""
        context = self.engine.context
        held = [max(len(one.prompt), len(at.reader.held) if at else 0) for one, at in self._running.items()]
        return not held or context.n_parallel == 1 or sum(held) + len(job.prompt) <= context.n_cells

    def _run(self, job: Job, engine: Engine) -> None:
        try:
            if _wanted(job):
                job.run(engine)
        except Exception as error:
            job.failed(error)
        finally:
            del self._running[job]

    def _take(self, prompt: Sequence[int]) -> Engine:
        """The conversation that the prompt goes on from, of whose tokens it shares at least half; else a new one, or
        the one used least recently. None that is being computed.
        """
        computing = set(self._running.values())
        free = [engine for engine in self._open if engine not in computing]
        prefix = {engine: shared(engine.reader.held, prompt, len(prompt)) for engine in free}
        best = max(free, key=lambda engine: (prefix[engine], -len(engine.reader.held)), default=None)
        n_held = 0 if best is None else len(best.reader.held)
        if best is None or (n_held and (2 * prefix[best] < n_held or not prefix[best])):
            if len(self._open) < self.n:
                best = self.engine.share_weights()
                best.meet(self._meeting)
                self._open.append(best)
            else:
                best = min(free, key=self._used.__getitem__)
        self._used[best] = time.monotonic()
        return best

    def _make_room(self, context: Context, n: int) -> None:
        """Forget conversations that nobody computes, the one used least recently first, until n tokens fit a cache."""
        computing = set(self._running.values())
        idle = sorted((engine for engine in self._open if engine not in computing), key=self._used.__getitem__)
        held = [each for engine in self._open for each in engine.contexts if each.cache == context.cache]
        while idle and sum(each.n_past for each in held) + n > context.n_cells:
            idle.pop(0).forget()
