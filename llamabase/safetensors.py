"""Reads the table of a safetensors file, and writes new ones of whole tensors, chosen rows and new data.

The safetensors package writes whole tensors from memory, and through numpy none of bfloat16. Here they stay in their
file and are copied in chunks, as bytes.

Format: https://huggingface.co/docs/safetensors. Eight bytes hold the length of the header, little-endian. The header is
JSON; the tensors follow without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llamabase.errors import FileFormatError
from llamabase.files import append, require_regular

MOST_HEADER = 100_000_000  # bytes, the limit of the safetensors package
_DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "BOOL": np.dtype("?")}


@dataclass(frozen=True)
class Tensor:
    """One row of the table. `shape` is in numpy's order: shape[0] counts rows."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # absolute, in bytes
    n_bytes: int


class SafetensorsFile:
    """The head of one safetensors file, read once; no file handle stays open.

    Raises FileFormatError, in one sentence, for anything that is not a whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        require_regular(path)
        try:
            with open(path, "rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, MOST_HEADER):
                    raise self._bad("it does not begin with the length of a header")
                header = json.loads(file.read(length))
            self.metadata, self.tensors = self._scan(header, 8 + length, size)
        except OSError as error:
            raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise self._bad("its header is not JSON") from error

    def _bad(self, reason: str) -> FileFormatError:
        return FileFormatError(f"{self.path}: not a usable safetensors file: {reason}; download it again")

    def _scan(self, header: Any, begins: int, size: int) -> tuple[dict[str, str], dict[str, Tensor]]:
        if not isinstance(header, dict):
            raise self._bad("its header is not a table")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise self._bad("its metadata is not text")
        tensors = {}
        for name, entry in header.items():
            match entry:
                case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(first), int(end)]} if all(
                    type(n) is int and n >= 0 for n in shape
                ):
                    if not f"{name}{dtype}".isprintable():
                        raise self._bad("its names are not text")
                    if not 0 <= first <= end <= size - begins:
                        raise self._bad(f"tensor {name} lies beyond the end of the file: the file is truncated")
                    tensors[name] = Tensor(name, dtype, tuple(shape), begins + first, end - first)
                case _:
                    raise self._bad(f"tensor {name!r} has no dtype, shape and data_offsets")
        return metadata, tensors

    def array(self, name: str) -> np.ndarray:
        """A whole tensor of I64, I32 or BOOL. Meant for small ones, since big ones are streamed."""
        tensor = self.tensors[name]
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None or tensor.n_bytes != math.prod(tensor.shape) * dtype.itemsize:
            raise self._bad(f"its {name} is {tensor.dtype} of {tensor.n_bytes} bytes, not {' or '.join(_DTYPES)}")
        with open(self.path, "rb") as file:
            file.seek(tensor.offset)
            return np.frombuffer(file.read(tensor.n_bytes), dtype).reshape(tensor.shape)


@dataclass(frozen=True)
class Piece:
    """A tensor of a new file: one of the source, whole or only `rows` (ascending), or one of new `data`."""

    tensor: Tensor
    rows: np.ndarray | None = None
    data: bytes | None = None

    @classmethod
    def of(cls, name: str, values: np.ndarray) -> Piece:
        """A new tensor of I64, I32 or BOOL."""
        dtype = next(dtype for dtype, known in _DTYPES.items() if known == values.dtype)
        return cls(Tensor(name, dtype, values.shape, 0, values.nbytes), data=values.tobytes())

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape if self.rows is None else (len(self.rows), *self.tensor.shape[1:])

    @property
    def row_bytes(self) -> int:
        return self.tensor.n_bytes // self.tensor.shape[0]

    @property
    def n_bytes(self) -> int:
        return self.tensor.n_bytes if self.rows is None else self.row_bytes * len(self.rows)


@dataclass(frozen=True)
class Output:
    """A safetensors file to write, with the widest numbers first: so each is aligned, as the package does it."""

    pieces: list[Piece]
    metadata: dict[str, str]

    def _ordered(self) -> list[Piece]:
        return sorted(self.pieces, key=lambda piece: -piece.n_bytes / max(1, math.prod(piece.shape)))

    @property
    def header(self) -> bytes:
        table: dict[str, Any] = {"__metadata__": self.metadata}
        end = 0
        for piece in self._ordered():
            first, end = end, end + piece.n_bytes
            table[piece.tensor.name] = {
                "dtype": piece.tensor.dtype,
                "shape": list(piece.shape),
                "data_offsets": [first, end],
            }
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @property
    def n_bytes(self) -> int:
        return len(self.header) + sum(piece.n_bytes for piece in self.pieces)

    def write(self, source: BinaryIO, out: BinaryIO, advance: Callable[[int], object] = lambda _: None) -> None:
        """Append head and tensors, those of the open `source` or new ones, to another open file."""
        advance(out.write(self.header))
        for piece in self._ordered():
            append(piece, source, out, advance)
