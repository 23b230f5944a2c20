"""Grammars in GBNF: llama.cpp's own grammar sampler says which tokens may come next.

It runs in a process of its own (`worker`), because some grammars crash it, or take time and memory without end.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from llamabase.errors import SettingError
from llamabase.llama.library import LAST_ERRORS, last_error
from llamabase.llama.model import Model

from .tokens import Tokens
from .worker import LIMITS, Worker, WorkerEnded

_WORKER = Worker(__name__)
_VOCABULARIES = 4  # most vocabularies that the worker keeps open, each some ten megabytes
_REASON = 4096  # most bytes read of llama.cpp's reason against a grammar


class Grammar:
    """A GBNF grammar with the start symbol `root`, and the place that a text has reached in it.

    Raises SettingError, with llama.cpp's reason, for a grammar that does not parse, and if a step exceeds the worker's
    limits.
    """

    def __init__(self, model: Model, text: str) -> None:
        try:
            source = text.encode()
        except UnicodeEncodeError as error:  # an argument's bytes were not UTF-8
            raise SettingError(f"the grammar cannot be used: it is not text in UTF-8: {error.reason}") from error
        if b"\0" in source:
            raise SettingError(r"the grammar cannot be used: llama.cpp would read it up to its NUL; write \x00")
        self._number = next(_NUMBERS)
        # A collection may come in the middle of a call, so the worker is told with the next grammar.
        weakref.finalize(self, _ENDED.append, self._number)
        self._n_vocab = model.n_vocab
        self._accepted: list[int] = []  # tokens that the worker has not been told yet
        self._answer = np.empty(0, np.int64), np.empty(0, bool)  # the ids (ascending) last asked about, and the answer
        path, ended = str(model.path.resolve()), [_ENDED.popleft() for _ in range(len(_ENDED))]
        try:
            reason = self._call(_begin, path, source, ended)
        except KeyError:  # the worker is new, or has closed this vocabulary for others
            _WORKER.call(_open, path, bounded=False)
            reason = self._call(_begin, path, source, ended)
        if reason:
            raise SettingError(f"the grammar cannot be used: {reason}; correct it")

    def allowed(self, ids: np.ndarray) -> np.ndarray:
        """Which of these tokens (ascending) may come next (bool). An end token may if the text is complete."""
        accepted, self._accepted = self._accepted, []
        asked = None if len(ids) == self._n_vocab else ids.astype(np.int32).tobytes()
        try:
            allowed = np.frombuffer(self._call(_allowed, accepted, asked), bool)
        except KeyError as error:
            raise SettingError("the grammar was lost with another that ended llama.cpp; ask again") from error
        self._answer = ids, allowed
        return allowed

    def fitting(self, drafts: list[int]) -> int:
        """How many of the drafts are worth verifying: all, because llama.cpp's sampler cannot go back."""
        return len(drafts)

    def accept(self, token: int) -> None:
        """Go on by a token. Raises ValueError for one that is not allowed: llama.cpp would end the process on it."""
        ids, allowed = self._answer
        place = int(np.searchsorted(ids, token))
        known = place < len(ids) and ids[place] == token
        if not (allowed[place] if known else self.allowed(np.array([token]))[0]):
            raise ValueError(f"the grammar does not allow token {token} here")
        self._accepted.append(token)
        self._answer = ids[:0], allowed[:0]

    def _call(self, function: Any, *arguments: Any) -> Any:
        try:
            return _WORKER.call(function, self._number, *arguments)
        except WorkerEnded as error:
            raise SettingError(
                f"the grammar cannot be used: llama.cpp took over {LIMITS} for it, or ended; simplify it"
            ) from error


_NUMBERS = itertools.count()
_ENDED: deque[int] = deque()  # numbers of collected grammars that the worker still holds

# What the worker keeps.
_models: dict[str, Model] = {}  # vocabularies by path, the newest last
_samplers: dict[int, tuple[Model, Any]] = {}  # by the number of their grammar


def _open(path: str) -> None:
    """In the worker: load a vocabulary. The oldest one goes, and is closed with the last grammar that uses it."""
    _models[path] = Model(Path(path), vocab_only=True)
    if len(_models) > _VOCABULARIES:
        del _models[next(iter(_models))]


def _begin(number: int, path: str, source: bytes, ended: list[int]) -> str:
    """In the worker: free the samplers of ended grammars and parse this one; the reason if it does not parse, or ""."""
    for other in _samplers.keys() & ended:
        llama_cpp.llama_sampler_free(_samplers.pop(other)[1])
    model = _models[path]
    if sampler := llama_cpp.llama_sampler_init_grammar(model.vocab, source, b"root"):
        _samplers[number] = model, sampler
        return ""
    LAST_ERRORS.clear()
    reason = _printed_reason(model, source)
    return f"it takes over {LIMITS}" if reason == "std::bad_alloc" else reason or last_error()


def _printed_reason(model: Model, source: bytes) -> str:
    """What llama.cpp prints to stderr, which is free in the worker, if it parses the grammar again."""
    kept, (reading, writing) = os.dup(2), os.pipe()
    with contextlib.suppress(AttributeError):  # Windows has it since Python 3.12
        os.set_blocking(writing, False)  # the end of a long grammar is lost
    os.dup2(writing, 2)
    llama_cpp.llama_sampler_init_grammar(model.vocab, source, b"root")
    os.dup2(kept, 2)
    os.close(writing)
    # `parse: error parsing grammar: REASON`, a blank line and the whole grammar.
    first = os.read(reading, _REASON).decode("utf-8", "replace").partition("\n")[0]
    os.close(reading)
    os.close(kept)
    return first.partition("error parsing grammar: ")[2].strip()


def _allowed(number: int, accepted: list[int], ids: bytes | None) -> bytes:
    """In the worker: go on by the accepted tokens; then which of these ids may come, None for the whole vocabulary."""
    model, sampler = _samplers[number]
    for token in accepted:
        llama_cpp.llama_sampler_accept(sampler, token)
    asked = np.arange(model.n_vocab) if ids is None else np.frombuffer(ids, np.int32)
    tokens = Tokens.of(asked, np.zeros(len(asked)))
    tokens.apply(sampler)
    allowed: np.ndarray = tokens.left["logit"] == 0
    return allowed.tobytes()
