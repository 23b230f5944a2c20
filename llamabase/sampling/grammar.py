"""Grammars: llama.cpp's own grammar sampler, which says what may come next of a text that obeys a GBNF.

It runs in a process of its own (`worker`), since some grammars end it, or take time and memory without end.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from llamabase.errors import SettingError
from llamabase.llama.library import LAST_ERRORS, last_error
from llamabase.llama.model import Model

from .tokens import Tokens
from .worker import LIMITS, Worker, WorkerEnded, stderr_lines

ALL = None  # instead of ids: every token of the vocabulary
_WORKER = Worker()
_KEPT = 4  # vocabularies that the worker keeps open, each some ten megabytes


class Grammar:
    """A GBNF grammar and the place that a text has reached in it. The start symbol is `root`.

    Raises SettingError, with llama.cpp's reason, for one that does not parse, and if a step of it takes more than a
    bounded time or memory.
    """

    def __init__(self, model: Model, text: str) -> None:
        try:
            source = text.encode()
        except UnicodeEncodeError as error:  # bytes of an argument that were no UTF-8
            raise SettingError(f"the grammar cannot be used: it is not text in UTF-8: {error.reason}") from error
        if b"\0" in source:
            raise SettingError(r"the grammar cannot be used: llama.cpp would read it up to its NUL; write \x00")
        self._number = next(_NUMBERS)
        # The collector may come in the middle of a call, so the worker hears of it with the next grammar.
        weakref.finalize(self, _ENDED.append, self._number)
        self._n_vocab = model.n_vocab
        self._said: list[int] = []  # since the worker was last asked
        self._answer = np.empty(0, np.int64), np.empty(0, bool)  # ids (ascending) it was asked about, and what it said
        path, ended = str(model.path.resolve()), [_ENDED.popleft() for _ in range(len(_ENDED))]
        try:
            reason = self._call(_begin, path, source, ended)
        except KeyError:  # the worker is new, or has closed this vocabulary for others
            _WORKER.call(_open, path, bounded=False)
            reason = self._call(_begin, path, source, ended)
        if reason:
            raise SettingError(f"the grammar cannot be used: {reason}; correct it")

    def allowed(self, ids: np.ndarray) -> np.ndarray:
        """Which of these tokens (ascending) may come next (bool). An end may where the text is complete."""
        said, self._said = self._said, []
        asked = ALL if len(ids) == self._n_vocab else ids.astype(np.int32).tobytes()
        try:
            masked = np.frombuffer(self._call(_allowed, said, asked), bool)
        except KeyError as error:
            raise SettingError("the grammar was lost with another that ended llama.cpp; ask again") from error
        self._answer = ids, masked
        return masked

    def fitting(self, drafts: list[int]) -> int:
        """How many of the drafts are worth verifying: all, since llama.cpp's sampler cannot be taken back."""
        return len(drafts)

    def accept(self, token: int) -> None:
        """Go on by a token. Raises ValueError for one that is not allowed: llama.cpp would end the process on it."""
        ids, masked = self._answer
        place = int(np.searchsorted(ids, token))
        known = place < len(ids) and ids[place] == token
        if not (masked[place] if known else self.allowed(np.array([token]))[0]):
            raise ValueError(f"the grammar does not allow token {token} here")
        self._said.append(token)  # told with the next question
        self._answer = ids[:0], masked[:0]

    def _call(self, function: Any, *arguments: Any) -> Any:
        try:
            return _WORKER.call(function, self._number, *arguments)
        except WorkerEnded as error:
            raise SettingError(
                f"the grammar cannot be used: llama.cpp took over {LIMITS} for it, or ended; simplify it"
            ) from error


_NUMBERS = itertools.count()
_ENDED: deque[int] = deque()  # grammars that nobody has any more

# What the worker keeps: vocabularies by path, the last used last, and samplers by the number of their grammar.
_models: OrderedDict[str, Model] = OrderedDict()
_samplers: dict[int, Any] = {}


def _open(path: str) -> None:
    """In the worker: load a vocabulary."""
    if path not in _models:
        _models[path] = Model(Path(path), vocab_only=True)
    _models.move_to_end(path)
    if len(_models) > _KEPT and not _samplers:
        _models.popitem(last=False)[1].close()


def _begin(number: int, path: str, source: bytes, ended: list[int]) -> str:
    """In the worker: parse a grammar; what is wrong with it. Those that are `ended` are freed."""
    for other in ended:
        if other in _samplers:
            llama_cpp.llama_sampler_free(_samplers.pop(other)[1])
    vocab = _models[path].vocab
    if sampler := llama_cpp.llama_sampler_init_grammar(vocab, source, b"root"):
        _samplers[number] = _models[path], sampler
        return ""
    LAST_ERRORS.clear()
    with stderr_lines() as said:  # again, to hear why
        llama_cpp.llama_sampler_init_grammar(vocab, source, b"root")
    # llama.cpp prints `parse: error parsing grammar: REASON`, a blank line and the whole grammar.
    reason = said[0].partition("error parsing grammar: ")[2].strip() if said else ""
    return f"it takes over {LIMITS}" if reason == "std::bad_alloc" else reason or last_error()


def _allowed(number: int, said: list[int], ids: bytes | None) -> bytes:
    """In the worker: go on by the tokens that were said, and then whether each of these may come."""
    model, sampler = _samplers[number]
    for token in said:
        llama_cpp.llama_sampler_accept(sampler, token)
    asked = np.arange(model.n_vocab) if ids is ALL else np.frombuffer(ids, np.int32)
    tokens = Tokens.of(asked, np.zeros(len(asked)))
    tokens.apply(sampler)
    masked: np.ndarray = tokens.left["logit"] == 0
    return masked.tobytes()
