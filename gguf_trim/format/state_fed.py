"""Drafters that read their target's hidden states: what the project asks of their heads, and EAGLE-3 files.

llama.cpp checks next to nothing of an EAGLE-3 file (arXiv 2503.01840) and ends the process at the first decode, so the
file is checked here before llama.cpp loads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from gguf.constants import GGMLQuantizationType

from llamabase.errors import FileFormatError, VocabularyMismatch
from llamabase.gguf.reader import GGUFFile, Tensor
from llamabase.gguf.tensors import EMBEDDING, HEAD, head_tensor
from llamabase.gguf.vocabulary import MOST_TOKENS, Vocabulary, require_same
from llamabase.llama.states import RECORDING

EAGLE3, DFLASH = "eagle3", "dflash"
STATE_FED = (EAGLE3, DFLASH)  # of which the runner drives the first
D2T = "d2t"
MARKOV = "markov_w2.weight"  # of DSpark: one row for each of the head's, whose logits it changes by the token before
SELECTOR = "selector_hidden.weight"  # of DFlash2: chooses among the likeliest tokens of all places
LOOKED_UP = ("markov_w1.weight", "selector_predecessor.weight", "selector_successor.weight")  # a row for each token
FC, NORM = "fc.weight", "output_norm.weight"


class StateFedHead(Protocol):
    """The head of a drafter that reads its target's states: an Eagle3Head or an MtpBlock."""

    @property
    def ids(self) -> np.ndarray | None:
        """int64, the target id of each row, in any order; None if row i is id i."""

    def hidden(self, states: np.ndarray) -> np.ndarray:
        """What the head is multiplied by, for states (float32, ... x n_embd) that the drafter made."""


@dataclass(frozen=True)
class Eagle3Head:
    """An EAGLE-3 or DFlash head. `layers`: those of the target whose inputs it reads, each of `width` numbers.

    Its `ids` are None also if the head is the target's own.
    """

    file: GGUFFile
    ids: np.ndarray | None
    layers: tuple[int, ...]
    width: int
    n_embd: int
    n_vocab: int  # of the target
    epsilon: float

    @classmethod
    def of(cls, file: GGUFFile) -> Eagle3Head:
        """Raises FileFormatError naming what llama.cpp would not survive."""
        arch = file.architecture

        def bad(reason: str) -> FileFormatError:
            name = "DFlash" if arch == DFLASH else "EAGLE-3"
            return FileFormatError(f"{file.path}: not a usable {name} head: {reason}; convert it again")

        if arch not in STATE_FED:
            raise bad(f"its architecture is {arch}")
        if file.integer(f"{arch}.hyper_connection.count", 0):
            raise FileFormatError(f"{file.path}: is a drafter for DeepSeek-V4, of which llama.cpp reads no {D2T}")
        n_embd, width = (file.integer(f"{arch}.{key}", 0) for key in ("embedding_length", "target_hidden_size"))
        width = width or n_embd * (arch == DFLASH)
        layers = file.integers(f"{arch}.target_layers")
        if layers is None or len(layers) < 1 or min(layers.tolist()) < 0 or (arch == EAGLE3 and len(layers) != 3):
            raise bad(f"it does not name three layers of its target ({arch}.target_layers)")
        epsilon = file.get(f"{arch}.attention.layer_norm_rms_epsilon")
        if not isinstance(epsilon, float) or not 0 <= epsilon < 1:
            raise bad("it has no epsilon of its RMS norms")
        n_vocab = file.integer(f"{arch}.vocab_size", len(Vocabulary(file)) if _has_tokens(file) else 0)
        tensors = file.tensors
        for name, shape in {FC: (len(layers) * width, n_embd), NORM: (n_embd,)}.items():
            if name not in tensors or tensors[name].shape != shape:
                raise bad(f"it has no {name} of {' x '.join(map(str, shape))}")
        if tensors[NORM].type != GGMLQuantizationType.F32:
            raise bad(f"its {NORM} is not F32")
        for name in (HEAD, EMBEDDING):
            if name in tensors and tensors[name].shape[0] != n_embd:
                raise bad(f"rows of its {name} are not {n_embd} wide")
        if not 0 < n_vocab <= MOST_TOKENS or (EMBEDDING in tensors and tensors[EMBEDDING].n_rows != n_vocab):
            raise bad(f"it does not say how many tokens its target has ({arch}.vocab_size)")
        if D2T in tensors and HEAD not in tensors:
            raise bad(f"it has a {D2T} and no {HEAD}")
        if D2T in tensors and tensors[D2T].shape != (tensors[HEAD].n_rows,):
            raise bad(f"its {D2T} is not one I64 for each of the {tensors[HEAD].n_rows} rows of its head")
        ids = reduced_ids(file, n_vocab, bad)
        if ids is None and HEAD in tensors and tensors[HEAD].n_rows != n_vocab:
            raise bad(f"its head has {tensors[HEAD].n_rows} rows for {n_vocab} tokens and no {D2T}")
        n_rows = n_vocab if ids is None else len(ids)
        if MARKOV in tensors and (len(tensors[MARKOV].shape) != 2 or tensors[MARKOV].n_rows != n_rows):
            raise bad(f"its {MARKOV} has not {n_rows} rows, as its head has")
        if MARKOV in tensors and file.integer(f"{arch}.block_size", 0) < 1:
            raise bad(f"it does not say how many tokens it drafts at once ({arch}.block_size)")
        return cls(file, ids, tuple(layers.tolist()), width, n_embd, n_vocab, epsilon)

    @property
    def own(self) -> Tensor | None:
        """The tensor of its own head; None if llama.cpp takes its target's."""
        tied = self.file.architecture == DFLASH and EMBEDDING in self.file.tensors
        return head_tensor(self.file) if tied or HEAD in self.file.tensors else None

    @cached_property
    def _norm(self) -> np.ndarray:
        return np.frombuffer(self.file.read(self.file.tensors[NORM]), "<f4").copy()

    def hidden(self, states: np.ndarray) -> np.ndarray:
        """Their RMS norm."""
        scale = 1 / np.sqrt(np.mean(states * states, axis=-1, keepdims=True) + np.float32(self.epsilon))
        return np.asarray(states * scale * self._norm)

    def require_target(self, target: GGUFFile, vocabulary: Vocabulary) -> None:
        """Raise FileFormatError or VocabularyMismatch, naming both files, if it cannot read this target's states."""
        both, arch = f"{self.file.path} does not fit {target.path}", target.architecture
        if arch not in RECORDING:
            raise FileFormatError(
                f"{both}: llama.cpp records no inputs of layers for {arch}; use a drafter that reads the text itself"
            )
        width, n_layer = (target.integer(f"{arch}.{key}", 0) for key in ("embedding_length", "block_count"))
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
    """int32 by token id: its row in a head whose rows stand for `ids` (None: row i for id i), -1 for none."""
    if ids is None:
        return np.arange(n_vocab, dtype=np.int32)
    rows = np.full(n_vocab, -1, np.int32)
    rows[ids] = np.arange(len(ids))
    return rows


def _has_tokens(file: GGUFFile) -> bool:
    return "tokenizer.ggml.tokens" in file.fields


def reduced_ids(file: GGUFFile, n_vocab: int, bad: Callable[[str], FileFormatError]) -> np.ndarray | None:
    """int64, the target ids of the rows of a head that has not all; None if the file has no d2t. Raises `bad`."""
    tensor = file.tensors.get(D2T)
    if tensor is None:
        return None
    if tensor.type != GGMLQuantizationType.I64:
        raise bad(f"its {D2T} is {tensor.type.name}, not I64")
    ids = np.frombuffer(file.read(tensor), "<i8").astype(np.int64)
    if len(wrong := ids[(ids < 0) | (ids >= n_vocab)]):
        raise bad(f"its {D2T} names token {wrong[0]}, and its target has {n_vocab}")
    if len(np.unique(ids)) < len(ids):
        raise bad(f"its {D2T} names a token twice")
    return ids
