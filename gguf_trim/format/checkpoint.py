"""EAGLE-3 checkpoints as vLLM and SGLang load them: a safetensors file, with a config.json beside it.

A reduced head comes with two tables (SafeAILab's EAGLE, vllm-project/speculators, SpecForge):

- `d2t`, int64 by row of the head: the row's target id minus its own number. vLLM adds the number (`DraftVocab` in
  vllm/model_executor/layers/draft_vocab.py), and so does SGLang (sglang/srt/models/llama_eagle3.py).
- `t2d`, bool by target id: whether the head has a row for it.

Without tables vLLM takes row i for id i, and next to nothing is accepted (NVIDIA-NeMo/Automodel pull request 2447).
config.json has the number of rows, as `draft_vocab_size`.
"""

from __future__ import annotations

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
            if name.startswith("lm_head.") and tensor.n_bytes % n_rows:
                raise bad(f"the {tensor.n_bytes} bytes of its {name} are not {n_rows} rows")
        if (D2T in file.tensors) != (T2D in file.tensors):
            raise bad(f"it has only one of {D2T} and {T2D}")
        if D2T not in file.tensors:
            return cls(file, np.arange(n_rows), n_rows)
        ids, has_row = ids_of_offsets(file), file.array(T2D)
        if len(ids) != n_rows:
            raise bad(f"its {D2T} has {len(ids)} entries and its head {n_rows} rows")
        if has_row.dtype != bool or has_row.ndim != 1 or not np.array_equal(np.sort(ids), np.flatnonzero(has_row)):
            raise bad(f"its {D2T} and {T2D} name different tokens")
        return cls(file, ids, len(has_row))

    @cached_property
    def has_row(self) -> np.ndarray:
        """bool by target id."""
        return np.isin(np.arange(self.n_vocab), self.ids)

    @property
    def _config(self) -> Path:
        return self.file.path.with_name("config.json")

    def cut(self, kept: np.ndarray) -> Output:
        """What a cut to the rows of these ids would write: pure, nothing is touched. Rows stay in their order.

        Raises TrimError if the head has a row for none of the ids, or for no other.
        """
        rows = np.flatnonzero(np.isin(self.ids, kept))
        if len(rows) in (0, len(self.ids)):
            raise TrimError(f"{self.file.path}: has rows for {'no others' if len(rows) else 'none'} of these ids")
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

    def write(self, output: Output, out: Path, advance: Callable[[int], object] = lambda _: None) -> Path | None:
        """Write a cut of this checkpoint, and beside it the config.json, if there is one; return its path.

        Raises TrimError if a file of another kind has one of the names, and if the disk is full. Holds CHUNK bytes at a
        time.
        """
        self.require_output(out)
        require_room(out, output.n_bytes)
        if not self._config.exists():
            with open(self.file.path, "rb") as source, write_whole(out, CHECKPOINT) as file:
                output.write(source, file, advance)
            return None
        config = self._read_config()
        beside = out.with_name("config.json")
        # Left in reverse order: config.json takes its name before the file that needs it does.
        with (
            open(self.file.path, "rb") as source,
            write_whole(out, CHECKPOINT) as file,
            write_whole(beside, self._other_size) as config_file,
        ):
            output.write(source, file, advance)
            file.flush()  # what may fail fails before the config takes its name
            k = int(output.metadata[MARK])
            config_file.write(json.dumps({**config, "draft_vocab_size": k}, indent=2).encode() + b"\n")
        return beside

    def require_output(self, out: Path) -> None:
        """Raise TrimError if a cut may not be written to `out`, with its config.json beside it."""
        if out.suffix != ".safetensors":
            raise TrimError(f"{out}: the name of a checkpoint must end in .safetensors")
        if out.parent.exists() and out.parent.samefile(self.file.path.parent):
            raise TrimError(f"{out}: choose another folder than the checkpoint's, since the cut has its own config.json")
        CHECKPOINT.require(out)
        if self._config.exists():
            self._other_size.require_own(out.with_name("config.json"))

    def _read_config(self) -> dict[str, Any]:
        try:
            config = json.loads(read_text(self._config))
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict):
            raise FileFormatError(f"{self._config}: is not a configuration in JSON; download it again")
        return config

    @property
    def _other_size(self) -> Kind:
        """A config.json that differs from this checkpoint's in its draft_vocab_size alone."""

        def known(path: Path) -> bool:
            try:
                other = json.loads(read_text(path))
            except (ValueError, RecursionError, FileFormatError):
                return False
            size = {"draft_vocab_size": None}
            return isinstance(other, dict) and {**other, **size} == {**self._read_config(), **size}

        return Kind("is another model's", known)
