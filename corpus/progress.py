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
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

stderr = Console(stderr=True, highlight=False, soft_wrap=True)


class Advance(Protocol):
    """Moves a bar on by an amount; a note (a rate, say) stands beside it until the next one."""

    def __call__(self, amount: float, note: str = "") -> None: ...


@contextlib.contextmanager
def progress(title: str, total: float | None, unit: str = "") -> Iterator[Advance]:
    """Show a bar with the time left and yield what moves it; `unit` is "B" for bytes, else a plural noun."""
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False), BarColumn(bar_width=None)]
    if unit == "B":
        columns += [DownloadColumn(), TransferSpeedColumn()]
    else:
        columns += [MofNCompleteColumn(), TextColumn(unit)]
    columns += [TextColumn("{task.fields[note]}", markup=False), TimeRemainingColumn()]
    with Progress(*columns, console=stderr, transient=stderr.is_terminal) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(amount: float, note: str = "") -> None:
            bar.advance(task, amount)
            if note:
                bar.update(task, note=note)

        yield advance
