"""Counting on an existing Dask cluster: the same files, counted one by one anywhere, added up in any order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llamabase.errors import TrimError
from llamabase.progress import progress

from .count import NothingToCount, count, name_of
from .counts import Counts, merge
from .sources import files_of

PATIENCE = 10.0  # seconds in which a scheduler has to answer


def _count_shard(shard: tuple[str, str], tokenizer: str, field: str, skip_bad: bool) -> Counts | None:
    """One file of a source, on a worker that sees the same paths; None for a file that holds no text."""
    name, file = shard
    try:
        return count([file], Path(tokenizer), field, name=name, bad=[] if skip_bad else None)
    except NothingToCount:
        return None


def count_on(address: str, sources: list[str], tokenizer: Path, field: str, skip_bad: bool) -> Counts:
    """The counts of `sources`, file by file on a cluster; a worker that dies has its files counted elsewhere."""
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise TrimError("--dask needs the extra: pip install 'gguf-trim[cluster]'") from error
    shards = [(name_of(source), str(Path(file).resolve())) for source in sources for file, _ in files_of([source])]
    try:
        client = Client(address, timeout=PATIENCE)
    except (OSError, ValueError) as error:
        raise TrimError(f"{address}: no Dask scheduler answers there ({error})") from error
    found: list[Counts] = []
    with client:
        settings = {"tokenizer": str(tokenizer.resolve()), "field": field, "skip_bad": skip_bad}
        futures = client.map(_count_shard, shards, **settings, pure=False)
        with progress("counting", len(shards), "files") as advance:
            for future in as_completed(futures):
                table = future.result()
                found += [] if table is None else [table]
                advance(1)
    if not found:
        raise TrimError(f"{', '.join(sources)}: no text to count")
    return replace(merge(found), made_from=", ".join(sorted(sources)))
