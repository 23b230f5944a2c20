"""How often each token of a vocabulary was emitted: the file between `corpus` and `gguf_trim`.

A counts file (.npz) is sparse (`ids`, `counts`) and carries the fingerprint of the vocabulary it counts in, and a
line on how it was made. The same counts give the same bytes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llamabase.errors import FileFormatError, VocabularyMismatch
from llamabase.files import Kind, marked, require_regular, write_whole
from llamabase.gguf.vocabulary import MOST_TOKENS, Vocabulary

_KEYS = ("ids", "counts", "n_tokens", "fingerprint", "made_from")
COUNTS = Kind("is not a counts file", marked(b"PK", b"fingerprint.npy", b"made_from.npy"))


@dataclass(frozen=True)
class Part:
    """What one source holds in one language (or script); `held_out` documents judge the counts and are not in them."""

    source: str
    label: str
    held_out: bool
    ids: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, source: str, label: str, held_out: bool, dense: np.ndarray) -> Part:
        ids = np.flatnonzero(dense)
        return cls(source, label, held_out, ids.astype(np.int32), dense[ids].astype(np.int64))

    @property
    def key(self) -> tuple[str, str, bool]:
        return self.source, self.label, self.held_out


def add_up(tables: Sequence[Part | Counts]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, counts) of all; the same sum in any order and grouping."""
    if not tables:
        return np.empty(0, np.int32), np.empty(0, np.int64)
    ids, where = np.unique(np.concatenate([table.ids for table in tables]), return_inverse=True)
    counts = np.zeros(len(ids), np.int64)
    np.add.at(counts, where, np.concatenate([table.counts for table in tables]))
    return ids.astype(np.int32), counts


@dataclass(frozen=True)
class Counts:
    """`ids` (int32, ascending) and `counts` (int64, > 0) in the vocabulary of `fingerprint` (n_tokens long)."""

    ids: np.ndarray
    counts: np.ndarray
    n_tokens: int
    fingerprint: str
    made_from: str
    name: str = "counts"
    parts: tuple[Part, ...] = ()

    @classmethod
    def of_parts(cls, parts: Sequence[Part], vocabulary: Vocabulary, made_from: str) -> Counts:
        """The sum of all parts that are not held out, and the parts with it."""
        ids, counts = add_up([part for part in parts if not part.held_out])
        return cls(ids, counts, vocabulary.n_real, vocabulary.fingerprint, made_from, parts=tuple(parts))

    @classmethod
    def of(cls, dense: np.ndarray, vocabulary: Vocabulary, made_from: str) -> Counts:
        """Counts from a dense array of one number per token id."""
        ids = np.flatnonzero(dense[: vocabulary.n_real]).astype(np.int32)
        return cls(ids, dense[ids].astype(np.int64), vocabulary.n_real, vocabulary.fingerprint, made_from)

    def with_held_out(self) -> Counts:
        """The same with what was held out counted too: for a corpus of a document or two."""
        parts = tuple(replace(part, held_out=False) for part in self.parts)
        ids, counts = add_up(parts)
        return replace(self, ids=ids, counts=counts, parts=parts)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def ranked(self) -> np.ndarray:
        """Ids by falling count, ties by id: `(-count, id)`."""
        return self.ids[np.lexsort((self.ids, -self.counts))]

    def coverage(self, kept: np.ndarray) -> float:
        """Share of everything counted that the kept ids make up, 0 where nothing was counted."""
        return float(self.counts[np.isin(self.ids, kept)].sum() / self.total) if self.total else 0.0

    def require_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Raise VocabularyMismatch unless these counts are of this vocabulary."""
        if self.fingerprint == vocabulary.fingerprint:
            return
        if self.n_tokens <= vocabulary.n_real and vocabulary.fingerprint_of_first(self.n_tokens) == self.fingerprint:
            return
        raise VocabularyMismatch(
            f"{self.name} counts another vocabulary ({self.n_tokens} tokens, {self.fingerprint[:12]}) than that of "
            f"{vocabulary.path} ({vocabulary.n_real} tokens, {vocabulary.fingerprint[:12]}); count again with "
            f"--tokenizer {vocabulary.path}"
        )

    def save(self, path: Path) -> None:
        with write_whole(path, COUNTS) as file:
            np.savez_compressed(
                file,
                ids=self.ids.astype(np.int32),
                counts=self.counts.astype(np.int64),
                n_tokens=np.int64(self.n_tokens),
                fingerprint=np.array(self.fingerprint),
                made_from=np.array(self.made_from),
                part_keys=np.array(json.dumps([part.key for part in self.parts])),
                part_sizes=np.array([len(part.ids) for part in self.parts], np.int64),
                part_ids=np.concatenate([np.empty(0, np.int32), *(part.ids for part in self.parts)]),
                part_counts=np.concatenate([np.empty(0, np.int64), *(part.counts for part in self.parts)]),
            )

    @classmethod
    def load(cls, path: Path) -> Counts:
        """Read a counts file; raises FileFormatError in one sentence for anything else."""
        path = Path(path)
        bad = f"{path}: not a counts file"
        remedy = "make one with `python -m corpus count`"
        require_regular(path)
        try:
            with open(path, "rb") as file:  # numpy itself leaves the file of a damaged archive open
                data = np.load(file, allow_pickle=False)
                if not isinstance(data, np.lib.npyio.NpzFile):
                    raise ValueError("a single array")
                with data:
                    fields: dict[str, Any] = {key: np.asarray(data[key]) for key in _KEYS}
                    parts = _parts({key: np.asarray(data[key]) for key in data.files if key.startswith("part_")})
                    for part in parts:
                        _require_counts(part.ids, part.counts, int(fields["n_tokens"]))
        except OSError as error:
            raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}; {remedy}") from error
        except Exception as error:  # damage shows as any error of numpy, zipfile and zlib
            raise FileFormatError(f"{bad}: {type(error).__name__} while reading it; {remedy}") from error
        ids, counts, n = fields["ids"], fields["counts"], fields["n_tokens"]
        if not all(np.issubdtype(array.dtype, np.integer) for array in (ids, counts, n)):
            raise FileFormatError(f"{bad}: its ids and counts are not whole numbers; {remedy}")
        if ids.ndim != 1 or ids.shape != counts.shape or n.ndim != 0:
            raise FileFormatError(f"{bad}: its ids and counts are not two lists of one length; {remedy}")
        ids = ids.astype(np.int64)
        if not 0 < int(n) <= MOST_TOKENS:
            raise FileFormatError(f"{bad}: it counts a vocabulary of {int(n)} tokens; {remedy}")
        if np.any(np.diff(ids) <= 0) or np.any(counts <= 0) or np.any((ids < 0) | (ids >= n)):
            raise FileFormatError(f"{bad}: its ids are not ascending, in range and positively counted; {remedy}")
        ids, counts = ids.astype(np.int32), counts.astype(np.int64)
        return cls(ids, counts, int(n), str(fields["fingerprint"]), str(fields["made_from"]), str(path), parts)


def _require_counts(ids: np.ndarray, counts: np.ndarray, n: int) -> None:
    whole = all(np.issubdtype(array.dtype, np.integer) for array in (ids, counts))
    if not whole or ids.ndim != 1 or ids.shape != counts.shape or not 0 < n <= MOST_TOKENS:
        raise ValueError("no counts")
    wide = ids.astype(np.int64)
    if np.any(np.diff(wide) <= 0) or np.any(counts <= 0) or np.any((wide < 0) | (wide >= n)):
        raise ValueError("ids that are not ascending, in range and positively counted")


def _parts(data: dict[str, Any]) -> tuple[Part, ...]:
    """The parts of a counts file; counts that were made as one array have none."""
    if not data or not len(data["part_sizes"]):
        return ()
    keys = json.loads(str(data["part_keys"]))
    if np.any(data["part_sizes"] < 0) or int(data["part_sizes"].sum()) != len(data["part_ids"]):
        raise ValueError("parts of other sizes")
    ends = np.cumsum(data["part_sizes"])
    ids, counts = np.split(data["part_ids"], ends[:-1]), np.split(data["part_counts"], ends[:-1])
    return tuple(
        Part(str(source), str(label), bool(held), i, n)
        for (source, label, held), i, n in zip(keys, ids, counts, strict=True)
    )


def merge(tables: Sequence[Counts], weights: Sequence[float] | None = None) -> Counts:
    """Add counts up, each times its weight, rounded. Any order and grouping of the same tables gives the same counts.

    Raises VocabularyMismatch where the vocabularies differ, naming two files.
    """
    first = tables[0]
    for other in tables[1:]:
        if (other.fingerprint, other.n_tokens) != (first.fingerprint, first.n_tokens):
            raise VocabularyMismatch(f"{first.name} and {other.name} count different vocabularies and cannot be merged")
    scaled = [_times(table, weight) for table, weight in zip(tables, weights or [1.0] * len(tables), strict=True)]
    ids, counts = add_up(scaled)
    every = sorted((part for table in scaled for part in table.parts), key=lambda part: part.key)
    grouped = itertools.groupby(every, key=lambda part: part.key)
    parts = [Part(source, label, held, *add_up(list(found))) for (source, label, held), found in grouped]
    sources = sorted({source for table in scaled for source in table.made_from.split(", ")})
    return Counts(ids, counts, first.n_tokens, first.fingerprint, ", ".join(sources), parts=tuple(parts))


def _times(table: Counts, weight: float) -> Counts:
    if weight == 1:
        return table

    def scaled(ids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rounded = np.rint(counts * weight).astype(np.int64)
        return ids[rounded > 0], rounded[rounded > 0]

    ids, counts = scaled(table.ids, table.counts)
    parts = tuple(Part(*part.key, *scaled(part.ids, part.counts)) for part in table.parts)
    named = ", ".join(f"{source} (x {weight:g})" for source in table.made_from.split(", "))
    return replace(table, ids=ids, counts=counts, parts=parts, made_from=named)
