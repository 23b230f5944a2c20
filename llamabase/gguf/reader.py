"""Reads the head of a GGUF file: metadata and the table of tensors, never the tensors themselves.

`gguf.GGUFReader` builds a numpy view for every string of the vocabulary and takes 7-12 s on a 152k-token
model; commands here open several files each, so this module scans the same bytes in about 0.1 s. Metadata is
kept as the raw bytes it was read from: what is not changed is copied through exactly.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import re
import stat
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from llamabase.errors import FileFormatError

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

# Types of whole numbers, and those that only sums in the making have.
_MOST_LAYERS = 512  # LLAMA_MAX_LAYERS, and LLAMA_MAX_EXPERTS
_NO_WEIGHTS = {GGMLQuantizationType[name] for name in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")}
_WEIGHT = re.compile(r"(token_embd|output|blk\.\d+\.(attn_\w+|ffn_(gate|up|down)(_exps|_shexp)?))\.weight")

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

# numpy has the same names for value types of a fixed size; a bool is one byte.
_SCALARS = {
    kind: np.dtype(kind.name.lower()).newbyteorder("<")
    for kind in GGUFValueType
    if kind not in (GGUFValueType.STRING, GGUFValueType.ARRAY)
}


@dataclass(frozen=True)
class Field:
    """One metadata entry; `start:end` is its whole encoding (key, type, value) in the file's head."""

    key: str
    type: GGUFValueType
    item_type: GGUFValueType | None  # of an array
    count: int  # items of an array, 1 otherwise
    start: int
    value: int  # offset of the value (of the first item, for an array)
    end: int

    @property
    def kind(self) -> GGUFValueType:
        """The type of one value, in an array or alone."""
        return self.type if self.item_type is None else self.item_type


@dataclass(frozen=True)
class Tensor:
    """One row of the tensor table. `shape` is in ggml's order: shape[0] is the length of a row."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int  # absolute, in bytes
    n_bytes: int

    @property
    def n_rows(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) if len(self.shape) > 1 else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: a row is a whole number of quantisation blocks, so rows can be cut out exactly."""
        return self.n_bytes // self.n_rows

    @property
    def n_elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


def bytes_of(type_: GGMLQuantizationType, n_elements: int) -> int:
    """Bytes that n_elements of a type take; n_elements is a whole number of its blocks."""
    block, size = GGML_QUANT_SIZES[type_]
    return int(n_elements // block * size)


class GGUFFile:
    """The head of one GGUF file, read once; no file handle stays open.

    Raises FileFormatError, in one sentence, for anything that is not a whole little-endian GGUF v2 or v3.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise self._bad("it is not a regular file")
            with open(self.path, "rb") as file:
                self.size = file.seek(0, 2)
                if self.size < 24:
                    raise self._bad("it is too short to be a GGUF file")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                    try:
                        self._scan(buffer)
                    except (struct.error, IndexError) as error:
                        raise self._bad("its metadata ends in the middle: the file is truncated") from error
                    except (ValueError, OverflowError, MemoryError) as error:
                        raise self._bad(f"its metadata is damaged ({error})") from error
                    self.head = bytes(buffer[: self._table_end])
        except OSError as error:
            raise FileFormatError(f"{self.path}: cannot be read: {error.strerror or error}") from error

    def _bad(self, reason: str) -> FileFormatError:
        shown = "".join(letter if letter.isprintable() else "?" for letter in reason)  # of damaged names, line ends too
        return FileFormatError(f"{self.path}: not a usable GGUF: {shown}; download or convert it again")

    def _scan(self, buffer: mmap.mmap) -> None:
        if buffer[:4] != MAGIC:
            raise self._bad("it does not begin with the letters GGUF")
        (self.version,) = _U32.unpack_from(buffer, 4)
        if self.version not in (2, 3):
            raise self._bad(
                "it is big-endian"
                if self.version in (2 << 24, 3 << 24)
                else f"its version is {self.version}, and versions 2 and 3 are known"
            )
        n_tensors, n_fields = struct.unpack_from("<QQ", buffer, 8)
        position = 24
        self.fields: dict[str, Field] = {}
        for _ in range(n_fields):
            field = self._scan_field(buffer, position)
            if field.key in self.fields:
                raise self._bad(f"the key {field.key} appears twice")
            self.fields[field.key] = field
            position = field.end
        self.alignment = DEFAULT_ALIGNMENT
        if (field_ := self.fields.get("general.alignment")) is not None:
            self.alignment = int(np.frombuffer(buffer, "<u4", 1, field_.value)[0])
            if self.alignment < 1 or self.alignment & (self.alignment - 1):
                raise self._bad(f"its alignment {self.alignment} is not a power of two")
        self._scan_tensors(buffer, position, n_tensors)

    def _scan_field(self, buffer: mmap.mmap, start: int) -> Field:
        key, position = self._string(buffer, start)
        type_ = GGUFValueType(_U32.unpack_from(buffer, position)[0])
        position += 4
        item_type, count, value = None, 1, position
        if type_ == GGUFValueType.ARRAY:
            item_type = GGUFValueType(_U32.unpack_from(buffer, position)[0])
            (count,) = _U64.unpack_from(buffer, position + 4)
            value = position = position + 12
        kind = type_ if item_type is None else item_type
        if kind == GGUFValueType.STRING:
            unpack = _U64.unpack_from
            for _ in range(count):
                position += 8 + unpack(buffer, position)[0]
        elif kind in _SCALARS:
            position += count * _SCALARS[kind].itemsize
        else:
            raise self._bad(f"the key {key} holds an array of arrays")
        if position > self.size:
            raise struct.error
        return Field(key, type_, item_type, count, start, value, position)

    def _string(self, buffer: mmap.mmap, position: int) -> tuple[str, int]:
        (length,) = _U64.unpack_from(buffer, position)
        end = position + 8 + length
        if end > self.size:
            raise struct.error
        return buffer[position + 8 : end].decode("utf-8"), end

    def _scan_tensors(self, buffer: mmap.mmap, position: int, n_tensors: int) -> None:
        table: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int, int]] = []
        for _ in range(n_tensors):
            name, position = self._string(buffer, position)
            (n_dims,) = _U32.unpack_from(buffer, position)
            if not 1 <= n_dims <= MAX_DIMS:
                raise self._bad(f"tensor {name} has {n_dims} dimensions")
            shape = struct.unpack_from(f"<{n_dims}Q", buffer, position + 4)
            position += 4 + 8 * n_dims
            code, offset = struct.unpack_from("<IQ", buffer, position)
            position += 12
            try:
                type_ = GGMLQuantizationType(code)
            except ValueError:
                raise self._bad(f"tensor {name} has type {code}, unknown to the installed gguf package") from None
            block = GGML_QUANT_SIZES[type_][0]
            elements = 1
            for dim in shape:
                elements *= dim
            if min(shape) < 1 or elements >= 1 << 62 or shape[0] % block:
                raise self._bad(f"tensor {name} has the impossible shape {list(shape)} for {type_.name}")
            if offset % self.alignment:
                raise self._bad(f"tensor {name} is not aligned to {self.alignment} bytes")
            table.append((name, shape, type_, offset, bytes_of(type_, elements)))
        self._table_end = position
        self.data_offset = -(-position // self.alignment) * self.alignment
        self.tensors: dict[str, Tensor] = {}
        for name, shape, type_, offset, n_bytes in table:
            if name in self.tensors:
                raise self._bad(f"tensor {name} appears twice")
            if self.data_offset + offset + n_bytes > self.size:
                raise self._bad(f"tensor {name} lies beyond the end of the file: the file is truncated")
            self.tensors[name] = Tensor(name, shape, type_, self.data_offset + offset, n_bytes)

    def raw(self, key: str) -> bytes:
        """One metadata entry as it stands in the file: key, type and value."""
        field = self.fields[key]
        return self.head[field.start : field.end]

    def get(self, key: str, default: Any = None) -> Any:
        """A scalar or string as a Python value; an array of numbers as a numpy array; `default` where absent."""
        field = self.fields.get(key)
        if field is None:
            return default
        if field.kind == GGUFValueType.STRING:
            texts = [text.decode("utf-8", "replace") for text in self.strings(key)]
            return texts if field.item_type is not None else texts[0]
        values = np.frombuffer(self.head, _SCALARS[field.kind], field.count, field.value)
        return values if field.item_type is not None else values[0].item()

    def integer(self, key: str, default: int | None = None) -> Any:
        """A whole number; `default` where absent. Raises FileFormatError where the key holds anything else."""
        value = self.get(key, default)
        if value is not default and not isinstance(value, int):
            raise self._bad(f"the key {key} should hold a whole number")
        return value

    def integers(self, key: str) -> np.ndarray | None:
        """An array of whole numbers; None where absent. Raises FileFormatError where the key holds anything else."""
        value = self.get(key)
        if value is not None and not (isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.integer)):
            raise self._bad(f"the key {key} should hold an array of whole numbers")
        return value

    def strings(self, key: str) -> list[bytes]:
        """The bytes of a string or of each string of an array."""
        field = self.fields[key]
        if field.kind != GGUFValueType.STRING:
            raise self._bad(f"the key {key} should hold text")
        head, position, unpack = self.head, field.value, _U64.unpack_from
        out = []
        for _ in range(field.count):
            end = position + 8 + unpack(head, position)[0]
            out.append(head[position + 8 : end])
            position = end
        return out

    def require_loadable(self) -> None:
        """Raise FileFormatError for what llama.cpp ends the process over, as it loads or at the first decode."""
        layers, experts, used = (
            self.integer(f"{self.architecture}.{key}", default)
            for key, default in (("block_count", 1), ("expert_count", 0), ("expert_used_count", 0))
        )
        if not 0 < layers <= _MOST_LAYERS:
            raise self._bad(f"it says that it has {layers} layers")
        if not 0 <= used <= experts <= _MOST_LAYERS or (experts > 0) != (used > 0):
            raise self._bad(f"it says that it has {experts} experts, of which it uses {used}")
        for name, tensor in self.tensors.items():
            if tensor.type in _NO_WEIGHTS and _WEIGHT.fullmatch(name):
                raise self._bad(f"its {name} is {tensor.type.name}, which no weight can be")
        for key in self.fields:
            if key.endswith(("layer_norm_rms_epsilon", "layer_norm_epsilon")):
                epsilon = self.get(key)
                if not isinstance(epsilon, float) or not 0 <= epsilon < 1:
                    raise self._bad(f"its {key} is {epsilon}, which no norm can use")

    @cached_property
    def architecture(self) -> str:
        value = self.get("general.architecture")
        if not isinstance(value, str):
            raise self._bad("it names no general.architecture")
        return value

    def read(self, tensor: Tensor) -> bytes:
        """A tensor's bytes; for small ones (a remap table), as the big ones are streamed."""
        with open(self.path, "rb") as file:
            file.seek(tensor.offset)
            return file.read(tensor.n_bytes)
