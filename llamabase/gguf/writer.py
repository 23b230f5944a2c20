"""Writes GGUF files: encoded metadata, the tensor table, and whole tensors or chosen rows of them."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf.constants import GGUF_VERSION, GGUFValueType

from llamabase.files import append

from .reader import MAGIC, Tensor

# In this order, as a bool is also an int.
_SCALARS = {bool: (GGUFValueType.BOOL, "<?"), int: (GGUFValueType.UINT32, "<I"), float: (GGUFValueType.FLOAT32, "<f")}


@dataclass(frozen=True)
class Piece:
    """A tensor of an output: that of the source or of another `file`, whole or only `rows` (ascending ids), or one of
    new `data`."""

    tensor: Tensor
    rows: np.ndarray | None = None
    file: Path | None = None
    data: bytes | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows are counted along the last dimension: the second of a table, the only one of a bias."""
        return self.tensor.shape if self.rows is None else (*self.tensor.shape[:-1], len(self.rows))

    @property
    def row_bytes(self) -> int:
        """Of a bias: one number."""
        return self.tensor.n_bytes // self.tensor.shape[-1]

    @property
    def n_bytes(self) -> int:
        return self.row_bytes * self.shape[-1]


@dataclass(frozen=True)
class Output:
    """A GGUF to write: its encoded metadata, and the tensors in their order, each padded to `alignment`."""

    fields: list[bytes]
    pieces: list[Piece]
    alignment: int

    @cached_property
    def header(self) -> bytes:
        """Everything before the first tensor byte, padded to `alignment`."""
        out = [MAGIC, struct.pack("<IQQ", GGUF_VERSION, len(self.pieces), len(self.fields)), *self.fields]
        offset = 0
        for piece in self.pieces:
            shape = piece.shape
            out.append(_text(piece.tensor.name))
            out.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, piece.tensor.type, offset))
            offset += piece.n_bytes + self._padding(piece.n_bytes)
        head = b"".join(out)
        return head + bytes(self._padding(len(head)))

    @property
    def n_bytes(self) -> int:
        sizes = [piece.n_bytes for piece in self.pieces]
        return len(self.header) + sum(sizes) + sum(map(self._padding, sizes))

    def write(self, source: BinaryIO, out: BinaryIO, advance: Callable[[int], object] = lambda _: None) -> None:
        """Append head and tensors, those of the open `source` or of their own files, to another open file."""
        advance(out.write(self.header))
        for piece in self.pieces:
            with contextlib.nullcontext(source) if piece.file is None else open(piece.file, "rb") as origin:
                append(piece, origin, out, advance)
            advance(out.write(bytes(self._padding(piece.n_bytes))))

    def _padding(self, n_bytes: int) -> int:
        return -n_bytes % self.alignment


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "replace")  # a file name need not be UTF-8
    return struct.pack("<Q", len(data)) + data


def field(key: str, value: str | int | float | bool | np.ndarray | list[str]) -> bytes:
    """One metadata entry. As in llama.cpp's files, integers are u32, floats are f32 and arrays of numbers are i32."""
    if isinstance(value, str):
        kind, data = GGUFValueType.STRING, _text(value)
    elif isinstance(value, (list, np.ndarray)):
        if isinstance(value, list):
            item, items = GGUFValueType.STRING, b"".join(map(_text, value))
        else:
            item, items = GGUFValueType.INT32, value.astype("<i4").tobytes()
        kind, data = GGUFValueType.ARRAY, struct.pack("<IQ", item, len(value)) + items
    else:
        kind, form = next(_SCALARS[type_] for type_ in _SCALARS if isinstance(value, type_))
        data = struct.pack(form, value)
    return _text(key) + struct.pack("<I", kind) + data
