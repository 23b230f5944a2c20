"""The companion of a trimmed drafter: what stays at full vocabulary size, read one row at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from llamabase.errors import FileFormatError
from llamabase.files import Kind, marked
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import EMBEDDING, HEAD, HEAD_BIAS, head_tensor
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.ggml import dequantizer

from .mtp import MTP
from .state_fed import D2T, STATE_FED, row_by_id


def companion_of(trimmed: Path) -> Path:
    """The companion beside a trimmed file, or beside the file that a symbolic link leads to where that one is there."""
    beside, real = companion_path(trimmed), companion_path(trimmed.resolve())
    return real if real.exists() and not beside.exists() else beside


@dataclass(frozen=True)
class Trimmed:
    """A trimmed drafter and its companion, opened and checked to belong together.

    `d2t`: int32 (k), row i of the head is target id d2t[i]. Raises FileFormatError naming the file that is wrong.
    """

    file: GGUFFile
    companion: GGUFFile
    d2t: np.ndarray

    @classmethod
    def open(cls, path: Path | str) -> Trimmed:
        file = GGUFFile(path)
        if "gguf_trim.d2t" not in file.fields:
            raise FileFormatError(f"{file.path}: is not a trimmed drafter; make one with `python -m gguf_trim trim`")
        if (version := file.integer("gguf_trim.version")) != FORMAT_VERSION:
            raise FileFormatError(
                f"{file.path}: was trimmed by another version of this program (format {version}, "
                f"known: {FORMAT_VERSION}); trim the original drafter again"
            )
        beside = companion_of(file.path)
        if not beside.exists():
            raise FileFormatError(f"{beside}: is missing and belongs beside {file.path.name}: move it or trim again")
        companion = GGUFFile(beside)
        known = "gguf_trim.source_id" in file.fields.keys() & companion.fields.keys()
        if not known or companion.raw("gguf_trim.source_id") != file.raw("gguf_trim.source_id"):
            raise FileFormatError(
                f"{companion.path}: was cut from another drafter than {file.path.name}; trim the drafter again"
            )
        d2t = file.integers("gguf_trim.d2t")
        d2t = None if d2t is None else d2t.astype(np.int64)  # differences of fewer bits may wrap
        k, n_vocab = file.integer("gguf_trim.k", 0), file.integer("gguf_trim.vocab_size", 0)
        if d2t is None or len(d2t) != k or not k or (np.diff(d2t) <= 0).any() or d2t[0] < 0 or d2t[-1] >= n_vocab:
            raise FileFormatError(f"{file.path}: its remap table is not {k} ascending ids below {n_vocab}; trim again")
        scale = file.get("gguf_trim.embedding_scale")
        if not isinstance(scale, float) or not math.isfinite(scale):
            raise FileFormatError(f"{file.path}: its embedding scale is not a number; trim again")
        whole = HEAD if file.architecture in (*STATE_FED, MTP) else EMBEDDING
        if whole not in companion.tensors or (whole == EMBEDDING and companion.tensors[whole].n_rows != n_vocab):
            raise FileFormatError(f"{companion.path}: lacks the full {whole}; trim the drafter again")
        _require_shapes(file, companion, whole, n_vocab)
        return cls(file, companion, d2t.astype(np.int32))

    @property
    def vocabulary(self) -> Vocabulary:
        """The full vocabulary the drafter was trained with (the trimmed file itself has none)."""
        return Vocabulary(self.companion)

    @property
    def row_of(self) -> np.ndarray:
        """int32 by id: which row of the whole head in the companion stands for it, -1 for none."""
        d2t = self.companion.tensors.get(D2T)
        ids = None if d2t is None else np.frombuffer(self.companion.read(d2t), "<i8")
        return row_by_id(ids, self.file.integer("gguf_trim.vocab_size"))

    def embeddings(self) -> EmbeddingTable:
        return EmbeddingTable(self.companion, self.file.get("gguf_trim.embedding_scale"))


def _require_shapes(file: GGUFFile, companion: GGUFFile, whole: str, n_vocab: int) -> None:
    """Raise FileFormatError where tables of the companion are not those of the trimmed file, whole."""
    width = file.tensors[whole].shape[0] if whole in file.tensors else None
    for name in (EMBEDDING, HEAD):
        tensor = companion.tensors.get(name)
        if tensor is not None and (len(tensor.shape) != 2 or tensor.shape[0] != width):
            raise FileFormatError(f"{companion.path}: rows of its {name} are not {width} wide; trim the drafter again")
    bias, head = companion.tensors.get(HEAD_BIAS), head_tensor(companion)
    if (bias is not None and bias.shape != (head.n_rows,)) or (bias is None) != (HEAD_BIAS not in file.tensors):
        raise FileFormatError(f"{companion.path}: its {HEAD_BIAS} is not that of its head; trim the drafter again")
    rows = companion.tensors.get(D2T)
    if rows is None and head.n_rows != n_vocab:
        raise FileFormatError(f"{companion.path}: its head has not {n_vocab} rows; trim the drafter again")
    if rows is not None:
        ids = np.frombuffer(companion.read(rows), "<i8") if rows.type == GGMLQuantizationType.I64 else np.empty(0)
        if len(ids) != head.n_rows or ids.min() < 0 or ids.max() >= n_vocab:
            raise FileFormatError(f"{companion.path}: its {D2T} is not one token a row; trim the drafter again")


class EmbeddingTable:
    """Rows of a full embedding table as the vectors llama.cpp would make of the ids, bit for bit.

    The table is memory-mapped and touched a row at a time, so it costs next to no memory.
    """

    def __init__(self, file: GGUFFile, scale: float = 1.0) -> None:
        tensor = file.tensors[EMBEDDING]
        self._expand = dequantizer(tensor.type)
        self._scale = np.float32(scale)
        self.n_embd = tensor.shape[0]
        self.n_vocab = tensor.n_rows
        # A plain array: to index a memmap takes longer than to expand the row.
        self._table = np.asarray(np.memmap(file.path, np.uint8, "r", tensor.offset, (tensor.n_rows, tensor.row_bytes)))

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        """float32 (len(ids) x n_embd). Ids beyond the table (a target padded further) read as its last row."""
        chosen = np.minimum(np.asarray(ids, np.int64), self.n_vocab - 1)
        out = np.empty((len(chosen), self.n_embd), np.float32)
        self._expand(np.ascontiguousarray(self._table[chosen]), out)
        if self._scale != 1:
            out *= self._scale
        return out


FORMAT_VERSION = 1
_FOREIGN = "was not made by this program"
TRIMMED = Kind(_FOREIGN, marked(b"GGUF", b"gguf_trim.k"))
COMPANION = Kind(_FOREIGN, marked(b"GGUF", b"gguf_trim.companion"))


def companion_path(trimmed: Path) -> Path:
    """X.gguf -> X.vocab.gguf, in the same folder."""
    return trimmed.with_name(f"{trimmed.name.removesuffix('.gguf')}.vocab.gguf")
