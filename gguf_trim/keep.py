"""Which rows a trimmed head keeps: forced tokens first, then the most frequent, `(-count, id)`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from corpus.counts import Counts
from llamabase.errors import FileFormatError, TrimError
from llamabase.vocabulary import Vocabulary


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


def keep_counted(vocabulary: Vocabulary, n_rows: int, counts: Counts, k: int, having: np.ndarray | None = None) -> Keep:
    """Keep the first k head rows in keep order; see there. Raises TrimError for more than there are, or none."""
    order = keep_order(vocabulary, n_rows, counts, having)
    if not 1 <= k <= len(order):
        raise TrimError(f"{vocabulary.path}: k must be between 1 and its {len(order)} rows, and is {k}")
    ids = np.sort(order[:k]).astype(np.int32)
    n_forced = sum(i < n_rows and (having is None or bool(having[i])) for i in vocabulary.forced)
    return Keep(ids, min(n_forced, k), max(0, n_forced - k), counts.coverage(ids))


def k_for(
    vocabulary: Vocabulary, n_rows: int, counts: Counts, top_p: float | None = None, min_count: int | None = None
) -> int:
    """The smallest k that covers a share top_p of everything counted, or holds every token counted min_count times.

    Rounded up to a multiple of 32, which llama.cpp's repacked kernels need to work on all rows.
    """
    order = keep_order(vocabulary, n_rows, counts)
    seen = np.zeros(max(n_rows, counts.n_tokens), np.int64)
    seen[counts.ids] = counts.counts
    if top_p is not None:
        covered = np.cumsum(seen[order]) / max(1, counts.total)
        k = int(np.searchsorted(covered, min(top_p, covered[-1]))) + 1
    else:
        often = np.flatnonzero(seen[order] >= (min_count or 1))
        k = int(often[-1]) + 1 if len(often) else len(vocabulary.forced)
    return min(n_rows, -(-k // 32) * 32)


def keep_listed(vocabulary: Vocabulary, n_rows: int, listed: list[int], k: int | None = None) -> Keep:
    """Keep the listed ids (the first k of them) and every forced token."""
    unique = list(dict.fromkeys(listed))
    forced = [i for i in vocabulary.forced if i < n_rows]
    if k is not None:
        if not 1 <= k <= n_rows:
            raise TrimError(f"{vocabulary.path}: k must be between 1 and its {n_rows} rows, and is {k}")
        unique = list(dict.fromkeys([*forced, *unique]))[:k]
        return Keep(np.sort(np.array(unique, np.int32)), min(len(forced), k), max(0, len(forced) - k), None)
    return Keep(np.array(sorted({*unique, *forced}), np.int32), len(forced), 0, None)


def filled(keep: Keep, order: np.ndarray, multiple: int) -> Keep:
    """`keep` with the next tokens of a keep order, up to a multiple of rows (or all there are)."""
    held = np.isin(order, keep.ids)
    more = order[~held][: -len(keep.ids) % multiple]
    return replace(keep, ids=np.sort(np.append(order[held], more)).astype(np.int32))


def read_keep_list(path: Path, n_rows: int) -> list[int]:
    """Token ids from a text file, one a line; `#` begins a comment. Raises FileFormatError naming file and line."""
    listed = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path}: cannot be read as a list of token ids: {error}") from error
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if not text.isdecimal() or len(text) > 18 or int(text) >= n_rows:
            raise FileFormatError(f"{path}, line {number}: {text[:40]!r} is not a token id from 0 to {n_rows - 1}")
        listed.append(int(text))
    if not listed:
        raise FileFormatError(f"{path}: holds no token ids; write one a line")
    return listed
