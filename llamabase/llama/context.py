"""Contexts: one KV cache over a model, appended to, read and rewound."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
from gguf.constants import GGMLQuantizationType

from llamabase.errors import EngineError, SettingError

from .interrupt import interruptible
from .library import LAST_ERRORS, Owner, floats, last_error, physical_cores
from .model import Model

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")


@dataclass(frozen=True)
class Cache:
    """Types of a KV cache's keys and values, as llama.cpp's --cache-type-k and -v name them.

    `flash`: read by flash attention always (True) or never (False); None lets llama.cpp decide, but for F32: flash
    attention would round it to half precision, differently for one token and for several. Raises SettingError, which
    is a ValueError, for a type that llama.cpp keeps no cache in.
    """

    keys: str = "f16"
    values: str = "f16"
    flash: bool | None = None

    def __post_init__(self) -> None:
        for name in (self.keys, self.values):
            if name not in CACHE_TYPES:
                raise SettingError(f"{name}: is no type of a KV cache; there are {', '.join(CACHE_TYPES)}")


F16, F32 = Cache(), Cache("f32", "f32")


class Context(Owner):
    """One sequence in one KV cache over a model: append, read logits, rewind.

    With n_sequences > 1 the cache of n_ctx tokens is shared by several, and decode_each and drop take their numbers;
    unless `unified`, each has its own share of it.
    n_outputs is the most rows of logits one decode may ask for; llama.cpp reserves n_outputs x n_vocab floats for it.
    A recurrent cache keeps a copy of itself for each of `rewinds` tokens, so many of the last batch it can take back.
    `mtp`: read by the model's MTP block alone, see `states.PairContext`.
    `seconds` adds up the wall time spent inside llama.cpp.
    """

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        n_threads: int | None = None,
        n_batch: int = 512,
        n_outputs: int = 32,
        n_sequences: int = 1,
        cache: Cache = F16,
        other: Context | None = None,
        unified: bool = True,
        rewinds: int = 0,
        mtp: bool = False,
    ) -> None:
        self._ctx = None
        self.recorders: list[Any] = []  # of what the layers are given, see `states.Recorded`
        self.model = model
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = n_batch = min(n_batch, n_ctx)
        params.n_outputs_max = min(n_outputs, n_batch)
        params.n_seq_max = n_sequences
        params.type_k, params.type_v = (int(GGMLQuantizationType[t.upper()]) for t in (cache.keys, cache.values))
        if cache.flash is not None or cache == F32:
            params.flash_attn_type = (
                llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if cache.flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            )
        # Apart, attention is cheaper, but batches that mix prompts with single tokens are then cut to pieces.
        params.kv_unified = unified
        params.n_threads = params.n_threads_batch = n_threads or physical_cores()
        params.swa_full = True  # a sliding window that forgets cannot be rewound
        params.no_perf = True
        params.n_rs_seq = rewinds if model.recurrent else 0
        if other is not None:  # the context that this one hangs on, which must outlive it
            params.ctx_other = other.handle
        if mtp:
            params.ctx_type = llama_cpp.LLAMA_CONTEXT_TYPE_MTP
        LAST_ERRORS.clear()
        with interruptible():
            self._ctx = llama_cpp.llama_init_from_model(model.handle, params)
        if self._ctx is None:
            reason = last_error()
            raise EngineError(f"{model.path}: no context of {n_ctx} tokens: {reason}; try a smaller --ctx-size (n_ctx)")
        self.n_ctx: int = min(n_ctx, llama_cpp.llama_n_ctx(self._ctx))  # llama.cpp rounds up
        self.n_batch = n_batch
        self.n_outputs = params.n_outputs_max
        self.n_past = 0
        self.recurrent = model.recurrent and not mtp
        self.rewinds: int = llama_cpp.llama_n_rs_seq(self._ctx)  # 0 where this architecture keeps no copies
        self._oldest = 0  # to which a recurrent cache can be rewound, but for its beginning
        self.seconds = 0.0
        # Asked before every batch, so that another thread can end the reading of a long prompt.
        self.go_on: Callable[[], bool] = lambda: True
        self._memory = llama_cpp.llama_get_memory(self._ctx)
        self._with_hidden = False
        self._ids = _Batch(self.n_batch)
        self._vectors: _Batch | None = None

    @property
    def handle(self) -> Any:
        if self._ctx is None:
            raise EngineError(f"{self.model.path}: its context was used after it was closed")
        return self._ctx

    def decode(self, inputs: Sequence[int] | np.ndarray, outputs: int = 1, hidden: bool = False) -> np.ndarray:
        """Append token ids (n) or embeddings of tokens (n x n_embd, float32): the logits of the last `outputs`.

        Returns a view, rows x n_vocab, valid until the next decode. With `hidden`, `hidden_states` gives what the head
        was multiplied by; llama.cpp then needs all n rows as outputs. Raises EngineError where the context is full; the
        cache then still holds what it held before the refused batch.
        """
        handle = self.handle
        n = len(inputs)
        if hidden and outputs != n:
            raise EngineError(f"hidden states of {n} tokens need {n} outputs, not {outputs}")
        if outputs > min(n, self.n_outputs):
            raise EngineError(f"{outputs} rows of logits asked of {n} tokens; the context gives {self.n_outputs}")
        if self.n_past + n > self.n_ctx:
            raise EngineError(
                f"{self.model.path}: the context of {self.n_ctx} tokens is full; raise --ctx-size (n_ctx)"
            )
        if hidden != self._with_hidden:  # a change makes llama.cpp build its graph anew
            llama_cpp.llama_set_embeddings(handle, hidden)
            self._with_hidden = hidden
        if isinstance(inputs, np.ndarray) and inputs.ndim == 2:
            batch = self._vectors = self._vectors or _Batch(self.n_batch, self.model)
        else:
            batch = self._ids
        started = time.perf_counter()
        # llama.cpp keeps the logits of the last batch only, so that one must hold every wanted row.
        tail = max(outputs, n % self.n_batch or self.n_batch) if n > self.n_batch else n
        edges = [*range(0, n - tail, self.n_batch), n - tail, n]
        for start, end in itertools.pairwise(edges):
            if not self.go_on():
                raise EngineError(f"{self.model.path}: was cancelled while it read {n} tokens")
            batch.fill(inputs[start:end], self.n_past, outputs if end == n else 0)
            self._oldest = self.n_ctx + 1  # nowhere, should the decode be interrupted
            self._decode(batch)
            for recorder in self.recorders:
                recorder.take(self.n_past, end - start)
            self._oldest = max(self.n_past + 1, self.n_past + end - start - self.rewinds)
            self.n_past += end - start
        if not outputs:
            llama_cpp.llama_synchronize(handle)
            self.seconds += time.perf_counter() - started
            return np.empty((0, self.model.n_vocab), np.float32)
        pointer = llama_cpp.llama_get_logits(handle)  # waits for the computation
        self.seconds += time.perf_counter() - started
        return floats(pointer, outputs, self.model.n_vocab)

    def hidden_states(self, n: int) -> np.ndarray:
        """The final hidden states (float32, n x n_embd) of the last decode, a view valid until the next one."""
        return floats(llama_cpp.llama_get_embeddings(self.handle), n, self.model.n_embd)

    def _decode(self, batch: _Batch) -> None:
        LAST_ERRORS.clear()
        with interruptible():  # llama.cpp may log, and so call into Python, in the middle
            code = llama_cpp.llama_decode(self.handle, batch.struct)
        if code:
            raise EngineError(f"{self.model.path}: llama.cpp could not decode ({code}): {last_error()}")

    def decode_each(
        self, tokens: Sequence[int], sequences: Sequence[int], positions: Sequence[int], outputs: Sequence[bool]
    ) -> np.ndarray:
        """Append one token to each of several sequences (which may repeat); logits of those with outputs, in order."""
        n = len(tokens)
        self._ids.fill(tokens, 0, 0)
        self._ids.positions[:n] = positions
        self._ids.wanted[:n] = outputs
        self._ids.sequences[:n] = sequences
        started = time.perf_counter()
        self._decode(self._ids)
        pointer = llama_cpp.llama_get_logits(self.handle)
        self.seconds += time.perf_counter() - started
        return np.ctypeslib.as_array(pointer, shape=(int(np.count_nonzero(outputs)), self.model.n_vocab))

    def drop(self, sequence: int) -> None:
        """Forget a whole sequence."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def count(self) -> int:
        """Tokens the cache really holds, asked of llama.cpp; also after a call that was interrupted.

        Of what the recorders missed, none: where `take` was not reached, the tokens are to be read again.
        """
        self.n_past = min([self._held(), *(recorder.n for recorder in self.recorders)])
        return self.n_past

    def _held(self) -> int:
        if self._ctx is None:  # a stream that is collected after it was closed settles it
            return 0
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, 0)) + 1

    def rewind(self, n: int) -> int:
        """Forget everything from position n on, or all there is where a recurrent cache cannot do less; give n_past."""
        if self._ctx is None:
            return 0
        if self.recurrent and n < min(self._oldest, self._held()):
            n = 0  # llama.cpp would take back more than it has copies of
        if not llama_cpp.llama_memory_seq_rm(self._memory, 0, n, -1):
            n = 0
            llama_cpp.llama_memory_seq_rm(self._memory, 0, -1, -1)
        self.n_past = min(self.n_past, n)
        return self.n_past

    def truncate(self, n: int) -> None:
        """`rewind` to position n. Raises EngineError where the cache could only forget everything, and has."""
        before = self.n_past
        if self.rewind(n) < min(n, before):
            raise EngineError(
                f"{self.model.path}: its cache cannot be rewound to token {n}, as recurrent models cannot; "
                "speculative decoding needs a model with attention only"
            )

    def close(self) -> None:
        if self._ctx is not None:
            llama_cpp.llama_free(self._ctx)
            self._ctx = None


class _Batch:
    """A llama_batch over arrays of numpy's, for `size` token ids or for embeddings of a model: filling one costs
    microseconds.

    llama.cpp gives token ids the positions of M-RoPE and the features of DeepStack by itself, and reads past the end of
    arrays without them for embeddings: those get here what ids would get, three equal positions and a 0, and zeros.
    """

    def __init__(self, size: int, model: Model | None = None) -> None:
        self._n_pos = model.n_pos if model else 1
        whole = np.zeros((size, model.n_embd_inp), np.float32) if model else np.zeros(size, np.int32)
        self.inputs = whole[:, : model.n_embd] if model else whole
        self.positions = np.zeros(self._n_pos * size, np.int32)
        self.wanted = np.zeros(size, np.int8)
        # A token may belong to several sequences; here each belongs to one.
        self.sequences, self._lengths = np.zeros(size, np.int32), np.ones(size, np.int32)
        self._addresses = self.sequences.ctypes.data + np.arange(size, dtype=np.uintp) * self.sequences.itemsize
        types = dict(llama_cpp.llama_batch._fields_)
        arrays = {
            "embd" if model else "token": whole, "pos": self.positions, "logits": self.wanted,
            "n_seq_id": self._lengths, "seq_id": self._addresses,
        }  # fmt: skip
        pointers = {name: array.ctypes.data_as(types[name]) for name, array in arrays.items()}
        self.struct = llama_cpp.llama_batch(**pointers)

    def fill(self, inputs: Sequence[int] | np.ndarray, position: int, outputs: int) -> None:
        n = len(inputs)
        self.struct.n_tokens = n
        self.inputs[:n] = inputs
        positions = self.positions[: self._n_pos * n].reshape(self._n_pos, n)
        positions[:3] = np.arange(position, position + n)
        positions[3:] = 0
        self.wanted[:n] = 0
        self.wanted[n - outputs : n] = 1
