"""Contexts: a KV cache over a model that tokens are appended to, and that is rewound."""

from __future__ import annotations

import copy
import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import llama_cpp
import numpy as np
from gguf.constants import GGMLQuantizationType

from llamabase.errors import EngineError, SettingError

from .library import Owner, addressed, floats, interruptible, last_error, physical_cores
from .model import Model

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")


@dataclass(frozen=True)
class Cache:
    """Types of a KV cache's keys and values, as llama.cpp's --cache-type-k and -v name them.

    `flash`: use flash attention always (True) or never (False). None leaves it to llama.cpp, except for F32, which
    flash attention would round to half precision, differently for one token and for several. Raises SettingError, a
    ValueError, for a type that is not in CACHE_TYPES.
    """

    keys: str = "f16"
    values: str = "f16"
    flash: bool | None = None

    def __post_init__(self) -> None:
        for name in (self.keys, self.values):
            if name not in CACHE_TYPES:
                raise SettingError(f"{name}: is not a KV cache type; choose one of {', '.join(CACHE_TYPES)}")


F16, F32 = Cache(), Cache("f32", "f32")
BATCH = 512  # tokens, llama.cpp's default for --ubatch-size


@dataclass(frozen=True)
class ContextParams:
    """How a context computes, in the words of llama.cpp's flags.

    n_threads: None for one per physical core. n_ubatch: most tokens that are computed together. n_batch: most tokens of
    a call, so one more than can be drafted; None for n_ubatch, but no less than BATCH. offload_kqv: a device that holds
    a layer also holds its part of the KV cache. Raises SettingError for batches of no tokens.
    """

    n_threads: int | None = None
    cache: Cache = F16
    n_batch: int | None = None
    n_ubatch: int = BATCH
    offload_kqv: bool = True

    def __post_init__(self) -> None:
        for name in ("n_batch", "n_ubatch"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise SettingError(f"{name}={given}: a batch holds at least one token")

    @property
    def batch(self) -> int:
        """Most tokens of a call."""
        return self.n_batch or max(self.n_ubatch, BATCH)


CONTEXT_DEFAULTS = ContextParams()
COPIES = 3  # of a recurrent cache's state, each 50 MB for Qwen3.5-4B and 19 MB for Qwen3.5-0.8B
_STATE_ONLY = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY  # without the keys and values of a hybrid cache


class Recorder(Protocol):
    """Keeps something of every token that a context decodes: of those at positions 0 to n - 1 so far."""

    n: int

    def take(self, first: int, n: int, row: int = 0) -> None:
        """Record n tokens from position `first` on, which the batch that was just decoded holds from `row` on."""


class CacheFull(EngineError):
    """The cache that sequences share has no room for a batch."""


class LastBatch(NamedTuple):
    """What a context computed last, for all its sequences: tokens, those of them that gave logits, and wall time."""

    tokens: int
    outputs: int
    seconds: float


class _Opened:
    """What the sequences of one llama_context share. ctx: None if it is closed."""

    ctx: Any = None
    seconds = 0.0  # wall time spent inside llama.cpp so far
    last = LastBatch(0, 0, 0.0)
    meeting: Meeting | None = None
    read_last = False


class BaseContext(Owner):
    """What all contexts share: opening, computing and closing. `params`: further fields of llama_context_params.

    n_ctx: tokens that fit. n_batch: most tokens of a batch, of which n_ubatch are computed together. n_outputs: most
    rows of logits of a batch; llama.cpp reserves n_outputs x n_vocab floats. seconds: wall time spent inside llama.cpp
    so far. go_on is called before every batch and cancels the reading by returning False, so another thread can end the
    reading of a long prompt.

    Raises EngineError, with llama.cpp's reason, if it cannot be opened; also if it is cancelled or used when closed.
    """

    _opened = _Opened()

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        how: ContextParams,
        n_outputs: int,
        **params: Any,
    ) -> None:
        self._opened = _Opened()
        if model.is_block_alone and params.get("ctx_type") != llama_cpp.LLAMA_CONTEXT_TYPE_MTP:
            raise EngineError(
                f"{model.path}: holds only the block for multi-token prediction of a model, not its layers; give it as "
                "--draft beside the model"
            )
        self.model, self.how, cache = model, how, how.cache
        self.n_batch = min(how.batch, n_ctx)
        self.n_ubatch = min(how.n_ubatch, self.n_batch)
        self.n_outputs = self.batch_outputs = min(n_outputs, self.n_batch)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = n_ctx, self.n_batch, self.n_ubatch
        settings.type_k, settings.type_v = (int(GGMLQuantizationType[t.upper()]) for t in (cache.keys, cache.values))
        if cache.flash is not None or cache == F32:
            settings.flash_attn_type = int(bool(cache.flash))  # LLAMA_FLASH_ATTN_TYPE_ENABLED is 1, _DISABLED 0
        settings.kv_unified = True
        settings.n_threads = settings.n_threads_batch = how.n_threads or physical_cores()
        settings.offload_kqv = how.offload_kqv
        settings.swa_full = True  # a sliding window that forgets cannot be rewound
        settings.no_perf = True
        for name, value in params.items():
            setattr(settings, name, value)
        settings.n_outputs_max = max(self.n_outputs, settings.n_seq_max)  # llama.cpp reserves one for each sequence
        with interruptible():
            self._opened.ctx = llama_cpp.llama_init_from_model(model.handle, settings)
        if self._ctx is None:
            reason = last_error()
            raise EngineError(f"{model.path}: no context of {n_ctx} tokens: {reason}; try a smaller --ctx-size (n_ctx)")
        self.n_ctx: int = min(n_ctx, llama_cpp.llama_n_ctx(self._ctx))  # llama.cpp rounds up
        self.n_cells = self.n_ctx  # of all sequences together
        self.recorders: list[Recorder] = []
        self.go_on: Callable[[], bool] = lambda: True
        self._memory = llama_cpp.llama_get_memory(self._ctx)

    @property
    def _ctx(self) -> Any:
        return self._opened.ctx

    @property
    def seconds(self) -> float:
        return self._opened.seconds

    @property
    def handle(self) -> Any:
        if self._ctx is None:
            raise EngineError(f"{self.model.path}: its context was used after it was closed")
        return self._ctx

    def _took(self, started: float) -> float:
        """Add the seconds since `started`, once llama.cpp is done with what it was called for, and return them."""
        llama_cpp.llama_synchronize(self.handle)
        seconds = time.perf_counter() - started
        self._opened.seconds += seconds
        return seconds

    def _require_going_on(self, n: int) -> None:
        if not self.go_on():
            raise self.cancelled(n)

    def cancelled(self, n: int) -> EngineError:
        """What is raised if `go_on` cancels the reading of n tokens."""
        return EngineError(f"{self.model.path}: was cancelled while it read {n} tokens")

    def _compute(self, function: Callable[..., int], *arguments: Any) -> None:
        with interruptible():  # llama.cpp may log in the middle, and so call into Python
            code = function(self.handle, *arguments)
        if code == 1:
            raise CacheFull(
                f"{self.model.path}: the cache of {self.n_cells} tokens, which conversations share, is full; raise "
                "--ctx-size (n_ctx), or have fewer of them at once"
            )
        if code:
            raise EngineError(f"{self.model.path}: llama.cpp could not decode ({code}): {last_error()}")

    def _decode(self, batch: _Batch) -> None:
        self._compute(llama_cpp.llama_decode, batch.struct)

    def close(self) -> None:
        if self._ctx is not None:
            llama_cpp.llama_free(self._ctx)
            self._opened.ctx = None


class SequenceContext(BaseContext):
    """A context that holds one sequence, of n_past tokens: it is appended to at the end, and rewound."""

    n_past = 0
    sequence = 0  # its number in llama.cpp's cache
    recurrent = False  # whether its cache is a state that is carried from token to token

    def recount(self) -> int:
        """Tokens that the cache really holds, asked of llama.cpp: also right after an interrupted call.

        Tokens that a recorder missed are not counted: they must be decoded again.
        """
        self.n_past = min([self._held(), *(recorder.n for recorder in self.recorders)])
        return self.n_past

    def _held(self) -> int:
        if self._ctx is None:  # a stream that the collector finds after the context was closed
            return 0
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, self.sequence)) + 1

    def rewind(self, n: int) -> int:
        """Forget everything from position n on, or more if the cache cannot do less; returns n_past."""
        if self._ctx is None:
            return 0
        if not llama_cpp.llama_memory_seq_rm(self._memory, self.sequence, n, -1):
            n = 0
            llama_cpp.llama_memory_seq_rm(self._memory, self.sequence, -1, -1)
        self.n_past = min(self.n_past, n)
        return self.n_past

    def truncate(self, n: int) -> None:
        """`rewind` to position n. Raises EngineError if the cache had to forget more, and did."""
        before = self.n_past
        if self.rewind(n) < min(n, before):
            raise EngineError(f"{self.model.path}: its cache, a recurrent state, cannot be rewound to token {n}")


class Part(NamedTuple):
    """Tokens that a sequence is to read next: ids (n) or embeddings (float32, n x n_embd), of which the last `outputs`
    give logits. `hidden`: they give hidden states, too.
    """

    context: Context
    inputs: Sequence[int] | np.ndarray
    outputs: int
    hidden: bool

    @property
    def is_ids(self) -> bool:
        return not (isinstance(self.inputs, np.ndarray) and self.inputs.ndim == 2)


class Meeting(Protocol):
    """Where sequences of one context meet, so that their parts are read in one batch."""

    @property
    def awaited(self) -> bool:
        """Whether the reader of a part may wait for others here."""

    def ask(self, part: Part) -> np.ndarray:
        """What `read_parts` gives for a part."""


class Context(SequenceContext):
    """A sequence of tokens, decoded from their ids or their embeddings.

    A recurrent cache is a state, which does not contain the states before it. So it can be rewound to its checkpoint,
    to states that were copied, and once after each batch by at most `rewinds` tokens, of which llama.cpp keeps the
    states. The attribute is 0 if it cannot keep them for the architecture, and lower in a context of fewer than
    `rewinds` + 2 tokens. A second sequence holds the checkpoint: llama.cpp copies a state only when one of the
    sequences that share it goes on.

    `other`: the target's context, for a drafter that lacks tables. `n_parallel`: how many sequences the cache has room
    for, see `beside`. n_ctx is then that of all, of which one holds no more than the model was trained on, and a batch
    has room for twice n_outputs, whatever n_batch is given. If it is `unified`, a sequence may take what room others
    leave; else each has an equal part: attention is cheaper, but llama.cpp cuts batches that mix prompts with single
    tokens into pieces.
    """

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        how: ContextParams = CONTEXT_DEFAULTS,
        n_outputs: int = 32,
        rewinds: int = 0,
        other: Context | None = None,
        n_parallel: int = 1,
        unified: bool = True,
    ) -> None:
        # llama.cpp ends the process if it does not compute two tokens more together.
        kept = max(0, min(rewinds, min(how.n_ubatch, how.n_batch or how.n_ubatch, n_ctx) - 2))
        states = {"n_seq_max": 2 * n_parallel, "n_rs_seq": kept} if model.recurrent else {"n_seq_max": n_parallel}
        target = None if other is None else other.handle
        if n_parallel > 1:  # so that the rounds of all leave room for a prompt
            how = replace(how, n_batch=max(how.batch, 2 * n_outputs))
        super().__init__(model, n_ctx, how, n_outputs, ctx_other=target, kv_unified=unified, **states)
        self.recurrent, self.n_parallel = model.recurrent, n_parallel
        if n_parallel > 1:
            self.n_ctx = min(self.n_ctx, model.n_ctx_train)
        self.rewinds: int = llama_cpp.llama_n_rs_seq(self._ctx)
        self._batches = _Batches(model, self.n_batch)
        self._begin()

    _owns = True  # whether the llama_context is closed with it

    def _begin(self) -> None:
        self.n_past = 0
        self._spare = self.n_parallel + self.sequence  # the number of the sequence that holds its checkpoint
        self._oldest = 0  # the lowest position whose state is one of the last batch's that llama.cpp keeps
        self._checkpoint = 0  # its position; 0 for none
        self._copies: dict[int, np.ndarray] = {}  # by position, the oldest first
        self._undone = False  # whether a recurrent cache was rewound after its last batch
        self._row = 0  # of the last batch, where its rows of hidden states begin

    def beside(self, sequence: int) -> Context:
        """Another sequence of the same cache, by its number from 1 to n_parallel - 1; it must be closed before this."""
        if not 0 < sequence < self.n_parallel:
            raise ValueError(f"there is no sequence {sequence} of {self.n_parallel}")
        other = copy.copy(self)
        other.sequence, other._owns, other.recorders, other.go_on = sequence, False, [], lambda: True
        other._begin()
        return other

    def close(self) -> None:
        if self._owns:
            super().close()
        elif self._ctx is not None:
            self.rewind(0)
            self._opened = _Opened()  # another may take its place

    def meet(self, meeting: Meeting, last: bool) -> None:
        """Have all sequences of this cache read at a meeting: `last`, as targets do, or before those."""
        self._opened.meeting, self._opened.read_last = meeting, last

    @property
    def read_last(self) -> bool:
        return self._opened.read_last

    @property
    def last_batch(self) -> LastBatch:
        return self._opened.last

    @property
    def cache(self) -> int:
        """Tells caches apart: sequences of one have the same."""
        return id(self._opened)

    def decode(self, inputs: Sequence[int] | np.ndarray, outputs: int = 1, hidden: bool = False) -> np.ndarray:
        """Append token ids (n) or embeddings (float32, n x n_embd); returns the logits of the last `outputs`.

        The logits (float32, outputs x n_vocab) are a view, valid until the next decode. With `hidden`, `hidden_states`
        gives what the head was multiplied by; llama.cpp then needs outputs = n. Raises EngineError if the context is
        full; the cache then holds what it held before the refused batch.
        """
        n = len(inputs)
        if hidden and outputs != n:
            raise EngineError(f"hidden states of {n} tokens need {n} outputs, not {outputs}")
        if outputs > min(n, self.n_outputs):
            raise EngineError(f"{outputs} rows of logits asked of {n} tokens; the context gives {self.n_outputs}")
        if self.n_past + n > self.n_ctx:
            raise EngineError(
                f"{self.model.path}: the context of {self.n_ctx} tokens is full; raise --ctx-size (n_ctx)"
            )
        ends = [n]
        if n > self.n_batch:  # llama.cpp keeps the logits of the last batch only, so that must hold every wanted row
            tail = max(outputs, n % self.n_batch or self.n_batch)
            ends = [*range(self.n_batch, n - tail, self.n_batch), n - tail, n]
        start, logits = 0, np.empty((0, self.model.n_vocab), np.float32)
        for end in ends:
            self._require_going_on(n)
            part = Part(self, inputs[start:end] if len(ends) > 1 else inputs, outputs if end == n else 0, hidden)
            meeting = self._opened.meeting
            together = meeting is not None and meeting.awaited
            logits = meeting.ask(part) if meeting is not None and together else read_parts([part])[0]
            start = end
        return logits

    def _holds_more(self, n: int, row: int) -> None:
        """The batch that was just decoded appended n tokens to the sequence, in its rows from `row` on."""
        self._undone, self._row = False, row
        for recorder in self.recorders:
            recorder.take(self.n_past, n, row)
        self._oldest = max(self.n_past + 1, self.n_past + n - self.rewinds)
        self.n_past += n

    def hidden_states(self, n: int) -> np.ndarray:
        """The final hidden states (float32, n x n_embd) of the last decode, a view valid until the next one."""
        rows = floats(addressed("llama_get_embeddings")(self.handle), self._row + n, self.model.n_embd)
        return rows[self._row :]

    def checkpoint(self) -> None:
        """Make the end of the sequence the position that a recurrent cache can be rewound to, in place of the last one.

        A state that `rewind` chose among those of the last batch cannot be kept: the checkpoint then stays as it is.
        """
        if not self.recurrent or self._undone:
            return
        self._forget_checkpoint()
        llama_cpp.llama_memory_seq_cp(self._memory, self.sequence, self._spare, -1, -1)
        self._checkpoint = self.n_past

    def copy_state(self) -> None:
        """Copy the state of a recurrent cache, so that the end of the sequence stays a position to rewind to.

        COPIES of them are held, each until the sequence is rewound to before it.
        """
        if not self.recurrent or not self.n_past or self.n_past in self._copies:
            return
        whose = self.sequence, _STATE_ONLY
        state = np.empty(llama_cpp.llama_state_seq_get_size_ext(self.handle, *whose), np.uint8)
        if llama_cpp.llama_state_seq_get_data_ext(self.handle, _bytes(state), state.size, *whose) == state.size:
            self._copies[self.n_past] = state
        for oldest in list(self._copies)[:-COPIES]:
            del self._copies[oldest]

    def reach(self, n: int) -> int:
        """The position that `rewind(n)` would go back to: the nearest one, up to n, whose state the cache has."""
        if not self.recurrent or n >= min(self._oldest, self._held()):
            return n
        return max((to for to in (self._checkpoint, *self._copies) if to <= n), default=0)

    @property
    def undoable(self) -> int:
        """The most tokens of the next batch that can be undone without reading the text before them anew."""
        return self.rewinds if self._undone else self.n_ctx

    def rewind(self, n: int) -> int:
        if self._ctx is None or not self.recurrent or n >= self._held():
            return super().rewind(n)
        to = self.reach(n)
        from_batch, self._undone = to >= self._oldest, to > 0
        self._oldest = self.n_ctx + 1  # nowhere: a batch can be undone once
        self._copies = {at: copy for at, copy in self._copies.items() if at <= to}
        if to < self._checkpoint:
            self._forget_checkpoint()
        if from_batch or not to:
            if super().rewind(to) < to:  # llama.cpp refused, and all is forgotten
                self._copies = {}
                self._forget_checkpoint()
            return self.n_past
        with interruptible():
            if to == self._checkpoint:
                llama_cpp.llama_memory_seq_rm(self._memory, self.sequence, -1, -1)
                llama_cpp.llama_memory_seq_cp(self._memory, self._spare, self.sequence, -1, -1)
                self._forget_checkpoint()  # a state that is not shared is gone on from in place
            else:
                copy = self._copies[to]
                llama_cpp.llama_state_seq_set_data_ext(self.handle, _bytes(copy), copy.size, self.sequence, _STATE_ONLY)
            return super().rewind(to)

    def recount(self) -> int:
        if self._ctx is not None and self.recurrent and not self._checkpoint:
            self._forget_checkpoint()  # an interruption may have left a part of one
        return super().recount()

    def goes_back(self, inputs: Sequence[int] | np.ndarray) -> bool:
        """Whether the cache can be rewound, which two inputs show; it must be empty, and is left empty.

        llama.cpp may be unable to copy the state of an architecture.
        """
        if not self.recurrent:
            return True
        self.decode(inputs[:1], 0)
        self.checkpoint()
        logits = self.decode(inputs[1:2]).copy()
        same = self.rewind(1) == self._held() == 1
        same = same and bool(np.abs(self.decode(inputs[1:2]) - logits).max() <= 1e-3 * np.ptp(logits))
        self.rewind(0)
        return same

    def _forget_checkpoint(self) -> None:
        self._checkpoint = 0  # first, so that an interruption leaves no claim
        llama_cpp.llama_memory_seq_rm(self._memory, self._spare, -1, -1)


def read_parts(parts: Sequence[Part]) -> list[np.ndarray]:
    """Read parts of sequences of one cache in one batch, all as ids or all as embeddings, all with hidden states or
    none; returns the logits (float32, its outputs x n_vocab) of each, views until the next batch.

    Raises EngineError if llama.cpp cannot; the sequences then hold what they held before.
    """
    first = parts[0].context
    batch = first._batches.of(parts, first)
    for part in parts:
        part.context._oldest = first.n_ctx + 1  # nowhere, if the decode is interrupted
    started = time.perf_counter()
    first._decode(batch)
    row = outputs = 0
    for part in parts:
        part.context._holds_more(len(part.inputs), row)
        row += len(part.inputs)
        outputs += part.outputs
    first._opened.last = LastBatch(row, outputs, first._took(started))
    n_vocab = first.model.n_vocab
    if not outputs:
        return [np.empty((0, n_vocab), np.float32)] * len(parts)
    logits = floats(addressed("llama_get_logits")(first.handle), outputs, n_vocab)
    if len(parts) == 1:
        return [logits]
    ends = np.cumsum([part.outputs for part in parts]).tolist()
    return [logits[end - part.outputs : end] for part, end in zip(parts, ends, strict=True)]


def _bytes(array: np.ndarray) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class _Batches:
    """The two llama_batches of a context, for ids and for embeddings, and whether it gives hidden states."""

    def __init__(self, model: Model, size: int) -> None:
        self._model, self._size = model, size
        self._ids = _Batch(size)
        self._vectors: _Batch | None = None
        self._hidden = False

    def of(self, parts: Sequence[Part], context: Context) -> _Batch:
        """The batch of some parts."""
        if parts[0].hidden != self._hidden:  # a change makes llama.cpp build its graph anew
            llama_cpp.llama_set_embeddings(context.handle, parts[0].hidden)
            self._hidden = parts[0].hidden
        if parts[0].is_ids:
            batch = self._ids
        else:
            batch = self._vectors = self._vectors or _Batch(self._size, self._model)
        if len(parts) == 1:
            batch.fill(parts[0].inputs, parts[0].context.n_past, parts[0].outputs, parts[0].context.sequence)
        else:
            batch.fill_parts(parts)
        return batch


class _Batch:
    """A llama_batch over numpy arrays, for `size` token ids or embeddings of a model: filling it takes microseconds.

    For ids llama.cpp itself adds the positions of M-RoPE and the features of DeepStack; for embeddings it would read
    past the end of arrays that lack them. Embeddings get here what ids would get: three equal positions and a 0, and
    zeros.
    """

    def __init__(self, size: int, model: Model | None = None) -> None:
        self._n_pos = model.n_pos if model else 1
        whole = np.zeros((size, model.n_embd_inp), np.float32) if model else np.zeros(size, np.int32)
        self._inputs = whole[:, : model.n_embd] if model else whole
        self._positions = np.zeros(self._n_pos * size, np.int32)
        self._wanted = np.zeros(size, np.int8)
        # llama.cpp lets a token belong to several sequences; here each belongs to one.
        self._sequences, self._lengths = np.zeros(size, np.int32), np.ones(size, np.int32)
        self._addresses = self._sequences.ctypes.data + np.arange(size, dtype=np.uintp) * self._sequences.itemsize
        types = dict(llama_cpp.llama_batch._fields_)
        arrays = {
            "embd" if model else "token": whole, "pos": self._positions, "logits": self._wanted,
            "n_seq_id": self._lengths, "seq_id": self._addresses,
        }  # fmt: skip
        pointers = {name: array.ctypes.data_as(types[name]) for name, array in arrays.items()}
        self.struct = llama_cpp.llama_batch(**pointers)

    def fill(self, inputs: Sequence[int] | np.ndarray, first: int, outputs: int, sequence: int = 0) -> None:
        """Set tokens of a sequence, from position `first` on; logits of the last `outputs` of them are wanted."""
        n = self.struct.n_tokens = len(inputs)
        self._inputs[:n] = inputs
        self._sequences[:n] = sequence
        if n == 1:  # as below, without arrays of one number, which take longer to make than all the rest
            self._positions[:3], self._positions[3:4], self._wanted[0] = first, 0, outputs
            return
        rows = self._positions[: self._n_pos * n].reshape(self._n_pos, n)
        rows[:3] = np.arange(first, first + n)
        rows[3:] = 0
        self._wanted[: n - outputs] = 0
        self._wanted[n - outputs : n] = 1

    def fill_parts(self, parts: Sequence[Part]) -> None:
        """Set the tokens of several sequences, one after another."""
        n = self.struct.n_tokens = sum(len(part.inputs) for part in parts)
        rows, at = self._positions[: self._n_pos * n].reshape(self._n_pos, n), 0
        rows[3:] = 0
        self._wanted[:n] = 0
        for part in parts:
            end = at + len(part.inputs)
            self._inputs[at:end] = part.inputs
            self._sequences[at:end] = part.context.sequence
            rows[:3, at:end] = np.arange(part.context.n_past, part.context.n_past + end - at)
            self._wanted[end - part.outputs : end] = 1
            at = end
