"""Progress on stderr for work that takes more than a moment; stdout stays for data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column
from rich.text import Text

stderr = Console(stderr=True, highlight=False, soft_wrap=True)


class Advance(Protocol):
    """Moves a bar on by an amount; a note (a rate, say) stands beside it until the next one."""

    def __call__(self, amount: float, note: str = "") -> None: ...


class _Title(ProgressColumn):
    """What goes on; the first to give way in a narrow terminal, so that the bar stays on one line."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


@contextlib.contextmanager
def progress(title: str, total: float | None, unit: str = "") -> Iterator[Advance]:
    """Show a bar with the time left and yield what moves it; `unit` is "B" for bytes, else a plural noun."""
    columns: list[ProgressColumn] = [_Title(), BarColumn(bar_width=None)]
    whole = Column(no_wrap=True)
    if unit == "B":
        columns += [DownloadColumn(table_column=whole), TransferSpeedColumn(table_column=whole)]
    else:
        columns += [MofNCompleteColumn(table_column=whole), TextColumn(unit)]
    columns += [TextColumn("{task.fields[note]}", markup=False), TimeRemainingColumn(table_column=whole)]
    with Progress(*columns, console=stderr, transient=stderr.is_terminal) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(amount: float, note: str = "") -> None:
            bar.advance(task, amount)
            if note:
                bar.update(task, note=note)

        yield advance
