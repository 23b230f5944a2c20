"""Which rows a trimmed head keeps: forced tokens first, then the most frequent, `(-count, id)`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corpus.counts import Counts
from corpus.ready import ranking_counts
from llamabase.errors import FileFormatError, TrimError
from llamabase.files import read_text
from llamabase.gguf.vocabulary import Vocabulary

DEFAULT_K = 16384
MULTIPLE = 16  # rows at a time in llama.cpp's kernels; what is left over goes another way, with other last bits


@dataclass(frozen=True)
class Keep:
    """`ids`: int32, ascending, unique. `n_forced` of them are there whatever was counted."""

    ids: np.ndarray
    n_forced: int
    n_forced_left_out: int
    coverage: float | None  # share of the counted tokens that the ids make up

    @property
    def k(self) -> int:
        return len(self.ids)


def keep_order(vocabulary: Vocabulary, n_rows: int, counts: Counts, having: np.ndarray | None = None) -> np.ndarray:
    """Every row id (int64) in the order in which it is kept: forced, then by falling count, then by id.

    `having` (bool by id) says which ids the head has rows of; None: of all.

    Byte-pair vocabularies number frequent merges low, so the id is the best guess about what was never counted.
    Raises VocabularyMismatch for counts of another vocabulary.
    """
    counts.require_vocabulary(vocabulary)
    forced = np.array([i for i in vocabulary.forced if i < n_rows], np.int64)
    ranked = counts.ranked()
    order = np.concatenate([forced, ranked[ranked < n_rows], np.arange(n_rows)])
    _, first = np.unique(order, return_index=True)
    order = order[np.sort(first)]
    return order if having is None else order[having[order]]


def _first(
    vocabulary: Vocabulary, n_rows: int, order: np.ndarray, k: int, counts: Counts | None = None, multiple: int = 1
) -> Keep:
    """Keep the first k rows of an order that begins with the forced ones, k rounded up to a multiple.

    Raises TrimError for k outside 1..n_rows.
    """
    n_rows = min(n_rows, len(order)) if counts is not None else n_rows
    if not 1 <= k <= n_rows:
        raise TrimError(f"{vocabulary.path}: k must be between 1 and its {n_rows} rows, and is {k}")
    k = -(-k // multiple) * multiple
    ids = np.sort(order[:k]).astype(np.int32)
    n_forced = int(np.isin(vocabulary.forced, order).sum())
    return Keep(ids, min(n_forced, k), max(0, n_forced - k), None if counts is None else counts.coverage(ids))


def keep_counted(vocabulary: Vocabulary, n_rows: int, counts: Counts, k: int) -> Keep:
    """Keep the first k of n_rows head rows in keep order. Raises TrimError for k outside 1..n_rows."""
    return _first(vocabulary, n_rows, keep_order(vocabulary, n_rows, counts), k, counts)


def keep_listed(
    vocabulary: Vocabulary, n_rows: int, listed: list[int], k: int | None = None, having: np.ndarray | None = None
) -> Keep:
    """Keep every forced token and the listed ids; of these in this order the first k. `having`: see `keep_order`."""
    order = np.array(list(dict.fromkeys([*(i for i in vocabulary.forced if i < n_rows), *listed])))
    order = order if having is None else order[having[order]]
    return _first(vocabulary, n_rows, order, len(order) if k is None else k)


def _k_for(order: np.ndarray, n_forced: int, counts: Counts, top_p: float | None, min_count: int | None) -> int:
    """The smallest k of a keep order to cover a share top_p of the counts, or all that was counted min_count times.

    Rounded up to a multiple of 32, which llama.cpp's repacked kernels need to work on all rows.
    """
    n_rows = len(order)
    seen = np.zeros(max(int(order.max()) + 1, counts.n_tokens), np.int64)
    seen[counts.ids] = counts.counts
    if top_p is not None:
        covered = np.cumsum(seen[order]) / max(1, counts.total)
        k = int(np.searchsorted(covered, min(top_p, covered[-1]))) + 1
    else:
        often = np.flatnonzero(seen[order] >= (min_count or 1))
        k = int(often[-1]) + 1 if len(often) else n_forced
    return min(n_rows, -(-k // 32) * 32)


def read_keep_list(path: Path, n_rows: int) -> list[int]:
    """Token ids from a text file, one a line; `#` begins a comment. Raises FileFormatError naming file and line."""
    listed = []
    for number, line in enumerate(read_text(path, "a list of token ids").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if not text.isdecimal() or len(text) > 18 or int(text) >= n_rows:
            raise FileFormatError(f"{path}, line {number}: {text[:40]!r} is not a token id from 0 to {n_rows - 1}")
        listed.append(int(text))
    if not listed:
        raise FileFormatError(f"{path}: holds no token ids; write one a line")
    return listed


def choose_rows(
    vocabulary: Vocabulary,
    n_rows: int,
    k: int | None = None,
    counts: Path | None = None,
    keep_file: Path | None = None,
    top_p: float | None = None,
    min_count: int | None = None,
    having: np.ndarray | None = None,
    multiple: int = MULTIPLE,
) -> Keep:
    """The rows to keep: those listed in a file, or the most frequent by counts (the shipped ones for None).

    How many: k, or as many as cover a share top_p of the counts, or as were counted min_count times; filled up to a
    `multiple` in keep order. `having` (bool by id): which ids there are rows of, None for all.
    """
    listed = None
    if keep_file is not None:
        ids = read_keep_list(keep_file, n_rows)
        if having is not None and not having[ids].any():
            raise TrimError(f"{keep_file}: the head to be cut has a row for none of these ids; list ids that it has")
        listed = keep_listed(vocabulary, n_rows, ids, k, having)
        if listed.k % multiple == 0:
            return listed
    counted = ranking_counts(vocabulary, counts)
    order = keep_order(vocabulary, n_rows, counted, having)
    if listed is not None:
        held = np.isin(order, listed.ids)
        order, k = np.append(order[held], order[~held]), listed.k
    elif top_p is not None or min_count is not None:
        k = _k_for(order, int(np.isin(vocabulary.forced, order).sum()), counted, top_p, min_count)
    return _first(vocabulary, n_rows, order, DEFAULT_K if k is None else k, counted, multiple)
