"""The coverage of the k most frequent tokens: of everything, of each source and language, of held-out documents."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import numpy as np

from llamabase.cli.plot import drawing

from .counts import Counts, Part, add_up

SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)


def order(counts: Counts, forced: list[int]) -> np.ndarray:
    """The forced and the counted ids, in the order in which they are kept."""
    return np.array(list(dict.fromkeys([*forced, *counts.ranked().tolist()])), np.int64)


def covered(part: Part, kept: np.ndarray) -> np.ndarray:
    """The share of a part that the first k kept ids make up, for every k from 0."""
    place = np.full(max(kept.max(initial=0), part.ids.max(initial=0)) + 1, len(kept))
    place[kept] = np.arange(len(kept))
    at = np.bincount(place[part.ids], part.counts, minlength=len(kept) + 1)
    return np.asarray(np.concatenate([[0], np.cumsum(at[:-1])]) / part.counts.sum())


def rows(counts: Counts) -> list[Part]:
    """One part for each line of a table: everything, what was held out, each source, each language."""
    held = [part for part in counts.parts if part.held_out]
    counted = [part for part in counts.parts if not part.held_out]
    named: list[tuple[str, Sequence[Part | Counts]]] = [("everything", [counts])]
    named += [("held out", held)] if held else []
    for name_of in (attrgetter("source"), attrgetter("label")):
        parts = sorted(counted, key=name_of)
        named += [(name, list(group)) for name, group in itertools.groupby(parts, key=name_of)]
    return [Part(name, "", False, *add_up(tables)) for name, tables in named]


def coverage_table(counts: Counts, forced: list[int]) -> str:
    """A table of coverage by k, one line for each row of `rows`."""
    kept = order(counts, forced)
    sizes = [k for k in SIZES if k < len(kept)] + [len(kept)]
    lines = [
        f"{counts.name}: {counts.total} tokens, {len(counts.ids)} different ones of {counts.n_tokens}",
        f"made from {counts.made_from}",
        *([f"always kept: {len(forced)}"] if forced else []),
    ]
    lines.append(f"{'':24s} {'tokens':>10s} " + " ".join(f"{k:>7d}" for k in sizes))
    for part in rows(counts):
        shares = " ".join(f"{share:7.3f}" for share in covered(part, kept)[sizes]) if part.counts.sum() else ""
        lines.append(f"{part.source[:24]:24s} {int(part.counts.sum()):10d} {shares}")
    return "\n".join(lines)


def plot(counts: Counts, forced: list[int], path: Path) -> None:
    """Coverage against k, one line for each source and language, as a PNG. Needs the extra [plot]."""
    kept = order(counts, forced)
    where = np.unique(np.geomspace(1, len(kept), 120).astype(int))
    with drawing(path) as figure:
        axes = figure.subplots()
        for part in rows(counts):
            if part.counts.sum():
                axes.plot(where, covered(part, kept)[where], label=part.source)
        axes.set(xscale="log", xlabel="k (tokens kept)", ylabel="share covered", title=f"Coverage of {counts.name}")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
