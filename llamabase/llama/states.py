"""A target's hidden states: recorded while it reads, and read by a drafter together with the tokens.

EAGLE-3 heads and MTP blocks need this. Only this module looks up the functions that llama.cpp calls experimental.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import llama_cpp
import numpy as np

from llamabase.errors import EngineError

from .context import CONTEXT_DEFAULTS, BaseContext, Context, ContextParams, SequenceContext
from .library import addressed, floats
from .model import Model

KNOWN = "0.3.36"  # the llama-cpp-python whose llama.cpp has everything that is used here
# Architectures whose graphs record the inputs of their layers, as that llama.cpp names them. If asked of another
# architecture, it ends the process.
RECORDING = frozenset({
    *("llama", "llama-embed", "qwen3", "qwen3moe", "qwen3next", "qwen35", "qwen35moe", "qwen4exp", "gemma4", "gpt-oss"),
    *("lfm2", "lfm2moe", "deepseek4", "bailingmoe3", "hunyuan_vl", "mimo2", "minimax-01", "minimax-m2"),
    *("muse-glimmer", "nanbeige", "nemotron_h"),
})  # fmt: skip

_FLOATS = ctypes.POINTER(ctypes.c_float)
# Result, arguments after the context, and how the names of these are mangled by GCC and Clang, and by Microsoft's C++.
_EXPERIMENTAL: dict[str, tuple[Any, list[Any], str, str]] = {
    "llama_set_embeddings_layer_inp": (None, [ctypes.c_uint32, ctypes.c_bool], "jb", "XPEAUllama_context@@I_N"),
    "llama_get_embeddings_layer_inp": (ctypes.c_void_p, [ctypes.c_uint32], "j", "PEAMPEAUllama_context@@I"),
    "llama_set_embeddings_nextn": (None, [ctypes.c_bool, ctypes.c_bool], "bb", "XPEAUllama_context@@_N1"),
    "llama_get_embeddings_nextn": (ctypes.c_void_p, [], "", "PEAMPEAUllama_context@@"),
}
_BOUND = ("llama_batch_ext_init", "llama_process", "llama_embd", "LLAMA_PROCESS_TYPE_ENCODE")


@lru_cache(maxsize=1)
def _experimental() -> dict[str, Any]:
    library = getattr(llama_cpp.llama_cpp, "_lib", None)
    functions: dict[str, Any] = {}
    for name, (result, arguments, itanium, microsoft) in _EXPERIMENTAL.items():
        for form in (name, f"_Z{len(name)}{name}P13llama_context{itanium}", f"?{name}@@YA{microsoft}@Z"):
            if (function := getattr(library, form, None)) is not None:
                function.restype, function.argtypes = result, [ctypes.c_void_p, *arguments]
                functions[name] = function
                break
    if functions.keys() != _EXPERIMENTAL.keys() or not all(hasattr(llama_cpp, name) for name in _BOUND):
        raise EngineError(
            f"the installed llama-cpp-python cannot run drafters that read their target's states; {KNOWN} can: "
            f"pip install llama-cpp-python=={KNOWN}"
        )
    return functions


class Recorded:
    """A target's states at every token that its context decodes: a `Recorder`.

    `rows[P]` (float32) are the states at position P, for P < n. With `layers` they are the inputs of these layers side
    by side (len(layers) x n_embd), which EAGLE-3 heads read. Without, they are what the head is multiplied by (n_embd),
    also at tokens whose logits are not wanted; MTP blocks read that.

    Raises EngineError, before anything is decoded, if llama.cpp records no layers of the target's architecture.
    """

    def __init__(self, context: BaseContext, architecture: str, layers: Sequence[int]) -> None:
        if layers and architecture not in RECORDING:
            raise EngineError(
                f"{context.model.path}: the drafter needs inputs of its target's layers, and llama.cpp records none "
                f"for {architecture}; use a drafter that reads the text itself"
            )
        library = _experimental()
        self.n, self.layers = 0, tuple(layers)
        for layer in layers:
            library["llama_set_embeddings_layer_inp"](context.handle, layer, True)
        read = library["llama_get_embeddings_layer_inp"]
        self._parts = [partial(read, context.handle, layer) for layer in layers]
        if not layers:
            library["llama_set_embeddings_nextn"](context.handle, True, False)
            self._parts = [partial(library["llama_get_embeddings_nextn"], context.handle)]
        self._n_embd = context.model.n_embd
        self.rows = np.empty((context.n_ctx, len(self._parts) * self._n_embd), np.float32)
        context.recorders.append(self)

    @classmethod
    def of(cls, context: Context, architecture: str = "", layers: Sequence[int] = ()) -> Recorded:
        """The record of these layers, which several drafters may read; a new one begins with an empty cache."""
        for recorder in context.recorders:
            if isinstance(recorder, cls) and recorder.layers == tuple(layers):
                return recorder
        recorded = cls(context, architecture, layers)
        context.rewind(0)
        return recorded

    def take(self, first: int, n: int, row: int = 0) -> None:
        self.n = min(self.n, first)
        for i, part in enumerate(self._parts):
            columns = slice(i * self._n_embd, (i + 1) * self._n_embd)
            self.rows[first : first + n, columns] = floats(part(), row + n, self._n_embd)[row:]
        self.n = first + n


class PairContext(SequenceContext):
    """A sequence of (token, state) pairs, which a drafter that reads its target's states decodes.

    The pair at position P is the token at P + 1 of the text with a state at P: what `encode` makes of the target's
    recorded states there or, while drafting, the state that `pairs` returned for the pair before. `model` is an EAGLE-3
    head, and `other` its target's context; or `model` holds an MTP block, as the target itself may, and `mtp` decodes
    with it. Without `head` no logits are computed; it may be set later on.
    """

    _extended: Any = None

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        how: ContextParams = CONTEXT_DEFAULTS,
        other: Context | None = None,
        n_outputs: int = 1,
        mtp: bool = False,
        head: bool = True,
    ) -> None:
        self._library = _experimental()
        self._mtp, self.head = mtp, head
        self._width: int = llama_cpp.llama_model_n_embd_out(model.handle)  # numbers of a state
        kind = llama_cpp.LLAMA_CONTEXT_TYPE_MTP if mtp else llama_cpp.LLAMA_CONTEXT_TYPE_DEFAULT
        target = None if other is None else other.handle  # whose context must outlive this one
        super().__init__(model, n_ctx, how, n_outputs, ctx_type=kind, ctx_other=target)
        self._library["llama_set_embeddings_nextn"](self.handle, True, head)  # of all tokens, or only of outputs
        self._extended = llama_cpp.llama_batch_ext_init(self.handle)

    def encode(self, recorded: np.ndarray) -> np.ndarray:
        """The states (float32, n x n_embd) to pair tokens with, made of a target's (float32, n x width of a record)."""
        if self._mtp:
            return recorded
        states = np.empty((len(recorded), self._width), np.float32)
        for start in range(0, len(recorded), self.n_ubatch):  # an encoder's batch must be computed together
            part = np.ascontiguousarray(recorded[start : start + self.n_ubatch])
            # The encoder ignores positions, but llama.cpp insists on those that come next.
            self._process(llama_cpp.LLAMA_PROCESS_TYPE_ENCODE, self.recount(), None, part, True)
            states[start : start + len(part)] = self._states(len(part))
        return states

    def pairs(self, tokens: Sequence[int], states: np.ndarray, outputs: bool) -> tuple[np.ndarray, np.ndarray]:
        """Append pairs. With `outputs`, (logits, states) after the last of them, at most n_outputs: float32
        (n x n_vocab, a view) and (n x numbers of a state). The head is computed for each of them, so n_outputs is
        mostly 1.
        """
        logits, made = np.empty((0, self.model.n_vocab), np.float32), np.empty((0, self._width), np.float32)
        size = self.n_outputs if outputs else self.n_batch
        for start in range(0, len(tokens), size):
            self._require_going_on(len(tokens))
            part = np.ascontiguousarray(states[start : start + size], np.float32)
            n, ids = len(part), tokens[start : start + size]
            self._process(llama_cpp.LLAMA_PROCESS_TYPE_DECODE, self.n_past, ids, part, outputs and self.head)
            self.n_past += n
            if outputs:
                if self.head:
                    logits = floats(addressed("llama_get_logits")(self.handle), n, self.model.n_vocab)
                made = self._states(n).copy()
        return logits, made

    def _states(self, n: int) -> np.ndarray:
        return floats(self._library["llama_get_embeddings_nextn"](self.handle), n, self._width)

    def _process(self, kind: int, first: int, tokens: Sequence[int] | None, states: np.ndarray, outputs: bool) -> None:
        batch = self._extended
        llama_cpp.llama_batch_ext_clear(batch)
        width = states.shape[1]
        for i, row in enumerate(states):  # llama.cpp copies its memory at once
            state = llama_cpp.llama_embd(row.ctypes.data_as(_FLOATS), 1, width)
            if tokens is None:
                place = llama_cpp.llama_batch_ext_add_embd(batch, 0, state)
            else:
                place = llama_cpp.llama_batch_ext_add_token(batch, 0, int(tokens[i]))
                llama_cpp.llama_batch_ext_set_embd_token(batch, place, state)
            llama_cpp.llama_batch_ext_set_pos(batch, place, ctypes.byref(llama_cpp.llama_pos(first + i)))
            llama_cpp.llama_batch_ext_set_output_logits(batch, place, outputs)
        started = time.perf_counter()
        self._compute(llama_cpp.llama_process, kind, batch)
        self._took(started)

    def close(self) -> None:
        if self._extended is not None:
            llama_cpp.llama_batch_ext_free(self._extended)
            self._extended = None
        super().close()


class SharedPairContext(PairContext):
    """Pairs that a Gemma 4 assistant decodes over the cache of its target, which it only reads.

    Each pair comes at the position after what the target holds, and leaves nothing behind. Opening one makes llama.cpp
    forget what the target's cache holds.
    """

    def __init__(self, model: Model, other: Context, how: ContextParams) -> None:
        # The same type of cache, since llama.cpp lays out one with flash attention differently.
        super().__init__(model, other.n_ctx, replace(how, cache=other.how.cache), other)
        self._other = other
        other.rewind(0)

    def pairs(self, tokens: Sequence[int], states: np.ndarray, outputs: bool) -> tuple[np.ndarray, np.ndarray]:
        self.n_past = self._other.n_past
        return super().pairs(tokens, states, outputs)
