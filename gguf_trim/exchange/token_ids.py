"""Lists of token ids, as programs with a reduced draft vocabulary take and publish them; the ending tells which.

- `.json`: vLLM's `draft_token_map`, a flat list (`load_draft_token_ids` in vllm/model_executor/layers/draft_vocab.py).
  The `draft-token-map` of Qualcomm Genie's Eaglet is one, too, or an object of target ids by row.
- `.pt`: SGLang's `--speculative-token-map`, a tensor or a list (`load_token_map` in
  sglang/srt/speculative/spec_utils.py), such as the freq_*.pt of FR-Spec (arXiv 2502.14856). vLLM reads it as well.
- `.safetensors`: the `vocab_map` of TensorRT Edge-LLM's reduce-vocab, int32, or the rows of an EAGLE-3 checkpoint.
- `.gguf`: the rows of a reduced head.
- Any other: a text, one id a line; `#` begins a comment.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gguf_trim.format.state_fed import reduced_ids
from llamabase.errors import FileFormatError, TrimError
from llamabase.files import Kind, read_text, require_regular, write_whole
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import MOST_TOKENS
from llamabase.safetensors import SafetensorsFile

from .checkpoint import D2T, ids_of_offsets

VOCAB_MAP = "vocab_map"


def read_token_ids(path: Path, n_vocab: int = MOST_TOKENS) -> list[int]:
    """The token ids of a file, in its order. Raises FileFormatError naming the file and what is wrong."""
    reader = _READERS.get(path.suffix)
    if reader is None:
        return _read_text(path, n_vocab)
    ids = reader(path)
    if not ids:
        raise FileFormatError(f"{path}: holds no token ids")
    if wrong := [i for i in ids if not 0 <= i < n_vocab]:
        raise FileFormatError(f"{path}: names token {str(wrong[0])[:40]}, and there are {n_vocab}")
    return ids


def _read_text(path: Path, n_vocab: int) -> list[int]:
    ids = []
    for number, line in enumerate(read_text(path, "a list of token ids").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if not text.isdecimal() or len(text) > 18 or int(text) >= n_vocab:
            raise FileFormatError(f"{path}, line {number}: {text[:40]!r} is not a token id from 0 to {n_vocab - 1}")
        ids.append(int(text))
    if not ids:
        raise FileFormatError(f"{path}: holds no token ids; write one a line")
    return ids


def _whole_numbers(path: Path, ids: Any) -> list[int]:
    if not isinstance(ids, (list, tuple)) or not all(type(i) is int for i in ids):
        raise FileFormatError(f"{path}: is not a flat list of token ids")
    return list(ids)


def _read_json(path: Path) -> list[int]:
    try:
        ids = json.loads(read_text(path))
        if isinstance(ids, dict):  # rows are decimal texts, which sort otherwise than numbers do
            ids = [ids[row] for row in sorted(ids, key=int)]
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: is not a list of token ids in JSON") from error
    return _whole_numbers(path, ids)


# All that torch.save writes of a list or a tensor. Others set attributes, or claim memory before it is read.
_OPCODES = {
    "PROTO", "STOP", "MARK", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "BININT", "BININT1", "BININT2", "LONG1", "NEWFALSE", "BINUNICODE", "GLOBAL", "REDUCE", "BINPERSID",
    "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Builds lists and tensors of whole numbers. It calls nothing else that a file may name, so no code is run."""

    def __init__(self, data: bytes, storage: Callable[[str], bytes]) -> None:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in _OPCODES or (opcode.name == "LONG_BINPUT" and (argument or 0) > len(data)):
                raise FileFormatError(f"its pickle has the opcode {opcode.name}")
        super().__init__(io.BytesIO(data))
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise FileFormatError(f"it holds {f'{module}.{name}'[:60]!r}")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, _ = pid
        if dtype not in _NUMBERS.values():
            raise FileFormatError("its numbers are not int64 or int32")
        return np.frombuffer(self._storage(key), dtype)


def _tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> list[int]:
    (length,), (step,) = size, stride
    ids = storage[offset:][:length]
    if step != 1 or len(ids) != length:
        raise FileFormatError("its tensor skips numbers, or has more than there are")
    return _listed(ids)


_NUMBERS = {("torch", "LongStorage"): "<i8", ("torch", "IntStorage"): "<i4"}
_KNOWN: dict[tuple[str, str], Any] = {
    **_NUMBERS,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("collections", "OrderedDict"): OrderedDict,  # a tensor's hooks, of which there are none
}


def _read_pt(path: Path) -> list[int]:
    """Of a file by torch.save, which is a zip of a pickle and of the numbers of each tensor. PyTorch is not needed."""
    require_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:

            def stored(name: str) -> bytes:
                if archive.getinfo(name).file_size > 16 * MOST_TOKENS:
                    raise FileFormatError("it is larger than any vocabulary")
                return archive.read(name)

            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            folder = pickled.removesuffix("data.pkl")
            if f"{folder}byteorder" in archive.namelist() and stored(f"{folder}byteorder") != b"little":
                raise FileFormatError("it is big-endian")
            ids = _Unpickler(stored(pickled), lambda key: stored(f"{folder}data/{key}")).load()
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damage shows as any error of zipfile and pickle
        reason = error if isinstance(error, FileFormatError) else f"{type(error).__name__} while reading it"
        raise FileFormatError(
            f"{path}: not a list of token ids by torch.save: {reason}; save a list, or a tensor of one dimension and "
            "of int64 or int32"
        ) from error
    return _whole_numbers(path, ids)


def _read_safetensors(path: Path) -> list[int]:
    file = SafetensorsFile(path)
    if VOCAB_MAP in file.tensors:
        ids = file.array(VOCAB_MAP)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise FileFormatError(f"{path}: its {VOCAB_MAP} is not a flat list of token ids")
    elif D2T in file.tensors:
        ids = ids_of_offsets(file)
    else:
        raise FileFormatError(f"{path}: has neither a {VOCAB_MAP} nor a {D2T}; give a file with a reduced head")
    return _listed(ids)


def _read_gguf(path: Path) -> list[int]:
    """Of a head with a d2t, or of a trimmed drafter."""
    file = GGUFFile(path)
    ids = reduced_ids(file, MOST_TOKENS, lambda why: FileFormatError(f"{path}: {why}; give a list of token ids"))
    if ids is None:
        ids = file.integers("gguf_trim.d2t")
    if ids is None:
        raise FileFormatError(f"{path}: has no reduced head (no d2t); give one that has, or a list of token ids")
    return _listed(ids)


def _listed(ids: np.ndarray) -> list[int]:
    return [int(i) for i in ids]


_READERS = {".json": _read_json, ".pt": _read_pt, ".safetensors": _read_safetensors, ".gguf": _read_gguf}


def _holds_token_ids(path: Path) -> bool:
    try:
        return not path.stat().st_size or bool(read_token_ids(path))
    except FileFormatError:
        return False


TOKEN_IDS = Kind("is not a list of token ids", _holds_token_ids)


def write_json(ids: list[int], path: Path) -> None:
    """vLLM's draft_token_map: a flat list. vLLM sorts it, removes doubles and adds the ends of text itself."""
    with write_whole(path, TOKEN_IDS) as file:
        file.write(json.dumps(ids).encode() + b"\n")


def write_pt(ids: list[int], path: Path) -> None:
    """SGLang's --speculative-token-map: an int64 tensor of one dimension. SGLang takes it as it is.

    Raises TrimError if PyTorch is missing.
    """
    try:
        import torch
    except ImportError as error:
        raise TrimError(f"{path}: a .pt is written by PyTorch: pip install 'gguf-trim[train]'") from error
    with write_whole(path, TOKEN_IDS) as file:
        torch.save(torch.tensor(ids, dtype=torch.int64), file)
