"""Gemma 4's assistants: drafters that read their target's states and attend to its cache.

A step begins with u = P [E ; h], where E is a row of the *target's* embedding table times sqrt(width), and h a state.
The last hidden state c is multiplied by the head, and llama.cpp returns Q c, which is h for the next step. The token
embeddings of an assistant are nothing but its head, but llama.cpp takes no token id beyond their rows.

So a trimmed file has matrices that only copy numbers in place of P and Q: it is fed u with token 0, and returns c. P
and Q themselves are in the companion, and are multiplied here as llama.cpp does it, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType

from llamabase.errors import FileFormatError, VocabularyMismatch
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import ASSISTANT, EMBEDDING
from llamabase.gguf.vocabulary import Vocabulary, require_same
from llamabase.llama.context import Context, ContextParams
from llamabase.llama.ggml import Backend, Product, Table
from llamabase.llama.model import Model
from llamabase.llama.states import SharedPairContext

from .companion import EmbeddingTable, Trimmed

TARGET = "gemma4"
PRE, POST = "nextn.pre_projection.weight", "nextn.post_projection.weight"  # P and Q
KEPT = dict.fromkeys((PRE, POST), GGMLQuantizationType.F32)  # what a quantisation of a trimmed file leaves as it is
_CLUSTERS = ("masked_embd_centroids.weight", "masked_embd_ordering")
_NO_STATE = np.empty(0, np.float32)


@dataclass(frozen=True)
class Assistant:
    """An assistant, whole or trimmed. width: numbers of a state of its target. n_embd: of a hidden state of its own."""

    file: GGUFFile
    n_embd: int
    width: int

    @classmethod
    def of(cls, file: GGUFFile) -> Assistant:
        """Raises FileFormatError naming what llama.cpp would not survive or cannot load."""

        def bad(reason: str, way_out: str = "convert it again") -> FileFormatError:
            return FileFormatError(f"{file.path}: not a usable Gemma 4 assistant: {reason}; {way_out}")

        if file.architecture != ASSISTANT:
            raise bad(f"its architecture is {file.architecture}")
        if clusters := [name for name in _CLUSTERS if name in file.tensors]:
            raise bad(f"llama.cpp does not load its clusters ({clusters[0]})", "convert it with llama.cpp's converter")
        n_embd, width, n_layer, n_blocks = (
            file.integer(f"{ASSISTANT}.{key}", 0)
            for key in ("embedding_length", "embedding_length_out", "block_count", "nextn_predict_layers")
        )
        if not 0 < n_embd < width:
            raise bad(f"states of {width} numbers are not wider than its own of {n_embd}")
        windows = file.get(f"{ASSISTANT}.attention.sliding_window_pattern")
        if not isinstance(windows, np.ndarray) or len(windows) != n_layer or len(np.unique(windows)) != 2:
            raise bad(f"it does not say which of its {n_layer} layers have a sliding window and which have none")
        if n_blocks != n_layer:
            raise bad(f"only {n_blocks} of its {n_layer} layers draft")
        for layer in range(n_layer):
            n_heads, shared = _of_layer(file, "attention.head_count", layer), _Attended.of(file, layer).n_heads
            if not shared or n_heads % shared:
                raise bad(f"in its layer {layer}, {n_heads} heads cannot attend to {shared}")
        rows = file.tensors[EMBEDDING].n_rows if EMBEDDING in file.tensors else 0
        for name, shape in {EMBEDDING: (n_embd, rows), **_shapes(n_embd, width)}.items():
            if name not in file.tensors or file.tensors[name].shape != shape:
                raise bad(f"it has no {name} of {' x '.join(map(str, shape))}")
            if name != EMBEDDING and _is_cut(file) and file.tensors[name].type != GGMLQuantizationType.F32:
                raise bad(f"its {name} is no longer F32", "trim the original assistant again")
        return cls(file, n_embd, width)

    @property
    def copying(self) -> dict[str, np.ndarray]:
        """What stands in for P and Q in a trimmed file (float32): the first n_embd numbers of a state are u, and c."""
        pre = np.eye(self.n_embd, 2 * self.width, self.width, np.float32)
        return {PRE: pre, POST: np.eye(self.width, self.n_embd, dtype=np.float32)}

    def require_target(self, target: GGUFFile, vocabulary: Vocabulary) -> None:
        """Raise FileFormatError or VocabularyMismatch, naming both files, if it cannot draft for this target."""
        both, arch = f"{self.file.path} does not fit {target.path}", target.architecture
        if arch != TARGET:
            raise FileFormatError(f"{both}: it drafts for Gemma 4, and this target is {arch}; use another drafter")
        width, n_layer = (target.integer(f"{arch}.{key}", 0) for key in ("embedding_length", "block_count"))
        if width != self.width:
            raise FileFormatError(
                f"{both}: it reads states of {self.width} numbers, and this target's have {width}; use the assistant "
                "of this very target"
            )
        if EMBEDDING not in target.tensors:
            raise FileFormatError(
                f"{both}: the target has no {EMBEDDING}; join its parts with `llama-gguf-split --merge` first"
            )
        for layer in range(self.file.integer(f"{ASSISTANT}.block_count")):
            own = _Attended.of(self.file, layer)
            theirs = _Attended.of(target, n_layer - (2 if own.window else 1))
            if own != theirs:
                raise FileFormatError(
                    f"{both}: its layer {layer} attends to {own}, and the target has {theirs} there; use the assistant "
                    "of this very target"
                )
        known = self.file.get("gguf_trim.vocab_fingerprint")
        if known is not None and known != vocabulary.fingerprint:
            raise VocabularyMismatch(f"{both}: it was trimmed for another vocabulary; trim it for this target again")
        if "tokenizer.ggml.tokens" in self.file.fields:
            require_same(vocabulary, Vocabulary(self.file))
        n_vocab = self.file.integer("gguf_trim.vocab_size", self.file.tensors[EMBEDDING].n_rows)
        if n_vocab != len(vocabulary):
            raise VocabularyMismatch(f"{both}: it drafts {n_vocab} tokens, and this target has {len(vocabulary)}")


def _shapes(n_embd: int, width: int) -> dict[str, tuple[int, ...]]:
    """Those of P and Q, in ggml's order."""
    return {PRE: (2 * width, n_embd), POST: (n_embd, width)}


def _is_cut(file: GGUFFile) -> bool:
    return "gguf_trim.k" in file.fields


def _of_layer(file: GGUFFile, key: str, layer: int, default: int = 0) -> int:
    """A number that a file holds once, or for each layer."""
    value = file.get(f"{file.architecture}.{key}", default)
    if isinstance(value, np.ndarray):
        value = value[layer].item() if 0 <= layer < len(value) else 0
    return value if isinstance(value, int) else 0


class _Attended(NamedTuple):
    """What a layer attends to: numbers of heads, and in each of a key, of these rotated, and of a value."""

    window: bool
    n_heads: int
    key: int
    rotated: int
    value: int

    @classmethod
    def of(cls, file: GGUFFile, layer: int) -> _Attended:
        window = bool(_of_layer(file, "attention.sliding_window_pattern", layer))
        n_heads = _of_layer(file, "attention.head_count_kv", layer) or _of_layer(file, "attention.head_count", layer)
        kind = "_swa" if window else ""
        key, value = (_of_layer(file, f"attention.{what}_length{kind}", layer) for what in ("key", "value"))
        rotated = _of_layer(
            file, f"rope.dimension_count{kind}", layer, _of_layer(file, "rope.dimension_count", layer, key)
        )
        return cls(window, n_heads, key, rotated, value)

    def __str__(self) -> str:
        kind = "with" if self.window else "without"
        return f"{self.n_heads} heads of {self.key} ({self.rotated} rotated) and {self.value} numbers {kind} a window"


class AssistantSteps:
    """Draft steps of an assistant, each over all that its target's cache holds; opening them empties that cache.

    A step gives logits (float32, a view): of all tokens or, if `model` is that of a cut, of its rows. Only a cut gives
    hidden states, too (float32, n_embd). `trimmed` is the cut, or the one that `model` was requantised from.
    """

    def __init__(self, model: Model, target: Context, how: ContextParams, trimmed: Trimmed | None = None) -> None:
        self._backend: Backend | None = None
        if trimmed is not None:
            cut, companion = Assistant.of(trimmed.file), trimmed.companion
            for name, shape in _shapes(cut.n_embd, cut.width).items():
                if name not in companion.tensors or companion.tensors[name].shape != shape:
                    raise FileFormatError(f"{companion.path}: lacks the {name} of its assistant; trim that again")
            self._backend = Backend(how.n_threads)
            self._n_embd, self._inputs = cut.n_embd, np.zeros((1, cut.width), "f4")
            self._pre, self._post = (
                Product(self._backend, Table.of(companion, companion.tensors[name])) for name in (PRE, POST)
            )
            scale = trimmed.file.get("gguf_trim.embedding_scale")
            self._embeddings = EmbeddingTable(GGUFFile(target.model.path), scale)
        self._made = _NO_STATE
        self.context = SharedPairContext(model, target, how)

    def begin(self, token: int, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(logits, hidden state) of the draft after `token`, which the target has not read, and its last state."""
        if self._backend is None:
            logits, made = self.context.pairs([token], state[None], True)
            self._made = made[0]
            return logits[0], _NO_STATE
        self._inputs[0, : self._n_embd] = self._pre(np.append(self._embeddings.rows([token])[0], state))
        logits, made = self.context.pairs([0], self._inputs, True)
        self._made = made[0, : self._n_embd]
        return logits[0], self._made

    def follow(self, token: int) -> tuple[np.ndarray, np.ndarray]:
        """The same after the token that the last step drafted."""
        return self.begin(token, self._made if self._backend is None else self._post(self._made))

    @property
    def seconds(self) -> float:
        """Wall time spent inside llama.cpp and ggml so far."""
        return self.context.seconds + (0.0 if self._backend is None else self._backend.seconds)
