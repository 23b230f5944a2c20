"""How a cut looks on disk: encoded metadata, the tensor table, and which rows of which tensor follow."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGUFValueType

from llamabase.gguf_file import MAGIC, GGUFFile, Tensor

from .keep import Keep

GGUF_VERSION = 3

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
HEAD_BIAS = "output.bias"


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


@dataclass(frozen=True)
class Cut:
    """A planned cut of `source` to the rows of `keep`: both outputs carry the source's `identity`."""

    source: GGUFFile
    identity: str
    keep: Keep
    trimmed: Output
    companion: Output
    mtp: bool = False  # whether it is the rows of the source's MTP block

    @property
    def n_bytes(self) -> int:
        return self.trimmed.n_bytes + self.companion.n_bytes

    @property
    def tied(self) -> bool:
        return HEAD not in self.source.tensors

    @property
    def step_bytes(self) -> int:
        """Weight bytes one draft step of the trimmed file reads (its embedding table is never read)."""
        skipped = set() if self.tied else {EMBEDDING}
        return sum(piece.n_bytes for piece in self.trimmed.pieces if piece.tensor.name not in skipped)


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


def head_tensor(file: GGUFFile) -> Tensor:
    """The tensor that makes the logits: the head, or the embedding table of a tied model."""
    return file.tensors.get(HEAD) or file.tensors[EMBEDDING]


def has_mrope(file: GGUFFile) -> bool:
    """Whether a file whose architecture knows both, such as GLM-4, has M-RoPE; files for images have."""
    sections = file.integers(f"{file.architecture}.rope.dimension_sections")
    return sections is not None and len(sections) > 1 and bool(min(sections[:2]) > 0)
