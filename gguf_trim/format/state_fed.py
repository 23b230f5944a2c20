"""Drafters that hang on a target's hidden states (EAGLE-3, arXiv 2503.01840): what their files must hold.

llama.cpp checks next to nothing of it and ends the process at the first decode, so it is checked here before it is
asked to load one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from gguf.constants import GGMLQuantizationType

from llamabase.errors import FileFormatError, VocabularyMismatch
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import EMBEDDING, HEAD
from llamabase.gguf.vocabulary import MOST_TOKENS, Vocabulary, require_same
from llamabase.llama.states import RECORDING

EAGLE3, DFLASH = "eagle3", "dflash"
STATE_FED = (EAGLE3, DFLASH)  # of which the runner drives the first
D2T = "d2t"
FC, NORM = "fc.weight", "output_norm.weight"


@dataclass(frozen=True)
class StateFedHead:
    """An EAGLE-3 head.

    `ids`: int64 (rows of the head), the target ids of its rows in any order; None where row i is id i, or where the
    head is the target's own. `layers` are those of the target whose inputs it reads, each `width` numbers.
    """

    file: GGUFFile
    ids: np.ndarray | None
    layers: tuple[int, ...]
    width: int
    n_embd: int
    n_vocab: int  # of the target
    epsilon: float

    @classmethod
    def of(cls, file: GGUFFile) -> StateFedHead:
        """Raises FileFormatError naming what llama.cpp would stumble over."""

        name = "DFlash" if file.architecture == DFLASH else "EAGLE-3"

        def bad(reason: str) -> FileFormatError:
            return FileFormatError(f"{file.path}: not a usable {name} head: {reason}; convert it again")

        arch = file.architecture
        if arch not in STATE_FED:
            raise bad(f"its architecture is {arch}")
        if other := [tensor for tensor in file.tensors if tensor.startswith(("markov_", "selector_", "conf_proj"))]:
            raise FileFormatError(
                f"{file.path}: is a DSpark or DFlash2 drafter: its {other[0]} chooses tokens, too, and no way to cut "
                "it is known"
            )
        n_embd, width = (file.integer(f"{arch}.{key}", 0) for key in ("embedding_length", "target_hidden_size"))
        width = width or n_embd * (arch == DFLASH)
        layers = file.integers(f"{arch}.target_layers")
        if layers is None or len(layers) < 1 or min(layers.tolist()) < 0 or (arch == EAGLE3 and len(layers) != 3):
            raise bad(f"it does not name three layers of its target ({arch}.target_layers)")
        epsilon = file.get(f"{arch}.attention.layer_norm_rms_epsilon")
        if not isinstance(epsilon, float) or not 0 <= epsilon < 1:
            raise bad("it has no epsilon of its RMS norms")
        n_vocab = file.integer(f"{arch}.vocab_size", len(Vocabulary(file)) if _has_tokens(file) else 0)
        shapes = {FC: (len(layers) * width, n_embd), NORM: (n_embd,)}
        for tensor, shape in shapes.items():
            if tensor not in file.tensors or file.tensors[tensor].shape != shape:
                raise bad(f"it has no {tensor} of {' x '.join(map(str, shape))}")
        if file.tensors[NORM].type != GGMLQuantizationType.F32:
            raise bad(f"its {NORM} is not F32")
        for tensor in (HEAD, EMBEDDING):
            if tensor in file.tensors and file.tensors[tensor].shape[0] != n_embd:
                raise bad(f"rows of its {tensor} are not {n_embd} wide")
        if not 0 < n_vocab <= MOST_TOKENS or (EMBEDDING in file.tensors and file.tensors[EMBEDDING].n_rows != n_vocab):
            raise bad(f"it does not say how many tokens its target has ({arch}.vocab_size)")
        ids = _d2t(file, n_vocab, bad)
        if ids is None and HEAD in file.tensors and file.tensors[HEAD].n_rows != n_vocab:
            raise bad(f"its head has {file.tensors[HEAD].n_rows} rows for {n_vocab} tokens and no {D2T}")
        return cls(file, ids, tuple(layers.tolist()), width, n_embd, n_vocab, epsilon)

    @cached_property
    def _norm(self) -> np.ndarray:
        return np.frombuffer(self.file.read(self.file.tensors[NORM]), "<f4").copy()

    def hidden(self, states: np.ndarray) -> np.ndarray:
        """What the head is multiplied by, of states (float32, ... x n_embd): their RMS norm."""
        scale = 1 / np.sqrt(np.mean(states * states, axis=-1, keepdims=True) + np.float32(self.epsilon))
        found: np.ndarray = states * scale * self._norm
        return found

    def require_target(self, target: GGUFFile, vocabulary: Vocabulary) -> None:
        """Raise FileFormatError or VocabularyMismatch, naming both files, where it cannot hang on this target."""
        both = f"{self.file.path} cannot hang on {target.path}"
        architecture = target.architecture
        if architecture not in RECORDING:
            raise FileFormatError(
                f"{both}: llama.cpp records no inputs of layers for {architecture}; use a drafter that reads the text "
                "itself"
            )
        width, n_layer = (target.integer(f"{architecture}.{key}", 0) for key in ("embedding_length", "block_count"))
        if width != self.width or max(self.layers) >= n_layer:
            raise FileFormatError(
                f"{both}: it reads states of {self.width} numbers from layers {', '.join(map(str, self.layers))}, and "
                f"this target has {width} and {n_layer} layers; use the head of this very target"
            )
        if EMBEDDING not in self.file.tensors and width != self.n_embd:
            raise FileFormatError(f"{both}: it has no token embeddings, and the target's are {width} wide")
        if self.n_vocab != len(vocabulary):
            raise VocabularyMismatch(
                f"{both}: it was made for {self.n_vocab} tokens, and this target has {len(vocabulary)}"
            )
        if _has_tokens(self.file):
            require_same(vocabulary, Vocabulary(self.file))
        known = self.file.get("gguf_trim.vocab_fingerprint")
        if known is not None and known != vocabulary.fingerprint:
            raise VocabularyMismatch(
                f"{both}: it was trimmed for another vocabulary ({known[:12]}) than the target's "
                f"({vocabulary.fingerprint[:12]}); trim the head of this target"
            )


def row_by_id(ids: np.ndarray | None, n_vocab: int) -> np.ndarray:
    """int32 (n_vocab): the row of each id in a head whose rows stand for `ids`, -1 for none; None: row i for id i."""
    if ids is None:
        return np.arange(n_vocab, dtype=np.int32)
    rows = np.full(n_vocab, -1, np.int32)
    rows[ids] = np.arange(len(ids))
    return rows


def _has_tokens(file: GGUFFile) -> bool:
    return "tokenizer.ggml.tokens" in file.fields


def _d2t(file: GGUFFile, n_vocab: int, bad: Callable[[str], FileFormatError]) -> np.ndarray | None:
    """Absolute target ids of the head's rows; None where the file has none."""
    tensor = file.tensors.get(D2T)
    if tensor is None:
        return None
    head = file.tensors.get(HEAD)
    if head is None:
        raise bad(f"it has a {D2T} and no {HEAD}")
    if tensor.type != GGMLQuantizationType.I64 or tensor.shape != (head.n_rows,):
        raise bad(f"its {D2T} is not one I64 for each of the {head.n_rows} rows of its head")
    ids = np.frombuffer(file.read(tensor), "<i8").astype(np.int64)
    if ids.min() < 0 or ids.max() >= n_vocab:
        wrong = int(ids[(ids < 0) | (ids >= n_vocab)][0])
        raise bad(f"its {D2T} names token {wrong}, and its target has {n_vocab}")
    if len(np.unique(ids)) < len(ids):
        raise bad(f"its {D2T} names a token twice")
    return ids
