"""SpeculativeLM: a target and its drafter as one Python object.

from runner import SpeculativeLM

with SpeculativeLM("target.gguf", "trimmed.gguf") as lm:
    for chunk in lm.stream("Why is the sky blue?", temperature=0.7):
        print(chunk, end="", flush=True)
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf_trim.format.mtp import drafter_source
from gguf_trim.pairs.prepare import DEFAULT_MODEL, prepare
from llamabase.errors import EngineError, SettingError
from llamabase.llama.context import Cache as Cache
from llamabase.llama.library import Closing
from llamabase.sampling.guidance import schema_guide
from llamabase.sampling.settings import Sampling, samplers_named
from runner.draft.contracts import AUTO
from runner.loop.engine import Engine
from runner.loop.record import Record
from runner.loop.weights import LoadOptions

Messages = str | Sequence[Mapping[str, Any]]


def _whole(name: str, value: Any) -> int:
    """A whole number, which may be written as 40, 40.0 or numpy's. Raises SettingError, which names the setting."""
    try:
        if (number := int(value)) == value:
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise SettingError(f"{name}={value!r} is not a whole number")


def _plain(name: str, value: Any, default: Any) -> Any:
    """A setting converted to its default's type, which llama.cpp asks for. Raises SettingError."""
    if isinstance(default, int):
        return _whole(name, value)
    if isinstance(default, float):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise SettingError(f"{name}={value!r} is not a number") from None
    if isinstance(default, tuple):
        return tuple(value) if not isinstance(value, str) else samplers_named(value) if name == "samplers" else (value,)
    if name == "logit_bias":
        return {_whole("a token of logit_bias", _number(token)): float(bias) for token, bias in value.items()}
    return value


def _number(token: Any) -> Any:
    """A token's id. OpenAI's clients give it as text."""
    return int(token) if isinstance(token, str) and token.isascii() and token.isdigit() else token


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    """Keyword settings as Sampling: its fields, but temperature for temp and json_schema for guide.

    None stands for the default, as in OpenAI's library.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    if (schema := settings.pop("json_schema", None)) is not None:
        settings["guide"] = schema_guide(schema if isinstance(schema, str) else json.dumps(schema))
    fields = dataclasses.fields(Sampling)
    known = {"temperature" if field.name == "temp" else field.name: field.name for field in fields}
    for name in settings:
        if name not in known:
            others = ("json_schema", "max_tokens", "stop", "seed", "draft_max")
            raise TypeError(f"there is no setting {name!r}; there are {', '.join([*known, *others])}")
    defaults = Sampling()
    return Sampling(**{
        known[name]: _plain(name, value, getattr(defaults, known[name])) for name, value in settings.items()
    })  # fmt: skip


class _Answer:
    """One generation: the pieces of its text, the stream that hands them out, and whether it was cancelled."""

    def __init__(self, pieces: Generator[str, None, None]) -> None:
        self.pieces = pieces
        self.cancelled = False
        self.stream: Callable[[], Generator[str, None, None] | None] = lambda: None

    @property
    def live(self) -> bool:
        """Whether its stream may be read on. The stream itself knows, so no interruption can make this wrong."""
        stream = self.stream()
        return stream is not None and inspect.getgeneratorstate(stream) != inspect.GEN_CLOSED

    @property
    def running(self) -> bool:
        return inspect.getgeneratorstate(self.pieces) == inspect.GEN_RUNNING


class SpeculativeLM(Closing):
    """A target GGUF and, if `draft` is given, a drafter of the same vocabulary, trimmed or not.

    The text is the target's own, with a drafter or without. `draft` "mtp" is the target's own MTP block. The options,
    n_ctx to n_gpu_layers_draft, are those of `runner.loop.weights.LoadOptions`, such as cache=Cache("q8_0", "q8_0").
    Raises EngineError or FileFormatError if a file does not load, VocabularyMismatch for a wrong pair, TypeError for an
    unknown option.

    Threads: any thread may use it, one generation at a time. A generation runs from the first chunk of a stream to its
    end, its close() or its collection; starting another meanwhile raises EngineError (it does not wait: the stream may
    be the caller's own). cancel() and close() may be called from any thread and from a signal handler.
    """

    __signature__ = inspect.signature(LoadOptions)

    def __init__(self, target: str | Path, draft: str | Path | None = None, *more: Any, **options: Any) -> None:
        source = None if draft is None else drafter_source(draft)
        loading = LoadOptions(Path(target), source, *more, **options)
        self._closed = False
        self._current: _Answer | None = None
        # Held while llama.cpp computes. It is reentrant, since a signal handler or the garbage collector may come in.
        self._lock = threading.RLock()
        self._engine = Engine(loading)

    @classmethod
    def from_pair(cls, name: str = DEFAULT_MODEL, **settings: Any) -> SpeculativeLM:
        """A pair of the catalog (`python -m gguf_trim models`), fetched, trimmed and verified unless that is done.

        `settings` are the constructor's. Raises what `gguf_trim.pairs.prepare.prepare` raises.
        """
        prepared = prepare(name)
        by_hand = settings.get("vocab", AUTO) != AUTO
        return cls(prepared.target, str(prepared.trimmed if by_hand else prepared.quickest), **settings)

    def stream(
        self,
        messages: Messages,
        *,
        max_tokens: int | None = 1024,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        draft_max: int | str | None = None,
        template: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        record: Record | None = None,
        **sampling: Any,
    ) -> Generator[str, None, None]:
        """The answer chunk by chunk, each whole in UTF-8. Nothing is computed before the first is asked for.

        messages: a list of {"role": ..., "content": ...}, or a string, which is a user's message. They go through the
        model's chat template. With template=False a string goes to the model as it is (`<|im_end|>` and its like are
        read as tokens). If the last message is the assistant's, the answer continues it. tools: functions in OpenAI's
        form, for the template. chat_template_kwargs: further names for the template, such as {"enable_thinking":
        False}. max_tokens: None for as many as the context holds. stop: the text ends before the first of these
        strings. seed: the same seed gives the same text; -1 or None draws one. draft_max: tokens to draft in a round; 0
        for plain decoding, None or "auto" for as many as pay. record: filled as the answer goes; its tokens are the
        target's, those of the stop string included. sampling: temperature (0 is greedy) and the other fields of
        `Sampling` under their own names; json_schema: a dict or its text, instead of a grammar. None stands for a
        setting's default, and numbers may be numpy's.

        A stream that is closed, dropped or interrupted (Ctrl-C) leaves the object usable. Raises TypeError for unknown
        settings, ValueError for impossible ones, FileFormatError for a schema that cannot be obeyed, and EngineError if
        it is closed or busy, or if the context is too small.
        """
        chosen = _sampling(sampling)
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        limit = sys.maxsize if max_tokens is None else _whole("max_tokens", max_tokens)
        if limit < 1 or "" in stops:
            raise ValueError(f"max_tokens={max_tokens}, stop={stops}: at least one token, and no empty stop string")
        if not template and not isinstance(messages, str):
            raise TypeError("without the template the prompt is a string, not messages")
        self._require_open()
        seed = None if seed is None or _whole("seed", seed) < 0 else _whole("seed", seed)
        settings: dict[str, Any] = {"max_tokens": limit, "seed": seed, "stops": stops}
        if draft_max not in (None, "auto"):
            settings["draft_max"] = _whole("draft_max", draft_max)
        record = Record() if record is None else record
        how = {"tools": None if tools is None else [dict(tool) for tool in tools], "variables": chat_template_kwargs}
        answer = _Answer(self._pieces(messages, how if template else None, chosen, record, settings))
        stream = self._run(answer)
        answer.stream = weakref.ref(stream)
        return stream

    def chat(self, messages: Messages, **settings: Any) -> Record:
        """The whole answer: its text and its figures. `settings` are those of `stream`."""
        record = Record()
        for _ in self.stream(messages, record=record, **settings):
            pass
        return record

    def complete(self, prompt: str, **settings: Any) -> Record:
        """Continue a text as it is, without the chat template; otherwise like `chat`."""
        return self.chat(prompt, template=False, **settings)

    def cancel(self) -> None:
        """End the generation that runs, if any: its stream stops after the round that is being computed.

        Returns when nothing computes any more, or at once if the computing thread itself calls it (a signal handler).
        """
        if (answer := self._current) is not None:
            answer.cancelled = True
            self._release(answer)

    def close(self) -> None:
        """Cancel what runs and free the models; every later call raises EngineError. Closing twice does no harm."""
        self._closed = True
        self.cancel()
        with self._lock:
            if not self._busy:  # else the generation frees them when it ends
                self._engine.close()

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError(f"{self._engine.model.path}: used after it was closed")

    def _prompt(self, messages: Messages, how: dict[str, Any] | None) -> list[int]:
        if how is not None or not isinstance(messages, str):
            said = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
            return self._engine.prompt([dict(message) for message in said], **(how or {}))
        model = self._engine.model
        return model.tokenize(messages, n_ctx=self._engine.context.n_ctx) or ([] if model.bos is None else [model.bos])

    def _pieces(
        self,
        messages: Messages,
        how: dict[str, Any] | None,
        sampling: Sampling,
        record: Record,
        settings: dict[str, Any],
    ) -> Generator[str, None, None]:
        prompt = self._prompt(messages, how)
        with contextlib.closing(self._engine.pieces(prompt, sampling, record, **settings)) as pieces:
            for piece in pieces:
                yield piece.text

    def _run(self, answer: _Answer) -> Generator[str, None, None]:
        """The pieces of an answer. Each is computed under the lock; between them others may cancel or close."""
        try:
            self._claim(answer)
            while not answer.cancelled:
                with self._lock:
                    try:
                        ended = answer.cancelled or self._closed
                        piece = None if ended else next(answer.pieces, None)
                    except EngineError:
                        if not answer.cancelled:
                            raise
                        return
                if piece is None:
                    return
                yield piece
        finally:
            self._release(answer)

    @property
    def _busy(self) -> bool:
        return (answer := self._current) is not None and answer.live

    def _claim(self, answer: _Answer) -> None:
        if not self._busy:  # also asked before the lock, so as not to wait for another's round
            with self._lock:
                self._require_open()
                if not self._busy:
                    if self._current is not None:
                        self._release(self._current)
                    self._engine.set_cancel_check(lambda: not answer.cancelled)
                    self._current = answer
        if self._current is not answer:
            raise EngineError(
                f"{self._engine.model.path}: is busy with another answer; read that to its end, close its stream or "
                "cancel() it first"
            )

    def _release(self, answer: _Answer) -> None:
        """End an answer once, from any thread. One that this very thread computes ends itself a little later."""
        with self._lock:
            if self._current is not answer or answer.running:
                return
            try:
                answer.pieces.close()
            finally:
                self._current = None
                if self._closed:
                    self._engine.close()
