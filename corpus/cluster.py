"""Counting on an existing Dask cluster: the same files, counted one by one anywhere, added up in any order."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from llamabase.cli.progress import progress
from llamabase.errors import TrimError

from .count import NothingToCount, count, name_of
from .counts import Counts, merge
from .sources import files_of

PATIENCE = 10.0  # seconds in which a scheduler has to answer


Shard = tuple[Counts | None, list[str], list[str]]  # None for a file without text; its bad rows; its name if left out


def _count_shard(shard: tuple[str, str], tokenizer: str, field: str, skip_bad: bool) -> Shard:
    """One file of a source, on a worker that sees the same paths."""
    name, file = shard
    bad: list[str] = []
    left_out: list[str] = []
    counts = None
    with contextlib.suppress(NothingToCount):
        counts = count([file], Path(tokenizer), field, name=name, bad=bad if skip_bad else None, left_out=left_out)
    return counts, bad, left_out


def count_on(
    address: str, sources: list[str], tokenizer: Path, field: str, bad: list[str] | None, left_out: list[str]
) -> Counts:
    """The counts of `sources`, file by file on a cluster; a worker that dies has its files counted elsewhere.

    `bad` and `left_out` get what `count` adds to them, in the order of the files; None refuses bad rows.
    """
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise TrimError("--dask needs the extra: pip install 'gguf-trim[cluster]'") from error
    shards = [(name_of(source), str(Path(file).resolve())) for source in sources for file, _ in files_of([source])]
    try:
        client = Client(address, timeout=PATIENCE)
    except (OSError, ValueError) as error:
        raise TrimError(f"{address}: no Dask scheduler answers there ({error})") from error
    found: list[Shard | None] = [None] * len(shards)
    with client:
        settings = {"tokenizer": str(tokenizer.resolve()), "field": field, "skip_bad": bad is not None}
        futures = client.map(_count_shard, shards, **settings, pure=False)
        with progress("counting", len(shards), "files") as advance:
            places = {future.key: i for i, future in enumerate(futures)}
            for future in as_completed(futures):
                found[places[future.key]] = future.result()
                advance(1)
    done = [shard for shard in found if shard is not None]
    left_out += [line for shard in done for line in shard[2]]
    if bad is not None:
        bad += [line for shard in done for line in shard[1]]
    tables = [shard[0] for shard in done if shard[0] is not None]
    if not tables:
        raise NothingToCount(f"{', '.join(sources)}: no text to count")
    return replace(merge(tables), made_from=", ".join(sorted(sources)))
