"""GGUF files written out by hand, from the format's own description, so that wrong ones can be written too."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as Quant
from gguf import GGUFValueType as Kind
from gguf.constants import GGML_QUANT_SIZES

from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary

PACK = {
    Kind.UINT8: "B",
    Kind.INT8: "b",
    Kind.UINT16: "H",
    Kind.INT16: "h",
    Kind.UINT32: "I",
    Kind.INT32: "i",
    Kind.FLOAT32: "f",
    Kind.BOOL: "?",
    Kind.UINT64: "Q",
    Kind.INT64: "q",
    Kind.FLOAT64: "d",
}


@dataclass(frozen=True)
class Table:
    """One tensor to write; `type` and `offset` may be set to what no file should hold."""

    name: str
    shape: tuple[int, ...]
    type: int = Quant.F32
    data: bytes | None = None  # zeros where it is None
    offset: int | None = None  # the next free one where it is None

    @property
    def n_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[Quant(self.type)] if self.type in list(Quant) else (1, 4)
        elements = 1
        for dim in self.shape:
            elements *= dim
        return elements // block * size


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value_bytes(kind: Kind, value: Any) -> bytes:
    return text(value) if kind == Kind.STRING else struct.pack("<" + PACK[kind], value)


def field(key: str, kind: Kind, value: Any, item: Kind | None = None) -> bytes:
    """One metadata entry; an array of `item` where kind is ARRAY."""
    if item is None:
        return text(key) + struct.pack("<I", kind) + value_bytes(kind, value)
    items = b"".join(value_bytes(item, each) for each in value)
    return text(key) + struct.pack("<IIQ", kind, item, len(value)) + items


def gguf(
    fields: Sequence[bytes] = (),
    tables: Sequence[Table] = (),
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = 32,
    n_fields: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """A whole file. The counts can be made to lie."""
    counts = (len(tables) if n_tensors is None else n_tensors, len(fields) if n_fields is None else n_fields)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(fields)
    body = b""
    for table in tables:
        offset = len(body) if table.offset is None else table.offset
        shape = struct.pack(f"<I{len(table.shape)}Q", len(table.shape), *table.shape)
        head += text(table.name) + shape + struct.pack("<IQ", table.type, offset)
        body += b"\0" * table.n_bytes if table.data is None else table.data
        body += b"\0" * (-len(body) % alignment)
    return head + b"\0" * (-len(head) % alignment) + body


def vocabulary(path: Path, tokens: list[str], types: list[int] | None, model: str = "gpt2", **ids: int) -> Vocabulary:
    """The vocabulary of a file that holds nothing else; `ids` are eos_token_id and its like."""
    fields = [
        field("general.architecture", Kind.STRING, "llama"),
        field("tokenizer.ggml.model", Kind.STRING, model),
        field("tokenizer.ggml.tokens", Kind.ARRAY, tokens, Kind.STRING),
        *(field(f"tokenizer.ggml.{name}", Kind.UINT32, value) for name, value in ids.items()),
    ]
    if types is not None:
        fields.append(field("tokenizer.ggml.token_type", Kind.ARRAY, types, Kind.INT32))
    path.unlink(missing_ok=True)
    path.write_bytes(gguf(fields))
    return Vocabulary(GGUFFile(path))
