"""The seam over llama.cpp: models and contexts.

`llama_cpp.Llama` keeps an n_ctx x n_vocab array of scores and ignores refused rewinds, so everything here drives the
`llama_*` functions that llama-cpp-python binds. A Model owns weights, a Context owns one KV cache.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import llama_cpp
import numpy as np
from gguf.constants import GGMLQuantizationType

from .errors import EngineError, FileFormatError, SettingError
from .gguf_file import GGUFFile
from .interrupt import interruptible
from .tokenizing import Tokenizer

LAST_ERRORS: deque[str] = deque(maxlen=8)
_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR
_MROPE = (llama_cpp.LLAMA_ROPE_TYPE_MROPE, llama_cpp.LLAMA_ROPE_TYPE_IMROPE)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    """Keep llama.cpp's errors for our own messages and its chatter off the user's screen."""
    if level == _ERROR_LEVEL:
        LAST_ERRORS.append(text.decode("utf-8", "replace").strip())


@lru_cache(maxsize=1)
def start() -> None:
    """Load llama.cpp's backends, and keep its chatter and ggml's off the user's screen."""
    llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


def last_error() -> str:
    """llama.cpp's own reason: the most telling line, which is the first."""
    return LAST_ERRORS[0] if LAST_ERRORS else "llama.cpp gave no reason"


@lru_cache(maxsize=1)
def physical_cores() -> int:
    """Cores to compute on, as llama.cpp counts them: two threads of one core only get in each other's way."""
    if sys.platform == "linux":
        siblings = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings")
        cores = {path.read_text() for path in siblings}
        allowed = len(os.sched_getaffinity(0))
        return min(len(cores), allowed) or allowed
    if sys.platform == "darwin":
        for name in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
            answer = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
            if answer.returncode == 0 and answer.stdout.strip().isdigit():
                return int(answer.stdout)
    return max(1, (os.cpu_count() or 2) // 2)


def backends() -> dict[str, str]:
    """What this llama.cpp computes with, and each backend's features: {"CPU": "AVX2 AVX512", ...}."""
    start()
    found: dict[str, str] = {}
    name = ""
    for part in llama_cpp.llama_print_system_info().decode("utf-8", "replace").split(" | "):
        head, colon, rest = part.partition(" : ")
        name, feature = (head.strip(), rest) if colon else (name, part)
        if (key := feature.partition(" = ")[0].strip()) and name:
            found[name] = f"{found.get(name, '')} {key}".strip()
    return found


T = TypeVar("T")


class Closing:
    """Something that is closed by `with`, or by close()."""

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError


class Owner(Closing):
    """Something that holds memory of llama.cpp's: the collector closes it at the latest."""

    def __del__(self) -> None:
        self.close()


class Model(Owner):
    """Weights and vocabulary of one GGUF.

    Raises EngineError where llama.cpp cannot load it, with llama.cpp's reason.
    """

    def __init__(self, path: str | Path, n_gpu_layers: int | None = None, vocab_only: bool = False) -> None:
        self._model = None
        self.path = Path(path)
        start()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = vocab_only
        params.load_mtp = True  # a block for multi-token prediction, where the file has one
        if n_gpu_layers is not None:
            params.n_gpu_layers = n_gpu_layers
        if not self.path.is_file():
            raise EngineError(f"{self.path}: there is no such file")
        if not vocab_only:
            try:
                file = GGUFFile(self.path)
            except FileFormatError:
                pass  # llama.cpp says itself what it cannot read
            else:
                file.require_loadable()
        LAST_ERRORS.clear()
        with interruptible() as go_on:
            params.progress_callback = progress = llama_cpp.llama_progress_callback(lambda *_: go_on())
            self._model = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), params)
            del progress  # kept alive until here
        if self._model is None:
            raise EngineError(f"{self.path}: llama.cpp cannot load it: {last_error()}")
        self.vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._tokenizer = Tokenizer(self.path, self._model, self.vocab)
        self.samplers: dict[Any, Any] = {}  # of llama.cpp's that take long to make, to be cloned
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.n_embd: int = llama_cpp.llama_model_n_embd(self._model)
        # Numbers of an input embedding, more than n_embd with DeepStack, and its positions, four with M-RoPE.
        self.n_embd_inp: int = llama_cpp.llama_model_n_embd_inp(self._model)
        self.n_pos: int = 4 if llama_cpp.llama_model_rope_type(self._model) in _MROPE else 1
        self.n_ctx_train: int = llama_cpp.llama_model_n_ctx_train(self._model)
        # Whether its cache is a state that goes on from token to token, wholly or in part.
        self.recurrent: bool = llama_cpp.llama_model_is_recurrent(self._model) or llama_cpp.llama_model_is_hybrid(
            self._model
        )

    @property
    def handle(self) -> Any:
        if self._model is None:
            raise EngineError(f"{self.path}: used after it was closed")
        return self._model

    def is_end(self, token: int) -> bool:
        """Whether a token ends the generation (EOS, EOT and their like)."""
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    @property
    def bos(self) -> int | None:
        """The token a text begins with where the vocabulary has one."""
        token = llama_cpp.llama_vocab_bos(self.vocab)
        return token if token >= 0 else None

    def tokenize(self, text: str, special: bool = True, add_bos: bool = True, n_ctx: int | None = None) -> list[int]:
        """Token ids of a text; `special` reads `<|im_end|>` and its like as tokens, `add_bos` as the model wants it.

        Raises TextError for a text that llama.cpp cannot split, and PromptTooLong before a large one is split that
        n_ctx tokens cannot hold; see `llamabase.tokenizing`.
        """
        return self._tokenizer.ids(text, special, add_bos, n_ctx)

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of a token: possibly a part of a character. Control tokens are empty unless `special`."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def close(self) -> None:
        if self._model is not None:
            for sampler in self.samplers.values():
                llama_cpp.llama_sampler_free(sampler)
            llama_cpp.llama_model_free(self._model)
            self._model = None


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


def floats(pointer: Any, n_rows: int, n_columns: int) -> np.ndarray:
    """A view of llama.cpp's memory: as `np.ctypeslib.as_array` gives, in a fraction of its time."""
    memory: Any = (ctypes.c_float * (n_rows * n_columns)).from_address(ctypes.addressof(pointer.contents))
    return np.ndarray((n_rows, n_columns), np.float32, memory)


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


_TOKEN = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class Tokens:
    """Tokens as llama.cpp's samplers see them: an array in numpy's memory that shrinks and changes as they act."""

    def __init__(self, memory: np.ndarray) -> None:
        """`memory`: an array of _TOKEN that no one else may hold."""
        self._memory = memory
        pointer = ctypes.cast(memory.ctypes.data, ctypes.POINTER(llama_cpp.llama_token_data))
        self._array = llama_cpp.llama_token_data_array(data=pointer, size=len(memory), selected=-1, sorted=False)

    @classmethod
    def of(cls, ids: np.ndarray, logits: np.ndarray) -> Tokens:
        memory = np.empty(len(logits), _TOKEN)
        memory["id"], memory["logit"], memory["p"] = ids, logits, 0
        return cls(memory)

    def apply(self, sampler: Any) -> None:
        """Let one of llama.cpp's samplers act."""
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(self._array))

    @property
    def left(self) -> np.ndarray:
        """What is left, in any order: a view of (id, logit, p)."""
        first = 0
        if self._array.size < len(self._memory):  # XTC moves the beginning on
            first = (ctypes.addressof(self._array.data.contents) - self._memory.ctypes.data) // _TOKEN.itemsize
        return self._memory[first : first + self._array.size]
