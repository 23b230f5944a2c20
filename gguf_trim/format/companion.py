"""A trimmed drafter on disk, and its companion: what stays at full vocabulary size, read one row at a time."""

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
from llamabase.gguf.tensors import ASSISTANT, EMBEDDING, HEAD, HEAD_BIAS, head_tensor
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.ggml import row_function

from .mtp import MTP
from .state_fed import D2T, STATE_FED, row_by_id

FORMAT_VERSION = 1
_FOREIGN = "was not made by this program"
TRIMMED = Kind(_FOREIGN, marked(b"GGUF", b"gguf_trim.k"))
COMPANION = Kind(_FOREIGN, marked(b"GGUF", b"gguf_trim.companion"))


def companion_path(trimmed: Path) -> Path:
    """X.gguf -> X.vocab.gguf, in the same folder."""
    return trimmed.with_name(f"{trimmed.name.removesuffix('.gguf')}.vocab.gguf")


def companion_of(trimmed: Path) -> Path:
    """The companion beside a trimmed file; if there is none, the one beside the file that a symbolic link leads to."""
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
        key = "gguf_trim.source_id"
        if key not in file.fields.keys() & companion.fields.keys() or file.raw(key) != companion.raw(key):
            raise FileFormatError(f"{beside}: was cut from another drafter than {file.path.name}; trim it again")
        d2t, k = file.integers("gguf_trim.d2t"), file.integer("gguf_trim.k", 0)
        n_vocab = file.integer("gguf_trim.vocab_size", 0)
        d2t = np.empty(0) if d2t is None else d2t.astype(np.int64)  # differences of fewer bits may wrap
        if len(d2t) != k or not k or (np.diff(d2t) <= 0).any() or d2t[0] < 0 or d2t[-1] >= n_vocab:
            raise FileFormatError(f"{file.path}: its remap table is not {k} ascending ids below {n_vocab}; trim again")
        scale = file.get("gguf_trim.embedding_scale")
        if not isinstance(scale, float) or not math.isfinite(scale):
            raise FileFormatError(f"{file.path}: its embedding scale is not a number; trim again")
        trimmed = cls(file, companion, d2t.astype(np.int32))
        if (wrong := trimmed._wrong_table(n_vocab)) is not None:
            raise FileFormatError(f"{beside}: {wrong}; trim the drafter again")
        return trimmed

    @property
    def reads_states(self) -> bool:
        """Whether it reads its target's states, as EAGLE-3 heads do, and no text of its own."""
        return self.file.architecture in (*STATE_FED, MTP, ASSISTANT)

    @property
    def vocabulary(self) -> Vocabulary:
        """The full vocabulary the drafter was trained with (the trimmed file itself has none)."""
        return Vocabulary(self.companion)

    @property
    def row_of(self) -> np.ndarray:
        """int32 by id: its row in the whole head of the companion, -1 for none."""
        d2t = self.companion.tensors.get(D2T)
        ids = None if d2t is None else np.frombuffer(self.companion.read(d2t), "<i8")
        return row_by_id(ids, self.file.integer("gguf_trim.vocab_size"))

    def embeddings(self) -> EmbeddingTable:
        return EmbeddingTable(self.companion, self.file.get("gguf_trim.embedding_scale"))

    def _wrong_table(self, n_vocab: int) -> str | None:
        """Which table of the companion is not one of the trimmed file, whole."""
        own_head = self.reads_states and self.file.architecture != ASSISTANT
        whole, tensors = HEAD if own_head else EMBEDDING, self.companion.tensors
        if whole not in tensors or (whole == EMBEDDING and tensors[whole].n_rows != n_vocab):
            return f"lacks the full {whole}"
        width = self.file.tensors[whole].shape[0] if whole in self.file.tensors else None
        for name in (EMBEDDING, HEAD):
            if name in tensors and (len(tensors[name].shape) != 2 or tensors[name].shape[0] != width):
                return f"rows of its {name} are not {width} wide"
        bias, rows, n_rows = tensors.get(HEAD_BIAS), tensors.get(D2T), head_tensor(self.companion).n_rows
        if (bias is not None and bias.shape != (n_rows,)) or (bias is None) != (HEAD_BIAS not in self.file.tensors):
            return f"its {HEAD_BIAS} is not that of its head"
        if rows is None:
            return None if n_rows == n_vocab else f"its head has not {n_vocab} rows"
        is_i64 = rows.type == GGMLQuantizationType.I64
        ids = np.frombuffer(self.companion.read(rows), "<i8") if is_i64 else np.empty(0)
        if len(ids) != n_rows or ids.min() < 0 or ids.max() >= n_vocab:
            return f"its {D2T} is not one token a row"
        return None


class EmbeddingTable:
    """Rows of a full embedding table as the vectors llama.cpp would make of the ids, bit for bit.

    The table is memory-mapped and read a row at a time, so it costs next to no memory.
    """

    def __init__(self, file: GGUFFile, scale: float) -> None:
        tensor = file.tensors[EMBEDDING]
        self._expand = row_function(tensor.type)
        self._scale = np.float32(scale)
        self.n_embd = tensor.shape[0]
        self.n_vocab = tensor.n_rows
        self._table = np.memmap(file.path, np.uint8, "r", tensor.offset, (tensor.n_rows, tensor.row_bytes))
        self._one = np.empty((1, self.n_embd), np.float32)
        # Addresses, since to make an array or ask for its address takes longer than to expand a row.
        self._first, self._row_bytes, self._out = self._table.ctypes.data, tensor.row_bytes, self._one.ctypes.data

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        """float32 (len(ids) x n_embd), of one id a view until the next call. Ids beyond the table, as a target padded
        further has them, read as its last row.
        """
        out, address, last = self._one, self._out, self.n_vocab - 1
        if len(ids) != 1:
            out = np.empty((len(ids), self.n_embd), np.float32)
            address = out.ctypes.data
        for i, id_ in enumerate(ids):
            row = self._first + min(int(id_), last) * self._row_bytes
            self._expand(row, address + i * 4 * self.n_embd, self.n_embd)
        if self._scale != 1:
            out *= self._scale
        return out
