"""Several computations in one thread, each written as if it were alone: where they read sequences of one cache, they
meet, and what they read goes into one batch.

Each computation is a coroutine (a greenlet) that is left at `Context.decode` and gone on with once its tokens are read.
So no two of them compute at the same time, and threads of llama.cpp's never get in each other's way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np
from greenlet import getcurrent, greenlet

from .context import CacheFull, Context, Part, read_parts
from .rounds import LONGEST

SHORT = LONGEST + 1  # tokens of a part that is always read whole: a round of the longest draft
PIECE = 64  # tokens of long parts that the first batch takes beside others
DELAY = 0.2  # seconds by which pieces of long parts may make a batch longer, for those that wait for it


class _Task:
    """A computation, and the part that it waits for, if any."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.coroutine = greenlet(run)
        self.part: Part | None = None
        self.asked = 0  # when, in asks of all
        self.answer: np.ndarray | BaseException | None = None

    @property
    def rest(self) -> Part:
        assert self.part is not None
        return self.part

    @property
    def long(self) -> bool:
        return len(self.rest.inputs) > SHORT


class Meeting:
    """Runs computations by turns; see the module. Contexts take part once they `meet` it.

    A computation goes as far as it can without reading. Then drafters read, all sequences of a cache in one batch,
    until every computation waits for its target; then targets read. So a batch of the target holds the rows of all. A
    long part, such as a prompt, is read in pieces beside short ones, first come first served: one piece of a cache in a
    round, which delays others by about `delay` seconds.
    """

    def __init__(self, delay: float = DELAY) -> None:
        self._delay = delay
        self._tasks: list[_Task] = []
        self._inside: _Task | None = None
        self._asks = 0
        self._piece = PIECE  # tokens of long parts that a batch takes beside short ones
        self._read_pieces: set[int] = set()  # caches that have read pieces since a target read last
        self.make_room: Callable[[Context, int], object] = lambda context, n: None

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def awaited(self) -> bool:
        return self._inside is not None and getcurrent() is self._inside.coroutine

    def begin(self, run: Callable[[], None]) -> None:
        """Add a computation. What it raises, `go_on` raises."""
        self._tasks.append(_Task(run))

    def ask(self, part: Part) -> np.ndarray:
        """What `read_parts` gives for a part, once others that share its cache are ready, too."""
        assert self._inside is not None
        self._asks += 1
        self._inside.part, self._inside.asked = part, self._asks
        answer: np.ndarray | BaseException = self._inside.coroutine.parent.switch()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        """End all computations where they wait."""
        for task in tuple(self._tasks):
            task.part, task.answer = None, None
            task.coroutine.throw()
        self._tasks.clear()

    def go_on(self) -> None:
        """Let computations go on until all wait, and read one batch."""
        for task in tuple(self._tasks):
            if task.part is None:
                self._resume(task)
        for task in self._tasks:
            if not task.rest.context.go_on():
                task.part, task.answer = None, task.rest.context.cancelled(len(task.rest.inputs))
        waiting = sorted((task for task in self._tasks if task.part is not None), key=lambda task: task.asked)
        if chosen := self._chosen(waiting):
            self._read(chosen)

    def _resume(self, task: _Task) -> None:
        self._inside, answer = task, task.answer
        task.answer = None
        try:
            task.coroutine.switch(answer) if task.coroutine else task.coroutine.switch()
        finally:
            self._inside = None
            if task.coroutine.dead:
                self._tasks.remove(task)

    def _chosen(self, waiting: list[_Task]) -> list[_Task]:
        """Those whose parts are read next: of one cache, and of one kind."""
        drafting = [task for task in waiting if not task.rest.context.read_last]
        first = next((task for task in drafting if not task.long or self._is_due(task)), None)
        if first is None:
            self._read_pieces.clear()
            first = next((task for task in waiting if task.rest.context.read_last), waiting[0] if waiting else None)
        if first is None:
            return []
        kind = _kind(first.rest)
        return [task for task in waiting if _kind(task.rest) == kind]

    def _is_due(self, task: _Task) -> bool:
        return task.rest.context.cache not in self._read_pieces

    def _read(self, tasks: Iterable[_Task]) -> None:
        """Read the parts of some tasks, of long ones a piece, as far as a batch has room."""
        tasks = sorted(tasks, key=lambda task: task.long)  # sorting keeps the order in which they came
        context = tasks[0].rest.context
        room, outputs, alone = context.n_batch, context.batch_outputs, len(self._tasks) == 1
        pieces = room if alone else self._piece
        parts: dict[_Task, Part] = {}
        for task in tasks:
            part = task.rest
            n = len(part.inputs)
            if task.long:
                n = min(n, room, pieces)
                if n < len(part.inputs):
                    n = min(n, len(part.inputs) - part.outputs)
            if not 0 < n <= room or (n == len(part.inputs) and part.outputs > outputs):
                continue
            whole = n == len(part.inputs)
            parts[task] = part if whole else part._replace(inputs=part.inputs[:n], outputs=0)
            room -= n
            outputs -= parts[task].outputs
            if task.long:
                pieces -= n
                self._read_pieces.add(context.cache)
        n = context.n_batch - room
        self.make_room(context, n)
        started = time.perf_counter()
        answers = self._answers(parts)
        if n > SHORT * len(parts):
            most = n * self._delay / (time.perf_counter() - started)
            self._piece = int(max(SHORT, min(most, context.n_batch)))
        for (task, part), answer in zip(parts.items(), answers, strict=True):
            n = len(part.inputs)
            if answer is None:
                continue
            if n == len(task.rest.inputs) or isinstance(answer, BaseException):
                task.part, task.answer = None, answer
            else:
                task.part = task.rest._replace(inputs=task.rest.inputs[n:])

    def _answers(self, parts: dict[_Task, Part]) -> list[np.ndarray | BaseException | None]:
        """What reading parts in one batch gives; if that fails, what each of them gives alone. If the cache has no room
        for all, the computation that was begun last fails, and the others go on waiting (None).
        """
        try:
            return list(read_parts(list(parts.values())))
        except CacheFull as error:
            if next(iter(parts.values())).context.n_parallel == 1:
                return [error]
            last = self._tasks[-1]  # it may wait for its drafter
            last.part, last.answer = None, error
            return [None] * len(parts)
        except Exception as error:
            if len(parts) == 1:
                return [error]
        alone = list[np.ndarray | BaseException | None]()
        for part in parts.values():
            try:
                alone.append(read_parts([part])[0].copy())
            except Exception as error:
                alone.append(error)
        return alone


def _kind(part: Part) -> tuple[int, bool, bool]:
    """Parts of one kind can be read in one batch."""
    return part.context.cache, part.is_ids, part.hidden
