"""What the k most frequent tokens cover: of the whole, of each source and language, of what was held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llamabase.cli.plot import drawing

from .counts import Counts, Part, add_up

SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)


def order(counts: Counts, forced: list[int]) -> np.ndarray:
    """The ids in the order in which they are kept, as far as they were counted."""
    return np.array(list(dict.fromkeys([*forced, *counts.ranked().tolist()])), np.int64)


def covered(part: Part, kept: np.ndarray) -> np.ndarray:
    """The share of a part that the first k kept ids make up, for every k from 0."""
    place = np.full(max(kept.max(initial=0), part.ids.max(initial=0)) + 1, len(kept))
    place[kept] = np.arange(len(kept))
    at = np.bincount(place[part.ids], part.counts, minlength=len(kept) + 1)
    return np.asarray(np.concatenate([[0], np.cumsum(at[:-1])]) / part.counts.sum())


def rows(counts: Counts) -> list[Part]:
    """What a table has a line for: everything, what was held out, each source, each language."""
    held = [part for part in counts.parts if part.held_out]
    counted = [part for part in counts.parts if not part.held_out]
    found = [Part("everything", "", False, counts.ids, counts.counts)]
    found += [Part("held out", "", True, *add_up(held))] if held else []
    for source in sorted({part.source for part in counted}):
        found.append(Part(source, "", False, *add_up([part for part in counted if part.source == source])))
    for label in sorted({part.label for part in counted}):
        found.append(Part("", label, False, *add_up([part for part in counted if part.label == label])))
    return found


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
        lines.append(f"{(part.source or part.label)[:24]:24s} {int(part.counts.sum()):10d} {shares}")
    return "\n".join(lines)


def plot(counts: Counts, forced: list[int], path: Path) -> None:
    """Coverage against k, one line for each source and language, as a PNG. Needs the extra [plot]."""
    kept = order(counts, forced)
    where = np.unique(np.geomspace(1, len(kept), 120).astype(int))
    with drawing(path) as figure:
        axes = figure.subplots()
        for part in rows(counts):
            if part.counts.sum():
                axes.plot(where, covered(part, kept)[where], label=part.source or part.label)
        axes.set(xscale="log", xlabel="k (tokens kept)", ylabel="share covered", title=f"Coverage of {counts.name}")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
