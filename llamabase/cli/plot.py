"""Plots as PNG files, drawn by matplotlib: an extra."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamabase.errors import TrimError
from llamabase.files import PLOT, write_whole


@contextlib.contextmanager
def drawing(path: Path, size: tuple[float, float] = (8, 5), dpi: int = 120) -> Iterator[Any]:
    """Yield a matplotlib Figure (size in inches) to draw on, then write it. Raises TrimError without [plot]."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TrimError(f"{path}: plots need the extra: pip install 'gguf-trim[plot]'") from error
    figure = Figure(figsize=size, layout="constrained")
    yield figure
    with write_whole(path, PLOT) as file:
        figure.savefig(file, format="png", dpi=dpi)
