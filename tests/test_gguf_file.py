"""Reading the head of a GGUF: what was written is read, and what is not a whole GGUF is refused in one sentence."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant
from gguf import GGUFValueType as Kind
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gguf_trim.describe import describe
from llamabase.errors import FileFormatError, TrimError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary

from .encode import PACK, Table, field, gguf
from .toy import ARCHITECTURES, write_model

QUANTS = (Quant.F32, Quant.F16, Quant.BF16, Quant.Q4_0, Quant.Q8_0, Quant.Q4_K, Quant.Q6_K, Quant.I64, Quant.IQ4_NL)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for one file that is written over and over."""
    return tmp_path_factory.mktemp("gguf")


def put(folder: Path, data: bytes) -> Path:
    path = folder / "x.gguf"
    path.unlink(missing_ok=True)  # ext4 flushes a file that is truncated and written again, which takes a while
    path.write_bytes(data)
    return path


def read(folder: Path, data: bytes) -> GGUFFile:
    return GGUFFile(put(folder, data))


def values_of(kind: Kind) -> st.SearchStrategy[Any]:
    if kind == Kind.STRING:
        return st.text(max_size=20)
    if kind == Kind.BOOL:
        return st.booleans()
    if kind in (Kind.FLOAT32, Kind.FLOAT64):
        return st.floats(width=32 if kind == Kind.FLOAT32 else 64, allow_nan=False)
    bits = 8 * struct.calcsize(PACK[kind])
    signed = PACK[kind].islower()
    return st.integers(-(1 << bits - 1) if signed else 0, (1 << bits - signed) - 1)


def kinds() -> st.SearchStrategy[Kind]:
    return st.sampled_from([*PACK, Kind.STRING])


entries = st.one_of(
    kinds().flatmap(lambda kind: st.tuples(st.just(kind), st.none(), values_of(kind))),
    kinds().flatmap(lambda kind: st.tuples(st.just(Kind.ARRAY), st.just(kind), st.lists(values_of(kind), max_size=6))),
)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    kind = draw(st.sampled_from(QUANTS))
    block = GGML_QUANT_SIZES[kind][0]
    shape = (block * draw(st.integers(1, 3)), *draw(st.lists(st.integers(1, 4), max_size=3)))
    table = Table(draw(st.text(max_size=12)), shape, kind)
    return Table(table.name, shape, kind, draw(st.randoms()).randbytes(table.n_bytes))


@given(
    metadata=st.dictionaries(st.text(max_size=12).filter(lambda key: key != "general.alignment"), entries, max_size=6),
    tensors=st.lists(tables(), max_size=4, unique_by=lambda table: table.name),
    version=st.sampled_from([2, 3]),
    alignment=st.sampled_from([None, 8, 32, 64, 4096]),
)
@settings(max_examples=150)
@example(metadata={"bytes": (Kind.ARRAY, Kind.UINT8, [1, 2, 255])}, tensors=[], version=3, alignment=None)
def test_what_was_written_is_read(
    scratch: Path, metadata: dict[str, Any], tensors: list[Table], version: int, alignment: int | None
) -> None:
    fields = [field(key, kind, value, item) for key, (kind, item, value) in metadata.items()]
    if alignment:
        fields.append(field("general.alignment", Kind.UINT32, alignment))
    data = gguf(fields, tensors, version=version, alignment=alignment or 32)
    file = read(scratch, data)
    assert file.alignment == (alignment or 32)
    assert [file.raw(key) for key in file.fields] == fields
    for key, (kind, item, value) in metadata.items():
        found = file.get(key)
        if item is None:
            assert found == value and type(found) is type(value)
        elif item == Kind.STRING:
            assert found == value and file.strings(key) == [each.encode() for each in value]
        else:
            assert found.tolist() == value and found.dtype.itemsize == struct.calcsize(PACK[item])
        assert (file.fields[key].type, file.fields[key].item_type) == (kind, item)
    assert list(file.tensors) == [table.name for table in tensors]
    for table in tensors:
        tensor = file.tensors[table.name]
        assert (tensor.shape, tensor.type, tensor.n_bytes) == (table.shape, table.type, table.n_bytes)
        assert tensor.n_elements == math.prod(table.shape)
        assert tensor.row_bytes * tensor.n_rows == tensor.n_bytes
        assert tensor.offset % file.alignment == 0
        assert file.read(tensor) == table.data
    assert data.startswith(file.header)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_agrees_with_the_reader_of_the_gguf_package(tmp_path: Path, architecture: str) -> None:
    path = write_model(tmp_path / "m.gguf", architecture, Quant.Q4_K, alignment=64)
    file, reader = GGUFFile(path), gguf_package.GGUFReader(path)
    assert set(file.fields) | {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"} == set(reader.fields)
    for key in file.fields:
        found = file.get(key)
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == reader.fields[key].contents(), key
    assert [t.name for t in reader.tensors] == list(file.tensors)
    for theirs in reader.tensors:
        ours = file.tensors[theirs.name]
        assert ours.shape == tuple(theirs.shape.tolist())
        assert (ours.offset, ours.n_bytes, ours.type) == (theirs.data_offset, theirs.n_bytes, theirs.tensor_type)
        assert file.read(ours) == theirs.data.tobytes()


TINY = gguf(
    [
        field("general.architecture", Kind.STRING, "llama"),
        field("split.count", Kind.UINT16, 1),
        field("tokenizer.ggml.model", Kind.STRING, "gpt2"),
        field("tokenizer.ggml.tokens", Kind.ARRAY, ["a", "b", "<|im_end|>", "é"], Kind.STRING),
        field("tokenizer.ggml.token_type", Kind.ARRAY, [1, 1, 3, 5], Kind.INT32),
        field("tokenizer.ggml.eos_token_id", Kind.UINT32, 2),
        field("some.flags", Kind.ARRAY, [True, False], Kind.BOOL),
    ],
    [Table("token_embd.weight", (32, 4), Quant.Q8_0), Table("output.weight", (32, 4)), Table("norm", (32,))],
)


def test_a_file_cut_anywhere_is_refused(scratch: Path) -> None:
    """Exhaustively: TINY ends with the last byte of its last tensor, so every shorter file lacks something."""
    read(scratch, TINY)
    for end in reversed(range(len(TINY))):
        os.truncate(scratch / "x.gguf", end)
        with pytest.raises(FileFormatError) as caught:
            GGUFFile(scratch / "x.gguf")
        assert "x.gguf" in str(caught.value) and "\n" not in str(caught.value)


@given(st.data())
@settings(max_examples=100)
def test_a_real_model_cut_anywhere_is_refused(scratch: Path, data: st.DataObject) -> None:
    model = scratch / "model.gguf"
    whole = (model if model.exists() else write_model(model)).read_bytes()
    last = max(tensor.offset + tensor.n_bytes for tensor in GGUFFile(model).tensors.values())
    head = len(GGUFFile(model).header)
    end = data.draw(st.one_of(st.integers(0, head), st.integers(0, last - 1)))
    with pytest.raises(FileFormatError):
        read(scratch, whole[:end])


def use(path: Path) -> None:
    """Everything the commands ask of a file's head."""
    file = GGUFFile(path)
    for key in file.fields:
        file.get(key)
    describe(path)
    Vocabulary(file).forced  # noqa: B018


@given(st.lists(st.tuples(st.integers(0, len(TINY) - 1), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=500)
def test_a_damaged_head_is_read_or_refused(scratch: Path, damage: list[tuple[int, int]]) -> None:
    """No byte can make it hang, crash or raise anything but the project's own errors."""
    data = bytearray(TINY)
    for position, byte in damage:
        data[position] = byte
    path = put(scratch, bytes(data))
    try:
        use(path)
    except TrimError as error:
        assert "\n" not in str(error)


def test_every_byte_of_a_head_damaged(scratch: Path) -> None:
    """Exhaustively, over the metadata and the tensor table; a law on damage in many places is above."""
    path = put(scratch, TINY)
    with open(path, "r+b", buffering=0) as file:
        for position in range(len(GGUFFile(path).header)):
            for byte in (TINY[position] ^ (1 << position % 8), 0xFF):
                os.pwrite(file.fileno(), bytes([byte]), position)
                try:
                    use(path)
                except TrimError as error:
                    assert "x.gguf" in str(error)
            os.pwrite(file.fileno(), TINY[position : position + 1], position)


NAMED = field("general.architecture", Kind.STRING, "llama")
HUGE = (1 << 64) - 1

WRONG = {
    "empty": (b"", "too short"),
    "short": (b"GGUF", "too short"),
    "magic": (gguf([NAMED], magic=b"GGML"), "does not begin with the letters GGUF"),
    "version 1": (gguf([NAMED], version=1), "version is 1"),
    "version 4": (gguf([NAMED], version=4), "version is 4"),
    "big-endian": (gguf([NAMED], version=3 << 24), "big-endian"),
    "key twice": (gguf([NAMED, NAMED]), "general.architecture appears twice"),
    "tensor twice": (gguf([NAMED], [Table("a", (4,)), Table("a", (4,))]), "tensor a appears twice"),
    "misaligned": (gguf([NAMED], [Table("a", (64,), offset=4)]), "not aligned to 32"),
    "unknown tensor type": (gguf([NAMED], [Table("a", (4,), 999)]), "type 999"),
    "unknown value type": (gguf([b"\1" + bytes(7) + b"k" + struct.pack("<I", 77) + bytes(8)]), "damaged"),
    "array of arrays": (gguf([b"\1" + bytes(7) + b"k" + struct.pack("<IIQ", 9, 9, 0)]), "array of arrays"),
    "no dimension": (gguf([NAMED], [Table("a", ())]), "0 dimensions"),
    "five dimensions": (gguf([NAMED], [Table("a", (4, 1, 1, 1, 1))]), "5 dimensions"),
    "a dimension of zero": (gguf([NAMED], [Table("a", (4, 0))]), "impossible shape"),
    "half a block": (gguf([NAMED], [Table("a", (33, 2), Quant.Q8_0, bytes(200))]), "impossible shape"),
    "overflowing shape": (gguf([NAMED], [Table("a", (1 << 32, 1 << 32), data=b"")]), "impossible shape"),
    "huge tensor": (gguf([NAMED], [Table("a", (1 << 40,), data=bytes(64))]), "truncated"),
    "huge offset": (gguf([NAMED], [Table("a", (4,), offset=1 << 63)]), "truncated"),
    "huge count of tensors": (gguf([NAMED], n_tensors=HUGE), "not a usable GGUF"),
    "huge count of keys": (gguf([NAMED], n_fields=HUGE), "not a usable GGUF"),
    "huge key": (gguf([struct.pack("<Q", HUGE) + b"key"]), "truncated"),
    "huge array": (gguf([b"\1" + bytes(7) + b"k" + struct.pack("<IIQ", 9, 4, HUGE)]), "truncated"),
    "huge array of text": (gguf([b"\1" + bytes(7) + b"k" + struct.pack("<IIQ", 9, 8, HUGE)]), "truncated"),
    "alignment": (gguf([field("general.alignment", Kind.UINT32, 24)]), "not a power of two"),
    "key that is not UTF-8": (gguf([b"\1" + bytes(7) + b"\xff" + struct.pack("<IB", 0, 0)]), "damaged"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_a_gguf_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    data, reason = WRONG[name]
    with pytest.raises(FileFormatError) as caught:
        read(tmp_path, data)
    message = str(caught.value)
    assert reason in message and message.startswith(str(tmp_path)) and "\n" not in message


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "not a regular file"), (tmp_path / "missing.gguf", "cannot be read")):
        with pytest.raises(FileFormatError, match=reason) as caught:
            GGUFFile(path)
        assert str(path) in str(caught.value)


def test_absent_keys_and_wrong_kinds(tmp_path: Path) -> None:
    file = read(tmp_path, gguf([field("a", Kind.UINT32, 7), field("general.architecture", Kind.UINT8, 1)]))
    assert file.get("b") is None and file.get("b", 5) == 5
    with pytest.raises(FileFormatError, match="should hold text"):
        file.strings("a")
    with pytest.raises(FileFormatError, match=r"names no general\.architecture"):
        file.architecture  # noqa: B018


@pytest.mark.parametrize(
    "wrong", [(Kind.STRING, "x", None), (Kind.FLOAT32, float("nan"), None), (9, ["x"], Kind.STRING)]
)
@pytest.mark.parametrize(
    "key",
    [
        "general.architecture",
        "general.alignment",
        "general.name",
        "split.count",
        "tokenizer.ggml.model",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.eos_token_id",
    ],
)
def test_a_known_key_that_holds_another_kind_of_value(tmp_path: Path, key: str, wrong: tuple[Any, Any, Any]) -> None:
    """It may go unused; if it matters the file is refused, and nothing but our own errors comes out."""
    right = {
        "general.architecture": (Kind.STRING, "llama", None),
        "tokenizer.ggml.tokens": (Kind.ARRAY, ["x"], Kind.STRING),
    }
    path = tmp_path / "x.gguf"
    fields = [field(name, kind, value, item) for name, (kind, value, item) in (right | {key: wrong}).items()]
    path.write_bytes(gguf(fields, [Table("token_embd.weight", (32, 1))]))
    try:
        use(path)
    except TrimError as error:
        assert str(path) in str(error)
