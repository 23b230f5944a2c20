"""EAGLE-3 checkpoints as vLLM and SGLang load them: a safetensors file, with a config.json beside it.

A reduced head comes with two tables (SafeAILab's EAGLE, vllm-project/speculators, SpecForge):

- `d2t`, int64 by row of the head: the row's target id minus its own number. vLLM adds the number (`DraftVocab` in
  vllm/model_executor/layers/draft_vocab.py), and so does SGLang (sglang/srt/models/llama_eagle3.py).
- `t2d`, bool by target id: whether the head has a row for it.

Without tables vLLM takes row i for id i, and next to nothing is accepted (NVIDIA-NeMo/Automodel pull request 2447).
config.json has the number of rows, as `draft_vocab_size`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llamabase.errors import FileFormatError, TrimError
from llamabase.files import Kind, marked, read_text, require_room, write_whole
from llamabase.safetensors import Output, Piece, SafetensorsFile

HEAD, D2T, T2D = "lm_head.weight", "d2t", "t2d"
CONFIG, SIZE = "config.json", "draft_vocab_size"
MARK = "gguf_trim.k"
CHECKPOINT = Kind("was not made by this program", marked(b"", json.dumps(MARK).encode()))


def ids_of_offsets(file: SafetensorsFile) -> np.ndarray:
    """int64, the target id of each row, of a file that has a d2t."""
    offsets = file.array(D2T)
    if offsets.ndim != 1 or not np.issubdtype(offsets.dtype, np.integer):
        raise FileFormatError(f"{file.path}: its {D2T} is not one whole number for each row of its head")
    return offsets.astype(np.int64) + np.arange(len(offsets))


@dataclass(frozen=True)
class Checkpoint:
    """An EAGLE-3 checkpoint. `ids`: int64, the target id of each row of its head, in any order."""

    file: SafetensorsFile
    ids: np.ndarray
    n_vocab: int  # of the target
    config: dict[str, Any] | None  # of the file beside it, if there is one

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Raises FileFormatError naming what is missing or does not fit."""
        file = SafetensorsFile(path)

        def bad(reason: str) -> FileFormatError:
            return FileFormatError(f"{path}: not a usable EAGLE-3 checkpoint: {reason}")

        head = file.tensors.get(HEAD)
        if head is None or len(head.shape) != 2 or not all(head.shape):
            raise bad(f"it has no {HEAD}, one row for each token; it drafts from its target's head")
        n_rows = head.shape[0]
        for name, tensor in file.tensors.items():
            if "markov" in name:
                raise bad(f"tensor {name} has rows that belong to those of the head, and no way to cut them is known")
            if name.startswith("lm_head.") and tensor.shape[:1] != (n_rows,):
                raise bad(f"its {name} has not one row for each of the {n_rows} of {HEAD}; give it unquantised")
            if name.startswith("lm_head.") and (not tensor.n_bytes or tensor.n_bytes % n_rows):
                raise bad(f"the {tensor.n_bytes} bytes of its {name} are not {n_rows} rows")
        if (D2T in file.tensors) != (T2D in file.tensors):
            raise bad(f"it has only one of {D2T} and {T2D}")
        beside = path.with_name(CONFIG)
        config = _read_config(beside) if beside.exists() else None
        if D2T not in file.tensors:
            return cls(file, np.arange(n_rows), n_rows, config)
        ids, has_row = ids_of_offsets(file), file.array(T2D)
        if len(ids) != n_rows:
            raise bad(f"its {D2T} has {len(ids)} entries and its head {n_rows} rows")
        if has_row.dtype != bool or has_row.ndim != 1 or not np.array_equal(np.sort(ids), np.flatnonzero(has_row)):
            raise bad(f"its {D2T} and {T2D} name different tokens")
        return cls(file, ids, len(has_row), config)

    @cached_property
    def has_row(self) -> np.ndarray:
        """bool by target id."""
        return np.isin(np.arange(self.n_vocab), self.ids)

    def cut(self, kept: np.ndarray) -> Output:
        """What a cut to the rows of these ids would write: pure, nothing is touched. Rows stay in their order.

        Raises TrimError if that is none, or all.
        """
        rows = np.flatnonzero(np.isin(self.ids, kept))
        if not len(rows):
            raise TrimError(f"{self.file.path}: the head has a row for none of these ids; give ids that it has")
        if len(rows) == len(self.ids):
            raise TrimError(f"{self.file.path}: every row of the head is kept; give fewer ids")
        ids, tensors = self.ids[rows], self.file.tensors
        others = [
            Piece(tensor, rows if name.startswith("lm_head.") else None)
            for name, tensor in tensors.items()
            if name not in (D2T, T2D)
        ]
        tables = [
            Piece.of(D2T, (ids - np.arange(len(ids))).astype("<i8")),
            Piece.of(T2D, np.isin(np.arange(self.n_vocab), ids)),
        ]
        return Output([*others, *tables], {**self.file.metadata, MARK: str(len(rows))})

    def require_output(self, out: Path) -> None:
        """Raise TrimError if a cut may not be written to `out`, with its config.json beside it."""
        if out.suffix != ".safetensors":
            raise TrimError(f"{out}: the name of a checkpoint must end in .safetensors")
        if out.parent.exists() and out.parent.samefile(self.file.path.parent):
            raise TrimError(f"{out}: name another folder than the checkpoint's, since the cut has its own config.json")
        CHECKPOINT.require(out)
        if self.config is not None:
            self._other_size.require_own(out.with_name(CONFIG))

    def write(self, output: Output, out: Path, advance: Callable[[int], object] = lambda _: None) -> None:
        """Write a cut of this checkpoint, and its config.json beside it: both appear whole or not at all.

        Raises TrimError as `require_output` does, and if the disk is full. Holds CHUNK bytes at a time.
        """
        self.require_output(out)
        require_room(out, output.n_bytes)
        # Left in reverse order: config.json takes its name before the file that needs it does.
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(open(self.file.path, "rb"))
            file = stack.enter_context(write_whole(out, CHECKPOINT))
            if self.config is not None:
                config = {**self.config, SIZE: int(output.metadata[MARK])}
                beside = stack.enter_context(write_whole(out.with_name(CONFIG), self._other_size))
                beside.write(json.dumps(config, indent=2).encode() + b"\n")
            output.write(source, file, advance)
            file.flush()  # what may fail fails before config.json takes its name

    @property
    def _other_size(self) -> Kind:
        """A config.json that differs from this checkpoint's in its number of rows alone."""

        def known(path: Path) -> bool:
            try:
                other = _read_config(path)
            except FileFormatError:
                return False
            return {**other, SIZE: 0} == {**(self.config or {}), SIZE: 0}

        return Kind("is another model's", known)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_text(path))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise FileFormatError(f"{path}: is not a configuration in JSON; download it again")
    return config
