"""The coverage of the k most frequent tokens: of everything, of each source and language, of held-out documents."""

from __future__ import annotations

import itertools
from operator import attrgetter
from pathlib import Path

import numpy as np

from llamabase.cli.plot import drawing

from .counts import Counts, Tally, add_up

SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)


def order(counts: Counts, forced: list[int]) -> np.ndarray:
    """The forced and the counted ids, in the order in which they are kept."""
    return np.array(list(dict.fromkeys([*forced, *counts.ranked().tolist()])), np.int64)


def covered(table: Tally, kept: np.ndarray) -> np.ndarray:
    """The share of a tally that the first k kept ids make up, for every k from 0."""
    place = np.full(max(kept.max(initial=0), table.ids.max(initial=0)) + 1, len(kept))
    place[kept] = np.arange(len(kept))
    at = np.bincount(place[table.ids], table.counts, minlength=len(kept) + 1)
    return np.asarray(np.concatenate([[0], np.cumsum(at[:-1])]) / table.total)


def rows(counts: Counts) -> list[tuple[str, Tally]]:
    """The named lines of a table: everything, what was held out, each source, each language."""
    held = [part for part in counts.parts if part.group.held_out]
    lines: list[tuple[str, Tally]] = [("everything", counts)]
    lines += [("held out", Tally(*add_up(held)))] if held else []
    for name in (attrgetter("group.source"), attrgetter("group.label")):
        parts = sorted((part for part in counts.parts if not part.group.held_out), key=name)
        lines += [(key, Tally(*add_up(list(group)))) for key, group in itertools.groupby(parts, key=name)]
    return lines


def coverage_table(counts: Counts, forced: list[int]) -> str:
    """A table of coverage by k, one line for each row of `rows`."""
    kept = order(counts, forced)
    sizes = [k for k in SIZES if k < len(kept)] + [len(kept)]
    lines = [
        f"{counts.name}: {counts.total} tokens, {len(counts.ids)} different ones of {counts.n_tokens}",
        f"made from {counts.made_from}",
        *([f"always kept: {len(forced)}"] if forced else []),
        f"{'':24s} {'tokens':>10s} " + " ".join(f"{k:>7d}" for k in sizes),
    ]
    for name, table in rows(counts):
        shares = " ".join(f"{share:7.3f}" for share in covered(table, kept)[sizes]) if table.total else ""
        lines.append(f"{name[:24]:24s} {table.total:10d} {shares}")
    return "\n".join(lines)


def plot(counts: Counts, forced: list[int], path: Path) -> None:
    """Coverage against k, one line for each source and language, as a PNG. Needs the extra [plot]."""
    kept = order(counts, forced)
    where = np.unique(np.geomspace(1, len(kept), 120).astype(int))
    with drawing(path) as figure:
        axes = figure.subplots()
        for name, table in rows(counts):
            if table.total:
                axes.plot(where, covered(table, kept)[where], label=name)
        axes.set(xscale="log", xlabel="k (tokens kept)", ylabel="share covered", title=f"Coverage of {counts.name}")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
