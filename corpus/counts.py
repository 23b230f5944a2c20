"""How often each token of a vocabulary was emitted: the file between `corpus` and `gguf_trim`.

A counts file (.npz) is sparse (`ids`, `counts`) and carries the fingerprint of the vocabulary it counts in, and a
line on how it was made. The same counts give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import FileFormatError, VocabularyMismatch
from .files import write_whole
from .vocabulary import Vocabulary

_KEYS = ("ids", "counts", "n_tokens", "fingerprint", "made_from")


@dataclass(frozen=True)
class Counts:
    """`ids` (int32, ascending) and `counts` (int64, > 0) in the vocabulary of `fingerprint` (n_tokens long)."""

    ids: np.ndarray
    counts: np.ndarray
    n_tokens: int
    fingerprint: str
    made_from: str
    name: str = "counts"

    @classmethod
    def of(cls, dense: np.ndarray, vocabulary: Vocabulary, made_from: str) -> Counts:
        """Counts from a dense array of one number per token id."""
        ids = np.flatnonzero(dense[: vocabulary.n_real]).astype(np.int32)
        return cls(ids, dense[ids].astype(np.int64), vocabulary.n_real, vocabulary.fingerprint, made_from)

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
        with write_whole(path) as file:
            np.savez_compressed(
                file,
                ids=self.ids.astype(np.int32),
                counts=self.counts.astype(np.int64),
                n_tokens=np.int64(self.n_tokens),
                fingerprint=np.array(self.fingerprint),
                made_from=np.array(self.made_from),
            )

    @classmethod
    def load(cls, path: Path) -> Counts:
        """Read a counts file; raises FileFormatError in one sentence for anything else."""
        path = Path(path)
        bad = f"{path}: not a counts file"
        remedy = "make one with `python -m corpus count`"
        try:
            with open(path, "rb") as file:  # numpy itself leaves the file of a damaged archive open
                data = np.load(file, allow_pickle=False)
                if not isinstance(data, np.lib.npyio.NpzFile):
                    raise ValueError("a single array")
                with data:
                    fields: dict[str, Any] = {key: data[key] for key in _KEYS}
        except OSError as error:
            raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}; {remedy}") from error
        except Exception as error:  # damage shows as any error of numpy, zipfile and zlib
            raise FileFormatError(f"{bad} ({str(error).partition(chr(10))[0]}); {remedy}") from error
        ids, counts, n = fields["ids"], fields["counts"], fields["n_tokens"]
        if not all(np.issubdtype(array.dtype, np.integer) for array in (ids, counts, n)):
            raise FileFormatError(f"{bad}: its ids and counts are not whole numbers; {remedy}")
        if ids.ndim != 1 or ids.shape != counts.shape or n.ndim != 0:
            raise FileFormatError(f"{bad}: its ids and counts are not two lists of one length; {remedy}")
        ids = ids.astype(np.int64)
        if np.any(np.diff(ids) <= 0) or np.any(counts <= 0) or np.any((ids < 0) | (ids >= n)):
            raise FileFormatError(f"{bad}: its ids are not ascending, in range and positively counted; {remedy}")
        ids, counts = ids.astype(np.int32), counts.astype(np.int64)
        return cls(ids, counts, int(n), str(fields["fingerprint"]), str(fields["made_from"]), str(path))
