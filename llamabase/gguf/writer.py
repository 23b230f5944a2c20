"""How a cut looks on disk: encoded metadata, the tensor table, and which rows of which tensor follow."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf.constants import GGUFValueType

from llamabase.errors import TrimError
from llamabase.files import CHUNK, copy_range

from .reader import MAGIC, Tensor

GGUF_VERSION = 3


@dataclass(frozen=True)
class Piece:
    """A tensor as it goes into an output: the source's or that of another `file`, whole or only `rows` (ascending ids),
    or one of new `data`."""

    tensor: Tensor
    rows: np.ndarray | None = None
    file: Path | None = None
    data: bytes | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows are counted along the last dimension: of a table its second, of a bias its only one."""
        if self.rows is None:
            return self.tensor.shape
        return (*self.tensor.shape[:-1], len(self.rows))

    @property
    def n_bytes(self) -> int:
        if self.rows is None:
            return self.tensor.n_bytes
        return self.tensor.n_bytes // self.tensor.shape[-1] * len(self.rows)


@dataclass(frozen=True)
class Output:
    """A GGUF to be: its encoded head, and the pieces that follow, each padded to `alignment`."""

    head: bytes
    pieces: list[Piece]
    alignment: int

    @classmethod
    def of(cls, fields: list[bytes], pieces: list[Piece], alignment: int) -> Output:
        return cls(encode_head(fields, pieces, alignment), pieces, alignment)

    @property
    def n_bytes(self) -> int:
        return len(self.head) + sum(-(-piece.n_bytes // self.alignment) * self.alignment for piece in self.pieces)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "replace")  # a file name need not be UTF-8
    return struct.pack("<Q", len(data)) + data


def field(key: str, value: str | int | float | bool | np.ndarray | list[str]) -> bytes:
    """One metadata entry; integers are written as u32, floats as f32, number arrays as i32, as llama.cpp does."""
    if isinstance(value, str):
        kind, data = GGUFValueType.STRING, _text(value)
    elif isinstance(value, bool):
        kind, data = GGUFValueType.BOOL, struct.pack("<?", value)
    elif isinstance(value, int):
        kind, data = GGUFValueType.UINT32, struct.pack("<I", value)
    elif isinstance(value, float):
        kind, data = GGUFValueType.FLOAT32, struct.pack("<f", value)
    elif isinstance(value, list):
        kind = GGUFValueType.ARRAY
        data = struct.pack("<IQ", GGUFValueType.STRING, len(value)) + b"".join(map(_text, value))
    else:
        kind = GGUFValueType.ARRAY
        data = struct.pack("<IQ", GGUFValueType.INT32, len(value)) + value.astype("<i4").tobytes()
    return _text(key) + struct.pack("<I", kind) + data


def encode_head(fields: list[bytes], pieces: list[Piece], alignment: int) -> bytes:
    """Everything before the first tensor byte, padded to `alignment`; tensors follow in the order given."""
    out = [MAGIC, struct.pack("<IQQ", GGUF_VERSION, len(pieces), len(fields)), *fields]
    offset = 0
    for piece in pieces:
        shape = piece.shape
        out.append(_text(piece.tensor.name))
        out.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, piece.tensor.type, offset))
        offset += -(-piece.n_bytes // alignment) * alignment
    head = b"".join(out)
    return head + b"\0" * (-len(head) % alignment)


def write_output(
    output: Output, source: BinaryIO, out: BinaryIO, advance: Callable[[int], object] = lambda _: None
) -> None:
    """Write head and pieces, taken from the open file they come from, to another."""
    advance(out.write(output.head))
    for piece in output.pieces:
        with contextlib.nullcontext(source) if piece.file is None else open(piece.file, "rb") as origin:
            if piece.data is not None:
                advance(out.write(piece.data))
            elif piece.rows is not None:
                _copy_rows(origin, piece.tensor, piece.rows, out, advance)
            else:
                copy_range(origin, piece.tensor.offset, piece.n_bytes, out, advance)
        advance(out.write(b"\0" * (-piece.n_bytes % output.alignment)))


def _copy_rows(
    source: BinaryIO, tensor: Tensor, rows: np.ndarray, out: BinaryIO, advance: Callable[[int], object]
) -> None:
    """Append the chosen rows (ascending), reading the table in chunks that stay under CHUNK bytes."""
    row_bytes = tensor.n_bytes // tensor.shape[-1]  # of a bias: one number
    step = max(1, CHUNK // row_bytes)
    for start in range(0, int(rows[-1]) + 1, step):
        chosen = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + step)] - start
        if not len(chosen):
            continue
        count = int(chosen[-1]) + 1
        source.seek(tensor.offset + start * row_bytes)
        data = source.read(count * row_bytes)
        if len(data) != count * row_bytes:
            raise TrimError(f"{source.name}: ended early; the file changed while it was being read")
        table = np.frombuffer(data, np.uint8).reshape(count, row_bytes)
        out.write(table[chosen].tobytes())
        advance(len(chosen) * row_bytes)
