"""Several remembered conversations over one pair, computed one request at a time in order of arrival.

One thread computes. Each request takes the conversation that shares its beginning, so that clients who take turns do
not have their prompts read anew.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from ..engine import Engine
from ..reading import shared


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


class Full(Exception):
    """The queue is."""


class Conversations:
    """The engine's own conversation and, as they are needed, others over its weights, `n` in all."""

    def __init__(self, engine: Engine, n: int, waiting: int) -> None:
        self.engine, self.n = engine, n
        self._open = [engine]
        self._used = {id(engine): 0.0}
        self._jobs: queue.Queue[Job | None] = queue.Queue(waiting)
        self._running: Job | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="computing", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return self._jobs.qsize()

    @property
    def busy(self) -> bool:
        return self._running is not None

    def submit(self, job: Job) -> None:
        """Raises Full where as many are waiting as may."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Full from None

    def stop(self) -> None:
        """End what runs at its next batch, and begin nothing more."""
        self._ending.set()
        if (running := self._running) is not None:
            running.cancelled.set()

    def close(self) -> None:
        """`stop`, and free the models."""
        self.stop()
        while True:  # a full queue has no room for the last word
            try:
                self._jobs.put(None, timeout=0.05)
                break
            except queue.Full:
                self._drop()
        self._thread.join()
        for other in self._open[:0:-1]:
            other.close()
        self.engine.close()

    def _drop(self) -> None:
        while not self._jobs.empty():
            if (job := self._jobs.get_nowait()) is not None:
                job.failed(Full())

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._ending.is_set():
                job.failed(Full())
                continue
            if job.cancelled.is_set():
                continue
            self._running = job
            try:
                engine = self._take(job.prompt)
                engine.heed(partial(_wanted, job))
                job.run(engine)
            except Exception as error:
                job.failed(error)
            finally:
                self._running = None

    def _take(self, prompt: Sequence[int]) -> Engine:
        """The conversation that this prompt goes on with: it shares at least half of what that holds. Else a new one,
        or the one that was left alone longest.
        """
        held = {id(engine): shared(engine.reader.held, prompt, len(prompt)) for engine in self._open}
        best = max(self._open, key=lambda engine: (held[id(engine)], -len(engine.reader.held)))
        if 2 * held[id(best)] < len(best.reader.held) or (not held[id(best)] and best.reader.held):
            if len(self._open) < self.n:
                best = self.engine.twin()
                self._open.append(best)
            else:
                best = min(self._open, key=lambda engine: self._used[id(engine)])
        self._used[id(best)] = time.monotonic()
        return best
