"""Reads the head of a GGUF file: metadata and the table of tensors, never the tensors themselves.

`gguf.GGUFReader` builds a numpy view for every string of the vocabulary and takes 7-12 s on a 152k-token model. The
commands open several files each, so this module scans the same bytes in about 0.1 s. Metadata is kept as the raw bytes
that were read, so what is not changed is copied exactly.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import stat
import struct
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from llamabase.errors import FileFormatError

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

_MOST_LAYERS = 512  # LLAMA_MAX_LAYERS, and LLAMA_MAX_EXPERTS
# Types of whole numbers, and those that only intermediate sums have.
_NO_WEIGHTS = {GGMLQuantizationType[name] for name in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")}
_REDUCED = ("eagle3", "dflash")  # architectures of which llama.cpp reads a head with rows for some tokens only
_DELTA_NETS = ("qwen3next", "qwen35", "qwen35moe")
_WEIGHT = re.compile(
    r"(token_embd|output|nextn\.\w+_projection|blk\.\d+\.(attn_\w+|ffn_(gate|up|down)(_exps|_shexp)?))\.weight"
)

_U64 = struct.Struct("<Q")

# Value types of a fixed size have the same names in numpy; a bool is one byte.
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
        return math.prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: a row is a whole number of quantisation blocks, so rows can be cut out exactly."""
        return self.n_bytes // self.n_rows

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


def bytes_of(type_: GGMLQuantizationType, n_elements: int) -> int:
    """Bytes that n_elements of a type take; n_elements is a whole number of its blocks."""
    block, size = GGML_QUANT_SIZES[type_]
    return int(n_elements // block * size)


def _take(buffer: mmap.mmap, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, buffer.read(struct.calcsize(form)))


def _text(buffer: mmap.mmap) -> str:
    (length,) = _take(buffer, "<Q")
    if length > len(buffer) - buffer.tell():
        raise struct.error
    return buffer.read(length).decode("utf-8")


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
                    self._scan(buffer)
                    self.header = buffer[: buffer.tell()]
        except struct.error as error:
            raise self._bad("its metadata ends in the middle: the file is truncated") from error
        except (ValueError, OverflowError, MemoryError) as error:
            raise self._bad(f"its metadata is damaged ({error})") from error
        except OSError as error:
            raise FileFormatError(f"{self.path}: cannot be read: {error.strerror or error}") from error

    def _bad(self, reason: str) -> FileFormatError:
        shown = "".join(letter if letter.isprintable() else "?" for letter in reason)  # damaged names may hold anything
        return FileFormatError(f"{self.path}: not a usable GGUF: {shown}; download or convert it again")

    def _scan(self, buffer: mmap.mmap) -> None:
        magic, self.version, n_tensors, n_fields = _take(buffer, "<4sIQQ")
        if magic != MAGIC:
            raise self._bad("it does not begin with the letters GGUF")
        if self.version in (2 << 24, 3 << 24):
            raise self._bad("it is big-endian")
        if self.version not in (2, 3):
            raise self._bad(f"its version is {self.version}, and versions 2 and 3 are known")
        self.fields: dict[str, Field] = {}
        for _ in range(n_fields):
            field = self._scan_field(buffer)
            if field.key in self.fields:
                raise self._bad(f"the key {field.key} appears twice")
            self.fields[field.key] = field
        self.alignment = DEFAULT_ALIGNMENT
        if (alignment := self.fields.get("general.alignment")) is not None:
            self.alignment = int(np.frombuffer(buffer, "<u4", 1, alignment.value)[0])
            if self.alignment < 1 or self.alignment & (self.alignment - 1):
                raise self._bad(f"its alignment {self.alignment} is not a power of two")
        self._scan_tensors(buffer, n_tensors)

    def _scan_field(self, buffer: mmap.mmap) -> Field:
        start, key = buffer.tell(), _text(buffer)
        type_, item_type, count = GGUFValueType(*_take(buffer, "<I")), None, 1
        if type_ == GGUFValueType.ARRAY:
            item, count = _take(buffer, "<IQ")
            item_type = GGUFValueType(item)
        value = position = buffer.tell()
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
        buffer.seek(position)
        return Field(key, type_, item_type, count, start, value, position)

    def _scan_tensors(self, buffer: mmap.mmap, n_tensors: int) -> None:
        self.tensors: dict[str, Tensor] = {}
        for _ in range(n_tensors):
            name, (n_dims,) = _text(buffer), _take(buffer, "<I")
            if name in self.tensors:
                raise self._bad(f"tensor {name} appears twice")
            if not 1 <= n_dims <= MAX_DIMS:
                raise self._bad(f"tensor {name} has {n_dims} dimensions")
            *shape, code, offset = _take(buffer, f"<{n_dims}QIQ")
            try:
                type_ = GGMLQuantizationType(code)
            except ValueError:
                raise self._bad(f"tensor {name} has type {code}, unknown to the installed gguf package") from None
            elements = math.prod(shape)
            if min(shape) < 1 or elements >= 1 << 62 or shape[0] % GGML_QUANT_SIZES[type_][0]:
                raise self._bad(f"tensor {name} has the impossible shape {shape} for {type_.name}")
            if offset % self.alignment:
                raise self._bad(f"tensor {name} is not aligned to {self.alignment} bytes")
            self.tensors[name] = Tensor(name, tuple(shape), type_, offset, bytes_of(type_, elements))
        data_offset = -(-buffer.tell() // self.alignment) * self.alignment
        for name, tensor in self.tensors.items():
            if data_offset + tensor.offset + tensor.n_bytes > self.size:
                raise self._bad(f"tensor {name} lies beyond the end of the file: the file is truncated")
            self.tensors[name] = replace(tensor, offset=data_offset + tensor.offset)

    def raw(self, key: str) -> bytes:
        """One metadata entry as the file holds it: key, type and value."""
        field = self.fields[key]
        return self.header[field.start : field.end]

    def get(self, key: str, default: Any = None) -> Any:
        """A scalar or string as a Python value; an array of numbers as a numpy array; `default` if absent."""
        field = self.fields.get(key)
        if field is None:
            return default
        if field.kind == GGUFValueType.STRING:
            texts = [text.decode("utf-8", "replace") for text in self.strings(key)]
            return texts if field.item_type is not None else texts[0]
        values = np.frombuffer(self.header, _SCALARS[field.kind], field.count, field.value)
        return values if field.item_type is not None else values[0].item()

    def integer(self, key: str, default: int | None = None) -> Any:
        """A whole number; `default` if absent. Raises FileFormatError for any other value."""
        value = self.get(key, default)
        if value is not default and not isinstance(value, int):
            raise self._bad(f"the key {key} should hold a whole number")
        return value

    def integers(self, key: str) -> np.ndarray | None:
        """An array of whole numbers; None if absent. Raises FileFormatError for any other value."""
        value = self.get(key)
        if value is not None and not (isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.integer)):
            raise self._bad(f"the key {key} should hold an array of whole numbers")
        return value

    def strings(self, key: str) -> list[bytes]:
        """The bytes of a string or of each string of an array."""
        field = self.fields[key]
        if field.kind != GGUFValueType.STRING:
            raise self._bad(f"the key {key} should hold text")
        head, position, unpack = self.header, field.value, _U64.unpack_from
        texts = []
        for _ in range(field.count):
            end = position + 8 + unpack(head, position)[0]
            texts.append(head[position + 8 : end])
            position = end
        return texts

    def require_loadable(self) -> None:
        """Raise FileFormatError for what makes llama.cpp end the process, as it loads or at the first decode."""
        layers, blocks, experts, used = (
            self.integer(f"{self.architecture}.{key}", default)
            for key, default in (
                ("block_count", 1),
                ("nextn_predict_layers", 0),
                ("expert_count", 0),
                ("expert_used_count", 0),
            )
        )
        if not 0 < layers <= _MOST_LAYERS:
            raise self._bad(f"it says that it has {layers} layers")
        if not 0 <= blocks <= layers:
            raise self._bad(f"it says that {blocks} of its {layers} layers are for multi-token prediction")
        if "d2t" in self.tensors and self.architecture not in _REDUCED:
            raise FileFormatError(
                f"{self.path}: its head has rows for {self.tensors['d2t'].n_elements} tokens only (d2t), which "
                "llama.cpp reads of EAGLE-3 and DFlash heads alone; use a file with the whole head"
            )
        if not 0 <= used <= experts <= _MOST_LAYERS or (experts > 0) != (used > 0):
            raise self._bad(f"it says that it has {experts} experts, of which it uses {used}")
        self._require_computable_heads()
        for name, tensor in self.tensors.items():
            if tensor.type in _NO_WEIGHTS and _WEIGHT.fullmatch(name):
                raise self._bad(f"its {name} is {tensor.type.name}, which no weight can be")
        for key in self.fields:
            if key.endswith(("layer_norm_rms_epsilon", "layer_norm_epsilon")):
                epsilon = self.get(key)
                if not isinstance(epsilon, float) or not 0 <= epsilon < 1:
                    raise self._bad(f"its {key} is {epsilon}, which no norm can use")

    def _require_computable_heads(self) -> None:
        """Raise FileFormatError for parts to rotate that no head has, and for delta nets that cannot be computed."""
        arch = self.architecture
        rotated, size = (self.get(f"{arch}.{key}") for key in ("rope.dimension_count", "attention.key_length"))
        if isinstance(rotated, int) and isinstance(size, int) and (rotated % 2 or rotated > size):
            raise self._bad(f"it says that {rotated} of the {size} numbers of a head are rotated")
        if arch not in _DELTA_NETS:
            return
        if self.integer(f"{arch}.full_attention_interval", 1) < 1:
            raise self._bad(f"its {arch}.full_attention_interval is not a number of layers")
        inner, state, n_heads = (
            self.integer(f"{arch}.ssm.{key}", 0) for key in ("inner_size", "state_size", "time_step_rank")
        )
        if inner != state * n_heads:
            raise self._bad(f"it says that its {n_heads} recurrent heads of {state} numbers have {inner} in all")

    @cached_property
    def architecture(self) -> str:
        value = self.get("general.architecture")
        if not isinstance(value, str):
            raise self._bad("it names no general.architecture")
        return value

    def read(self, tensor: Tensor) -> bytes:
        """A tensor's bytes; meant for small ones (a remap table), since big ones are streamed."""
        with open(self.path, "rb") as file:
            file.seek(tensor.offset)
            return file.read(tensor.n_bytes)
