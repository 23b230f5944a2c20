"""Progress on stderr for work that takes more than a moment; stdout stays for data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from rich import progress as bars
from rich.console import Console
from rich.status import Status
from rich.table import Column
from rich.text import Text

stderr = Console(stderr=True, highlight=False, soft_wrap=True)

_now: list[tuple[str, Status | None]] = []  # titles of the work in progress, the innermost last; bars have no spinner


def doing() -> str:
    """The title of the innermost work in progress, or "". Any thread may ask."""
    return next((title for title, _ in _now[-1:]), "")


@contextlib.contextmanager
def _in_front(title: str, spinner: Status | None = None) -> Iterator[None]:
    """Make this the work in progress; an outer spinner stops meanwhile, because a terminal shows one at a time."""
    outer = _now[-1][1] if _now else None
    if outer is not None:
        outer.stop()
    _now.append((title, spinner))
    try:
        yield
    finally:
        _now.pop()
        if outer is not None:
            outer.start()


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Show a spinner for work of unknown length; bars inside it take its place while they last."""
    spinner = stderr.status(Text(title), spinner_style="dim")
    with _in_front(title, spinner), spinner:
        yield


class Advance(Protocol):
    """Advances a bar by an amount; a note (such as a rate) stays beside it until the next one."""

    def __call__(self, amount: float, note: str = "") -> None: ...


class _Title(bars.ProgressColumn):
    """The title, which is shortened first in a narrow terminal, so that the bar stays on one line."""

    def render(self, task: bars.Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


@contextlib.contextmanager
def progress(title: str, total: float | None, unit: str = "") -> Iterator[Advance]:
    """Show a bar with the time left and yield what advances it; `unit` is "B" for bytes, else a plural noun."""
    columns: list[bars.ProgressColumn] = [_Title(), bars.BarColumn(bar_width=None)]
    whole = Column(no_wrap=True)
    if unit == "B":
        columns += [bars.DownloadColumn(table_column=whole), bars.TransferSpeedColumn(table_column=whole)]
    else:
        columns += [bars.MofNCompleteColumn(table_column=whole), bars.TextColumn(unit)]
    columns += [bars.TextColumn("{task.fields[note]}", markup=False), bars.TimeRemainingColumn(table_column=whole)]
    with _in_front(title), bars.Progress(*columns, console=stderr, transient=stderr.is_terminal) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(amount: float, note: str = "") -> None:
            bar.advance(task, amount)
            if note:
                bar.update(task, note=note)

        yield advance
