"""Counting on an existing Dask cluster: each file anywhere, then the sum, which is the same in any order."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llamabase.cli.progress import progress
from llamabase.errors import TrimError

from .count import NothingToCount, count, name_of
from .counts import Counts, merge
from .sources import LeftOut, files_of

PATIENCE = 10.0  # seconds in which a scheduler has to answer


def _count_file(file: str, folder: str, tokenizer: Path, field: str, skip_bad: bool) -> tuple[Counts | None, LeftOut]:
    """On a worker, which sees the same paths: the counts of one file (None without text), and what was left out."""
    left_out = LeftOut([] if skip_bad else None)
    with contextlib.suppress(NothingToCount):
        return count([file], tokenizer, field, folder=folder, left_out=left_out), left_out
    return None, left_out


def count_on(address: str, sources: Sequence[str], tokenizer: Path, field: str, left_out: LeftOut) -> Counts:
    """What `count` returns, computed on a cluster; the files of a worker that dies are counted elsewhere."""
    try:
        from distributed import Client
    except ImportError as error:
        raise TrimError("--dask needs the extra: pip install 'gguf-trim[cluster]'") from error
    files = [(source, file) for source in sources for file in files_of(source)]
    folders = ["" if file == source else name_of(source) for source, file in files]
    try:
        client = Client(address, timeout=PATIENCE)
    except (OSError, ValueError) as error:
        raise TrimError(f"{address}: no Dask scheduler answers there ({error})") from error
    tables: list[Counts] = []
    with client, progress("counting", len(files), "files") as advance:
        settings = {"tokenizer": tokenizer.absolute(), "field": field, "skip_bad": left_out.rows is not None}
        paths = [str(Path(file).absolute()) for _, file in files]
        for future in client.map(_count_file, paths, folders, **settings, pure=False):
            table, unread = future.result()
            tables += [] if table is None else [table]
            left_out.add(unread)
            advance(1)
    if not tables:
        raise NothingToCount(f"{', '.join(sources)}: no text to count")
    return replace(merge(tables), made_from=", ".join(sorted(sources)))
