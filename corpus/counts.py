"""How often each token of a vocabulary was emitted: the file between `corpus` and `gguf_trim`.

A counts file (.npz) is sparse (`ids`, `counts`), with the fingerprint of its vocabulary and a line on how it was made.
The same counts give the same bytes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from llamabase.errors import FileFormatError, VocabularyMismatch
from llamabase.files import Kind, marked, require_regular, write_whole
from llamabase.gguf.vocabulary import MOST_TOKENS, Vocabulary

_KEYS = ("ids", "counts", "n_tokens", "fingerprint", "made_from")
COUNTS = Kind("is not a counts file", marked(b"PK", b"fingerprint.npy", b"made_from.npy"))


T = TypeVar("T", bound="Tally")


def sparse(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids, counts) of an array with one number per token id: those that are not 0."""
    ids = np.flatnonzero(dense)
    return ids.astype(np.int32), dense[ids].astype(np.int64)


@dataclass(frozen=True)
class Tally:
    """How often tokens occur: `ids` (int32, ascending) and `counts` (int64, > 0)."""

    ids: np.ndarray
    counts: np.ndarray

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def coverage(self, kept: np.ndarray) -> float:
        """Share of the total that the kept ids make up; 0 if nothing was counted."""
        return float(self.counts[np.isin(self.ids, kept)].sum() / self.total) if self.total else 0.0

    def times(self: T, weight: float) -> T:
        """The counts times a weight, rounded."""
        counts = np.rint(self.counts * weight).astype(np.int64)
        return replace(self, ids=self.ids[counts > 0], counts=counts[counts > 0])


class Group(NamedTuple):
    """What documents are counted together: those of one source in one language or script, held out or not."""

    source: str
    label: str
    held_out: bool  # to judge the counts by, and so not in their sum


@dataclass(frozen=True)
class Part(Tally):
    """The counts of one group of documents."""

    group: Group


def add_up(tables: Sequence[Tally]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, counts) of all; the same sum in any order and grouping."""
    if not tables:
        return sparse(np.empty(0))
    ids, where = np.unique(np.concatenate([table.ids for table in tables]), return_inverse=True)
    counts = np.zeros(len(ids), np.int64)
    np.add.at(counts, where, np.concatenate([table.counts for table in tables]))
    return ids.astype(np.int32), counts


@dataclass(frozen=True)
class Counts(Tally):
    """A tally in the vocabulary of `fingerprint`, which is n_tokens long, and the parts that it is the sum of."""

    n_tokens: int
    fingerprint: str
    made_from: str
    name: str = "counts"
    parts: tuple[Part, ...] = ()

    @classmethod
    def of_parts(cls, parts: Sequence[Part], vocabulary: Vocabulary, made_from: str) -> Counts:
        """The sum of all parts that are not held out, and the parts with it."""
        ids, counts = add_up([part for part in parts if not part.group.held_out])
        return cls(ids, counts, vocabulary.n_real, vocabulary.fingerprint, made_from, parts=tuple(parts))

    @classmethod
    def of(cls, dense: np.ndarray, vocabulary: Vocabulary, made_from: str) -> Counts:
        """Counts from an array with one number per token id."""
        return cls(*sparse(dense[: vocabulary.n_real]), vocabulary.n_real, vocabulary.fingerprint, made_from)

    def with_held_out(self) -> Counts:
        """The same with the held-out parts counted too: for a corpus of a document or two."""
        parts = tuple(replace(part, group=part.group._replace(held_out=False)) for part in self.parts)
        ids, counts = add_up(parts)
        return replace(self, ids=ids, counts=counts, parts=parts)

    def ranked(self) -> np.ndarray:
        """Ids by falling count, ties by id: `(-count, id)`."""
        return self.ids[np.lexsort((self.ids, -self.counts))]

    def require_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Raise VocabularyMismatch unless these counts are of this vocabulary, or of one that it begins with."""
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
                part_keys=np.array(json.dumps([part.group for part in self.parts])),
                part_sizes=np.array([len(part.ids) for part in self.parts], np.int64),
                part_ids=np.concatenate([np.empty(0, np.int32), *(part.ids for part in self.parts)]),
                part_counts=np.concatenate([np.empty(0, np.int64), *(part.counts for part in self.parts)]),
            )

    @classmethod
    def load(cls, path: Path) -> Counts:
        """Read a counts file; raises FileFormatError in one sentence for anything else."""
        path, remedy = Path(path), "make one with `python -m corpus count`"
        require_regular(path)
        try:
            with open(path, "rb") as file:  # numpy itself leaves the file of a damaged archive open
                data = np.load(file, allow_pickle=False)
                if not isinstance(data, np.lib.npyio.NpzFile):
                    raise FileFormatError("it is a single array")
                with data:
                    ids, counts, n, fingerprint, made_from = (np.asarray(data[key]) for key in _KEYS)
                    parts = {key: np.asarray(data[key]) for key in data.files if key.startswith("part_")}
            if n.ndim or not np.issubdtype(n.dtype, np.integer) or not 0 < n <= MOST_TOKENS:
                raise FileFormatError(f"it counts a vocabulary of {n} tokens")
            total = _checked(ids, counts, int(n))
            return cls(*total, int(n), str(fingerprint), str(made_from), str(path), _parts(parts, int(n)))
        except OSError as error:
            raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}; {remedy}") from error
        except Exception as error:  # damage shows as any error of numpy, zipfile and zlib
            reason = error if isinstance(error, FileFormatError) else f"{type(error).__name__} while reading it"
            raise FileFormatError(f"{path}: not a counts file: {reason}; {remedy}") from error


def _checked(ids: np.ndarray, counts: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The same as int32 and int64; raises FileFormatError with the reason if they are not counts of n tokens."""
    if not all(np.issubdtype(array.dtype, np.integer) for array in (ids, counts)):
        raise FileFormatError("its ids and counts are not whole numbers")
    if ids.ndim != 1 or ids.shape != counts.shape:
        raise FileFormatError("its ids and counts are not two lists of one length")
    ids = ids.astype(np.int64)
    if np.any(np.diff(ids) <= 0) or np.any(counts <= 0) or np.any((ids < 0) | (ids >= n)):
        raise FileFormatError("its ids are not ascending, in range and positively counted")
    return ids.astype(np.int32), counts.astype(np.int64)


def _parts(data: dict[str, np.ndarray], n: int) -> tuple[Part, ...]:
    """The parts of a counts file; counts that were made from one array have none."""
    if not data or not len(sizes := data["part_sizes"]):
        return ()
    if np.any(sizes < 0) or int(sizes.sum()) != len(data["part_ids"]):
        raise FileFormatError("its parts have other sizes than it says")
    keys = json.loads(str(data["part_keys"]))
    ids, counts = (np.split(data[key], np.cumsum(sizes)[:-1]) for key in ("part_ids", "part_counts"))
    return tuple(
        Part(*_checked(part_ids, part_counts, n), Group(str(source), str(label), bool(held)))
        for part_ids, part_counts, (source, label, held) in zip(ids, counts, keys, strict=True)
    )


def merge(tables: Sequence[Counts], weights: Sequence[float] | None = None) -> Counts:
    """Add counts up, each times its weight, rounded. Any order and grouping of the same tables gives the same counts.

    Raises VocabularyMismatch, naming two files, if their vocabularies differ.
    """
    first = tables[0]
    for other in tables[1:]:
        if (other.fingerprint, other.n_tokens) != (first.fingerprint, first.n_tokens):
            raise VocabularyMismatch(f"{first.name} and {other.name} count different vocabularies and cannot be merged")
    if weights is not None:
        tables = [_weighted(table, weight) for table, weight in zip(tables, weights, strict=True)]
    groups: dict[Group, list[Part]] = defaultdict(list)
    for table in tables:
        for part in table.parts:
            groups[part.group].append(part)
    parts = tuple(Part(*add_up(groups[group]), group) for group in sorted(groups))
    sources = sorted({source for table in tables for source in table.made_from.split(", ")})
    return Counts(*add_up(tables), first.n_tokens, first.fingerprint, ", ".join(sources), parts=parts)


def _weighted(table: Counts, weight: float) -> Counts:
    if weight == 1:
        return table
    made_from = ", ".join(f"{source} (x {weight:g})" for source in table.made_from.split(", "))
    return replace(table.times(weight), parts=tuple(part.times(weight) for part in table.parts), made_from=made_from)
