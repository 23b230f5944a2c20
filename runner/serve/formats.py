"""Answers on their way to a client: whole or as a stream of events, in a format; OpenAI's formats."""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from importlib.metadata import version
from typing import Any, Protocol

from sse_starlette import EventSourceResponse
from starlette.requests import Request
from starlette.responses import Response

from llamabase.llama.template import ALPHABET, LETTERS_OF_ID

from .refusals import failure
from .requests import Chat, Completion
from .responses import Answer, Asked, TokenLogprob
from .server import Event, Server

Json = dict[str, Any]


class Format(Protocol):
    """How answers look to a client."""

    def whole(self, answers: Sequence[Answer]) -> Any:
        """All answers as one body."""

    def events(self, event: Event) -> Iterator[Json]:
        """Bodies of the events of a stream."""

    def ending(self, answers: Sequence[Answer]) -> Iterator[bytes]:
        """Data of the events that end a stream, after these answers."""


async def send(server: Server, request: Request, form: Format, stream: bool, asked: Sequence[Asked]) -> Response:
    """Compute what is asked, and answer with it."""
    events = server.compute(request, asked)
    if not stream:
        answers = [event.answer async for event in events if event.piece is None]
        if len(answers) < len(asked):
            return Response(status_code=499)  # its client went away
        return json_response(form.whole(answers))
    first = await anext(events, None)  # what is wrong with a request shows before anything is sent

    async def streamed() -> AsyncIterator[bytes]:
        ended, event = list[Answer](), first
        try:
            while event is not None:
                for body in form.events(event):
                    yield _event(_dumped(body))
                if event.piece is None:
                    ended.append(event.answer)
                event = await anext(events, None)
        except Exception as error:
            yield _event(bytes(failure(error).body))
        for data in form.ending(ended):
            yield _event(data)
        await events.aclose()

    return EventSourceResponse(streamed())


def _event(data: bytes) -> bytes:
    """An event as a server sends it; sse-starlette, given text, takes as long again."""
    return b"data: " + data + b"\n\n"


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()  # what is not UTF-8 is escaped


def json_response(value: Any) -> Response:
    return Response(_dumped(value), media_type="application/json")


class OpenAIFormat:
    """One of the two kinds of completions, with the figures that llama-server adds."""

    def __init__(self, server: Server, body: Chat | Completion) -> None:
        self._chat, self._begun = isinstance(body, Chat), set[int]()
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex[:24]}",
            "created": int(time.time()),
            "model": server.settings.alias,
            "system_fingerprint": f"gguf-trim-{version('llama-cpp-python')}",
        }
        self._whole, self._chunk = (
            ("chat.completion", "chat.completion.chunk") if self._chat else ("text_completion",) * 2
        )
        kind = "none" if server.engine.drafter is None else "auto" if body.draft_max is None else "fixed"
        self._drafting = {"draft_kind": kind}
        self._has_logprobs = body.n_logprobs is not None
        self._has_usage = body.stream_options.include_usage

    def whole(self, answers: Sequence[Answer]) -> Json:
        choices = []
        for i, answer in enumerate(answers):
            text, calls = answer.record.text, [_call(call.name, call.arguments) for call in answer.calls]
            message: Json = {"role": "assistant", "content": text}
            if calls:
                message |= {"content": text or None, "tool_calls": calls}
            content: Json = {"message": message} if self._chat else {"text": text}
            choices.append(self._choice(i, content, answer.logprobs, answer.record.finish_reason))
        figures = {"usage": _usage(answers), "timings": answers[-1].timings | self._drafting}
        return {**self._head, "object": self._whole, "choices": choices, **figures}

    def events(self, event: Event) -> Iterator[Json]:
        i, answer, piece = event.index, event.answer, event.piece
        if self._chat and i not in self._begun:
            self._begun.add(i)
            yield self._part(i, {"role": "assistant", "content": ""})
        if piece is not None:
            content = {"content": piece.text} if self._chat else piece.text
            yield self._part(i, content, piece.logprobs) | {"drafted": piece.drafted}
            return
        if answer.calls:  # OpenAI's client expects them before the chunk that says why the answer ended
            calls = [{"index": n, **_call(call.name, call.arguments)} for n, call in enumerate(answer.calls)]
            yield self._part(i, {"tool_calls": calls})
        last = self._part(i, {} if self._chat else "", answer.last_logprobs, answer.record.finish_reason)
        yield last | {"timings": answer.timings | self._drafting}

    def ending(self, answers: Sequence[Answer]) -> Iterator[bytes]:
        if self._has_usage and answers:
            yield _dumped({**self._head, "object": self._chunk, "choices": [], "usage": _usage(answers)})
        yield b"[DONE]"

    def _part(
        self, i: int, content: Any, logprobs: list[TokenLogprob] | None = None, reason: str | None = None
    ) -> Json:
        """A chunk of the i-th answer."""
        choice = self._choice(i, {"delta" if self._chat else "text": content}, logprobs, reason)
        return {**self._head, "object": self._chunk, "choices": [choice]}

    def _choice(self, i: int, content: Json, logprobs: list[TokenLogprob] | None, reason: str | None) -> Json:
        return {"index": i, **content, "finish_reason": reason, "logprobs": self._logprobs(logprobs)}

    def _logprobs(self, given: list[TokenLogprob] | None) -> Json | None:
        if given is None or not self._has_logprobs:
            return None
        if self._chat:
            return {"content": given, "refusal": None}
        return {
            "tokens": [each["token"] for each in given],
            "token_logprobs": [each["logprob"] for each in given],
            "top_logprobs": [{t["token"]: t["logprob"] for t in (*each["top_logprobs"], each)} for each in given],
        }


def _usage(answers: Sequence[Answer]) -> Json:
    prompt, n = len(answers[0].asked.prompt), sum(answer.record.tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": n,
        "total_tokens": prompt + n,
        "prompt_tokens_details": {"cached_tokens": answers[0].n_cached},
    }


def _call(name: str, arguments: str) -> Json:
    """A call as OpenAI's clients expect it, with an id that every template takes."""
    id_ = "".join(secrets.choice(ALPHABET) for _ in range(LETTERS_OF_ID))
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
