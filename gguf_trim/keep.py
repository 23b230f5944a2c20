"""Which rows a trimmed head keeps: forced tokens first, then the most frequent, `(-count, id)`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corpus.counts import Counts
from corpus.errors import FileFormatError, TrimError
from corpus.vocabulary import Vocabulary


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


def keep_counted(vocabulary: Vocabulary, n_rows: int, counts: Counts, k: int) -> Keep:
    """Keep k of n_rows head rows: the forced tokens, then by falling count, then (counts exhausted) by id.

    Byte-pair vocabularies number frequent merges low, so the id is the best guess about what was never counted.
    Raises TrimError for k outside 1..n_rows, VocabularyMismatch for counts of another vocabulary.
    """
    if not 1 <= k <= n_rows:
        raise TrimError(f"{vocabulary.path}: k must be between 1 and its {n_rows} rows, and is {k}")
    counts.require_vocabulary(vocabulary)
    forced = np.array([i for i in vocabulary.forced if i < n_rows], np.int32)
    ranked = counts.ranked()
    order = np.concatenate([forced, ranked[ranked < n_rows], np.arange(n_rows, dtype=np.int32)])
    _, first = np.unique(order, return_index=True)
    ids = np.sort(order[np.sort(first)[:k]]).astype(np.int32)
    return Keep(ids, min(len(forced), k), max(0, len(forced) - k), counts.coverage(ids))


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
