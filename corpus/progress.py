"""Progress on stderr for work that takes more than a moment; stdout stays for data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

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


@contextlib.contextmanager
def progress(title: str, total: float | None, unit: str = "") -> Iterator[Callable[[float], None]]:
    """Show a bar with the time left and yield `advance(amount)`; `unit` is "B" for bytes, else a plural noun."""
    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False), BarColumn(bar_width=None)]
    if unit == "B":
        columns += [DownloadColumn(), TransferSpeedColumn()]
    else:
        columns += [MofNCompleteColumn(), TextColumn(unit)]
    bar = Progress(*columns, TimeRemainingColumn(), console=stderr, transient=stderr.is_terminal)
    with bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.advance(task, amount)
