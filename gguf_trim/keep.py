"""Which rows a trimmed head keeps: forced tokens first, then the most frequent, `(-count, id)`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from corpus.counts import Counts
from corpus.ready import ranking_counts
from gguf_trim.exchange.token_ids import read_token_ids
from llamabase.errors import TrimError, VocabularyMismatch
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary, require_same

DEFAULT_K = 16384
MULTIPLE = 16  # rows that llama.cpp's kernels take at a time: another one takes the rest, and rounds differently
REPACKED = 32  # rows that its kernels for repacked tables take at a time


@dataclass(frozen=True)
class Keep:
    """`ids`: int32, ascending, unique; `n_forced` of them are kept whatever was counted."""

    ids: np.ndarray
    n_forced: int
    n_forced_left_out: int
    counts: Counts | None  # what ranked the ids

    @property
    def k(self) -> int:
        return len(self.ids)

    @property
    def coverage(self) -> float | None:
        """Share of the counted tokens that the ids make up."""
        return None if self.counts is None else self.counts.coverage(self.ids)


class ChooseRows(Protocol):
    """Chooses the rows that a head keeps, their number rounded up to a multiple.

    `has_row` (bool by token id): the ids that the head has a row for, of which the kept ones are taken.
    """

    def __call__(self, vocabulary: Vocabulary, has_row: np.ndarray, multiple: int, /) -> Keep: ...


def keep_order(vocabulary: Vocabulary, has_row: np.ndarray, counts: Counts) -> np.ndarray:
    """Every id (int64) of `has_row`, see ChooseRows, in keep order: forced, then by falling count, then by id.

    Byte-pair vocabularies number frequent merges low, so the id is the best guess about what was never counted.
    Raises VocabularyMismatch for counts of another vocabulary.
    """
    counts.require_vocabulary(vocabulary)
    return _distinct(has_row, vocabulary.forced, counts.ranked(), np.arange(len(has_row)))


def keep_listed(vocabulary: Vocabulary, has_row: np.ndarray, listed: list[int], k: int | None = None) -> Keep:
    """Keep the forced tokens and the listed ids that have a row, or the first k of these."""
    _require_k(vocabulary, len(has_row), k)
    return _first(vocabulary, _distinct(has_row, vocabulary.forced, listed), k)


def first_rows(vocabulary: Vocabulary, has_row: np.ndarray, multiple: int = MULTIPLE, *, k: int = DEFAULT_K) -> Keep:
    """A ChooseRows that counts nothing: the forced tokens, and of the others the first ids, k rows in all."""
    order = _distinct(has_row, vocabulary.forced, np.arange(len(has_row)))
    _require_k(vocabulary, len(order), k)
    return _first(vocabulary, order, -(-k // multiple) * multiple)


def _distinct(has_row: np.ndarray, *parts: np.ndarray | list[int]) -> np.ndarray:
    """The ids of the parts that have a row, each at its first place."""
    ids = np.concatenate([np.asarray(part, np.int64) for part in parts])
    ids = ids[ids < len(has_row)]
    ids = ids[has_row[ids]]
    _, first = np.unique(ids, return_index=True)
    return np.asarray(ids[np.sort(first)])


def _require_k(vocabulary: Vocabulary, n_rows: int, k: int | None) -> None:
    if k is not None and not 1 <= k <= n_rows:
        raise TrimError(f"{vocabulary.path}: k must be between 1 and its {n_rows} rows, and is {k}")


def _first(vocabulary: Vocabulary, order: np.ndarray, k: int | None, counts: Counts | None = None) -> Keep:
    """Keep the first k ids of an order that begins with the forced ones, or all if it has fewer."""
    ids = np.sort(order[:k]).astype(np.int32)
    n_forced = int(np.isin(vocabulary.forced, order).sum())
    kept = min(n_forced, len(ids))
    return Keep(ids, kept, n_forced - kept, counts)


def _k_for(order: np.ndarray, n_forced: int, counts: Counts, top_p: float | None, min_count: int | None) -> int:
    """The smallest k that covers a share top_p of the counts, or all ids counted min_count times, in a keep order.

    It is rounded up to REPACKED.
    """
    counted = np.bincount(counts.ids, counts.counts, int(order.max()) + 1)[order]
    if top_p is not None:
        covered = np.cumsum(counted) / max(1, counts.total)
        k = int(np.searchsorted(covered, min(top_p, covered[-1]))) + 1
    else:
        often = np.flatnonzero(counted >= (min_count or 1))
        k = int(often[-1]) + 1 if len(often) else n_forced
    return min(len(order), -(-k // REPACKED) * REPACKED)


def _require_vocabulary(file: GGUFFile, vocabulary: Vocabulary) -> None:
    """Raise VocabularyMismatch if the ids of a reduced head mean other tokens."""
    if "tokenizer.ggml.tokens" in file.fields:
        require_same(vocabulary, Vocabulary(file))
    known = file.get("gguf_trim.vocab_fingerprint")
    if known is not None and known != vocabulary.fingerprint:
        raise VocabularyMismatch(
            f"{file.path}: was trimmed for another vocabulary ({known[:12]}) than that of {vocabulary.path} "
            f"({vocabulary.fingerprint[:12]}); give one that was trimmed for this vocabulary, or a list of token ids"
        )


def choose_rows(
    vocabulary: Vocabulary,
    has_row: np.ndarray,
    multiple: int = MULTIPLE,
    *,
    k: int | None = None,
    counts: Path | None = None,
    keep_file: Path | None = None,
    top_p: float | None = None,
    min_count: int | None = None,
) -> Keep:
    """A ChooseRows: the most frequent ids by counts (None: the shipped counts), or those of a keep list.

    A keep list is any file that read_token_ids reads. The number of ids is k, or the one that covers a share top_p of
    the counts, or of those counted min_count times; without any of these the whole list, or DEFAULT_K rows at most.
    A list is filled up to a multiple in keep order.
    """
    listed = None
    if keep_file is not None:
        if keep_file.suffix == ".gguf":
            _require_vocabulary(GGUFFile(keep_file), vocabulary)
        ids = read_token_ids(keep_file, len(has_row))
        if not has_row[ids].any():
            raise TrimError(f"{keep_file}: the head to be cut has a row for none of these ids; list ids that it has")
        listed = keep_listed(vocabulary, has_row, ids, k)
        if listed.k % multiple == 0:
            return listed
    counted = ranking_counts(vocabulary, counts)
    order = keep_order(vocabulary, has_row, counted)
    if listed is not None:
        held = np.isin(order, listed.ids)
        order, k = np.append(order[held], order[~held]), listed.k
    elif top_p is not None or min_count is not None:
        k = _k_for(order, int(np.isin(vocabulary.forced, order).sum()), counted, top_p, min_count)
    _require_k(vocabulary, len(order), k)
    return _first(vocabulary, order, -(-(k or DEFAULT_K) // multiple) * multiple, counted)
