"""What llama.cpp gives and takes beside tokens: states of a target's, and a hidden state with every token.

EAGLE-3 heads and MTP blocks live on this. The functions that llama.cpp keeps apart as experimental are looked up here
and nowhere else.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import llama_cpp
import numpy as np

from llamabase.errors import EngineError

from .context import F16, Cache, Context
from .interrupt import interruptible
from .library import LAST_ERRORS, floats, last_error
from .model import Model

KNOWN = "0.3.36"  # the llama-cpp-python whose llama.cpp has all that is used here
# Architectures whose graphs record the inputs of their layers, as llama.cpp of that version names them. It ends the
# process where another one is asked to.
RECORDING = frozenset({
    *("llama", "llama-embed", "qwen3", "qwen3moe", "qwen3next", "qwen35", "qwen35moe", "qwen4exp", "gemma4", "gpt-oss"),
    *("lfm2", "lfm2moe", "deepseek4", "bailingmoe3", "hunyuan_vl", "mimo2", "minimax-01", "minimax-m2"),
    *("muse-glimmer", "nanbeige", "nemotron_h"),
})  # fmt: skip

_FLOATS = ctypes.POINTER(ctypes.c_float)
# What each gives and takes after the context, and how GCC's and Clang's, and Microsoft's compiler name that.
_EXPERIMENTAL: dict[str, tuple[Any, list[Any], str, str]] = {
    "llama_set_embeddings_layer_inp": (None, [ctypes.c_uint32, ctypes.c_bool], "jb", "XPEAUllama_context@@I_N"),
    "llama_get_embeddings_layer_inp": (_FLOATS, [ctypes.c_uint32], "j", "PEAMPEAUllama_context@@I"),
    "llama_set_embeddings_nextn": (None, [ctypes.c_bool, ctypes.c_bool], "bb", "XPEAUllama_context@@_N1"),
    "llama_get_embeddings_nextn": (_FLOATS, [], "", "PEAMPEAUllama_context@@"),
}
_BOUND = ("llama_batch_ext_init", "llama_process", "llama_embd", "LLAMA_PROCESS_TYPE_ENCODE")


@lru_cache(maxsize=1)
def _experimental() -> dict[str, Any]:
    library = getattr(llama_cpp.llama_cpp, "_lib", None)
    found: dict[str, Any] = {}
    for name, (result, arguments, itanium, microsoft) in _EXPERIMENTAL.items():
        for form in (name, f"_Z{len(name)}{name}P13llama_context{itanium}", f"?{name}@@YA{microsoft}@Z"):
            if (function := getattr(library, form, None)) is not None:
                function.restype, function.argtypes = result, [ctypes.c_void_p, *arguments]
                found[name] = function
                break
    if found.keys() != _EXPERIMENTAL.keys() or not all(hasattr(llama_cpp, name) for name in _BOUND):
        raise EngineError(
            f"the installed llama-cpp-python cannot run drafters that hang on their target; {KNOWN} can: "
            f"pip install llama-cpp-python=={KNOWN}"
        )
    return found


class Recorded:
    """States of a target that a drafter hangs on, kept for every token that its context reads.

    `rows[P]` (float32) are those of the token at position P, for P < n. With `layers` they are what goes into those,
    one after another in a row (len(layers) x n_embd), which EAGLE-3 heads read; without, what the head is multiplied by
    (n_embd), whether or not logits are asked for, which MTP blocks read.

    Raises EngineError where the target's graph records no inputs of layers; nothing is decoded then.
    """

    def __init__(self, context: Context, architecture: str, layers: Sequence[int]) -> None:
        if layers and architecture not in RECORDING:
            raise EngineError(
                f"{context.model.path}: a drafter that hangs on its target needs the inputs of its layers, and "
                f"llama.cpp records none for {architecture}; use a drafter that reads the text itself"
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
        context.rewind(0)  # what was read unrecorded is of no use
        context.recorders.append(self)

    @classmethod
    def of(cls, context: Context, architecture: str = "", layers: Sequence[int] = ()) -> Recorded:
        """Those of a context, which several drafters may hang on."""
        found = next((known for known in context.recorders if known.layers == tuple(layers)), None)
        return found or cls(context, architecture, layers)

    def take(self, first: int, n: int) -> None:
        """After n tokens were read from position `first` on."""
        self.n = min(self.n, first)
        for i, part in enumerate(self._parts):
            columns = slice(i * self._n_embd, (i + 1) * self._n_embd)
            self.rows[first : first + n, columns] = floats(part(), n, self._n_embd)
        self.n = first + n


class PairContext(Context):
    """One sequence of (token, state) pairs in one cache: what a head that hangs on its target reads.

    The pair at position P is the token at P + 1 of the text with the state of P: what `encode` makes of the target's
    recorded states there or, while drafting, what `decode` gave for the pair before. `model` is an EAGLE-3 head, and
    `other` its target's context; or it is the target itself, and its MTP block reads (`mtp`). Without `head` no logits
    are computed, whatever is asked.
    """

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        n_threads: int | None,
        other: Context | None = None,
        n_outputs: int = 1,
        mtp: bool = False,
        head: bool = True,
        cache: Cache = F16,
    ) -> None:
        self._extended = None
        self._library = _experimental()
        self._mtp, self._head = mtp, head
        super().__init__(model, n_ctx, n_threads, n_outputs=n_outputs, other=other, mtp=mtp, cache=cache)
        self._library["llama_set_embeddings_nextn"](self.handle, True, head)  # of all tokens, or of outputs only
        self._extended = llama_cpp.llama_batch_ext_init(self.handle)

    def encode(self, recorded: np.ndarray) -> np.ndarray:
        """The states (float32, n x n_embd) of what was recorded of a target (float32, n x its width)."""
        if self._mtp:
            return recorded
        found = np.empty((len(recorded), self.model.n_embd), np.float32)
        # Positions are not looked at, and must be those that come next all the same.
        for start in range(0, len(recorded), self.n_batch):
            part = np.ascontiguousarray(recorded[start : start + self.n_batch])
            self._process(llama_cpp.LLAMA_PROCESS_TYPE_ENCODE, self.count(), None, part, True)
            found[start : start + len(part)] = self._states(len(part))
        return found

    def pairs(self, tokens: Sequence[int], states: np.ndarray, outputs: bool) -> tuple[np.ndarray, np.ndarray]:
        """Append pairs. With `outputs`: (logits, states) after each of the last n_outputs of them at most, float32
        (n x n_vocab, a view) and (n x n_embd); the head is computed for every one, so mostly there is one.
        """
        logits, made = np.empty((0, self.model.n_vocab), np.float32), np.empty((0, self.model.n_embd), np.float32)
        size = self.n_outputs if outputs else self.n_batch
        for start in range(0, len(tokens), size):
            if not self.go_on():
                raise EngineError(f"{self.model.path}: was cancelled while it read {len(tokens)} tokens")
            part = np.ascontiguousarray(states[start : start + size], np.float32)
            n, ids = len(part), tokens[start : start + size]
            self._process(llama_cpp.LLAMA_PROCESS_TYPE_DECODE, self.n_past, ids, part, outputs and self._head)
            self.n_past += n
            if outputs:
                if self._head:
                    logits = floats(llama_cpp.llama_get_logits(self.handle), n, self.model.n_vocab)
                made = self._states(n).copy()
        return logits, made

    def _states(self, n: int) -> np.ndarray:
        return floats(self._library["llama_get_embeddings_nextn"](self.handle), n, self.model.n_embd)

    def _process(self, kind: int, first: int, tokens: Sequence[int] | None, states: np.ndarray, outputs: bool) -> None:
        batch = self._extended
        llama_cpp.llama_batch_ext_clear(batch)
        width = states.shape[1]
        for i, row in enumerate(states):  # whose memory llama.cpp copies at once
            state = llama_cpp.llama_embd(row.ctypes.data_as(_FLOATS), 1, width)
            if tokens is None:
                place = llama_cpp.llama_batch_ext_add_embd(batch, 0, state)
            else:
                place = llama_cpp.llama_batch_ext_add_token(batch, 0, int(tokens[i]))
                llama_cpp.llama_batch_ext_set_embd_token(batch, place, state)
            llama_cpp.llama_batch_ext_set_pos(batch, place, ctypes.byref(llama_cpp.llama_pos(first + i)))
            llama_cpp.llama_batch_ext_set_output_logits(batch, place, outputs)
        started = time.perf_counter()
        LAST_ERRORS.clear()
        with interruptible():
            code = llama_cpp.llama_process(self.handle, kind, batch)
            llama_cpp.llama_synchronize(self.handle)
        self.seconds += time.perf_counter() - started
        if code:
            raise EngineError(f"{self.model.path}: llama.cpp could not decode ({code}): {last_error()}")

    def close(self) -> None:
        if self._extended is not None:
            llama_cpp.llama_batch_ext_free(self._extended)
            self._extended = None
        super().close()
