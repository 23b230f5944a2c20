"""The HTTP side: OpenAI's endpoints and those that both have, errors in OpenAI's form, metrics in Prometheus'."""

from __future__ import annotations

import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, MutableMapping, Sequence
from importlib.metadata import version
from typing import Any

import prometheus_client as prometheus
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from llamabase.errors import EngineError, FileFormatError, PromptTooLong, SettingError, TextError
from llamabase.llama.infill import infill_prompt

from .conversations import Unavailable
from .native import NativeForm, add_native
from .page import HEADERS, PAGE
from .requests import BadRequest, Chat, Completion, Detokenize, Native, Tokenize, read
from .responses import Answer, Asked, Piece
from .server import Body, Server

OPEN = {"/", "/health", "/v1/health"}  # without a key
ENDPOINT = {404: "there is no such endpoint", 405: "this endpoint takes another method"}
log = logging.getLogger("uvicorn.error")


class Guard:
    """ASGI: the API key, compared in constant time, and a bound on bodies."""

    def __init__(self, app: Any, key: str, most_bytes: int) -> None:
        self._app, self._key, self._most = app, key.encode(), most_bytes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._key and scope["path"] not in OPEN and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get(b"authorization", b"").strip().partition(b" ")
            given = given.strip() if scheme.lower() == b"bearer" else scheme  # HTTP's schemes know no case
            given = given or headers.get(b"x-api-key", b"")
            if not hmac.compare_digest(given, self._key):
                await _error(401, "the API key is missing or wrong", kind="authentication_error")(scope, receive, send)
                return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most:
            await _error(413, f"the body is larger than {self._most} bytes")(scope, receive, send)
            return
        read = 0

        async def bounded() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise BadRequest(f"the body is larger than {self._most} bytes", status=413)
            return message

        await self._app(scope, bounded, send)


def _error(status: int, message: str, param: str | None = None, code: str | None = None,
           kind: str = "invalid_request_error") -> JSONResponse:  # fmt: skip
    """OpenAI's form."""
    clean = message.encode("utf-8", "replace").decode()
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse(
        {"error": {"message": clean, "type": kind, "param": param, "code": code}}, status, headers=headers
    )


def _failure(error: BaseException) -> JSONResponse:
    """What went wrong while computing; what the server's log alone should know stays there."""
    if isinstance(error, BadRequest):
        return _error(error.status, str(error), error.param, error.code)
    if isinstance(error, Unavailable):
        return _error(503, str(error), kind="server_error", code="unavailable")
    if isinstance(error, HTTPException):  # of the router's, whose headers say which methods there are
        found = _error(error.status_code, ENDPOINT.get(error.status_code, error.detail))
        found.headers.update(error.headers or {})
        return found
    if isinstance(error, ClientDisconnect):
        return _error(499, "the client went away while it sent")
    if isinstance(error, SettingError | FileFormatError):
        return _error(400, str(error).rpartition(".gguf: ")[2])
    log.error("a request failed", exc_info=error)
    return _error(500, "the model could not go on; the server's log says why", kind="server_error")


def _usage(answers: list[Answer]) -> dict[str, Any]:
    prompt = len(answers[0].asked.prompt)
    said = sum(answer.record.tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": said,
        "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": answers[0].n_cached},
    }


class _Form:
    """How answers look: one of the two kinds of completions."""

    def __init__(self, server: Server, body: Chat | Completion) -> None:
        self.chat = isinstance(body, Chat)
        self._head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex[:24]}",
            "created": int(time.time()),
            "model": server.settings.alias,
            "system_fingerprint": f"gguf-trim-{version('llama-cpp-python')}",
        }
        draft = server.engine.drafter
        self._kind = "none" if draft is None else "auto" if body.draft_max is None else "fixed"
        self._logprobs = body.n_logprobs is not None

    def _object(self, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion" if self.chat else "text_completion") + (".chunk" if chunk and self.chat else "")
        return {**self._head, "object": kind, "choices": choices}

    def _seen(self, found: list[dict[str, Any]]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        if self.chat:
            return {"content": found, "refusal": None}
        return {
            "tokens": [each["token"] for each in found],
            "token_logprobs": [each["logprob"] for each in found],
            "top_logprobs": [{t["token"]: t["logprob"] for t in (*each["top_logprobs"], each)} for each in found],
        }

    def timings(self, answer: Answer) -> dict[str, Any]:
        return answer.timings | {"draft_kind": self._kind}

    def whole(self, answers: list[Answer], logprobs: list[list[dict[str, Any]]]) -> dict[str, Any]:
        choices = []
        for i, answer in enumerate(answers):
            choice = {"index": i, "finish_reason": answer.record.finish_reason, "logprobs": self._seen(logprobs[i])}
            if self.chat:
                message: dict[str, Any] = {"role": "assistant", "content": answer.record.text}
                if answer.tool_calls:
                    message |= {"content": answer.record.text or None, "tool_calls": answer.tool_calls}
                choice["message"] = message
            else:
                choice["text"] = answer.record.text
            choices.append(choice)
        last = answers[-1]
        return self._object(choices, False) | {"usage": _usage(answers), "timings": self.timings(last)}

    def begin(self, i: int) -> dict[str, Any]:
        return self._delta(i, {"role": "assistant", "content": ""})

    def calls(self, i: int, answer: Answer) -> dict[str, Any]:
        """The calls of an answer: OpenAI's client expects them before the chunk that says why it ended."""
        return self._delta(i, {"tool_calls": [{"index": n, **call} for n, call in enumerate(answer.tool_calls)]})

    def _delta(self, i: int, delta: dict[str, Any]) -> dict[str, Any]:
        return self._object([{"index": i, "delta": delta, "finish_reason": None, "logprobs": None}], True)

    def chunk(self, i: int, piece: Piece) -> dict[str, Any]:
        said = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
        choice = {"index": i, **said, "finish_reason": None, "logprobs": self._seen(piece.logprobs)}
        return self._object([choice], True) | {"drafted": piece.drafted}

    def end(self, i: int, answer: Answer) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        choice = {"index": i, **said, "finish_reason": answer.record.finish_reason, "logprobs": self._seen(answer.left)}
        return self._object([choice], True) | {"timings": self.timings(answer)}

    def usage(self, answers: list[Answer]) -> dict[str, Any]:
        return self._object([], True) | {"usage": _usage(answers)}


async def _answer(server: Server, request: Request, body: Body, asked: Sequence[Asked]) -> Response:
    form: Any = NativeForm(server, body) if isinstance(body, Native) else _Form(server, body)
    events = server.compute(request, asked)
    if not body.stream:
        answers: dict[int, Answer] = {}
        logprobs: list[list[dict[str, Any]]] = [[] for _ in asked]
        async for i, answer, piece in events:
            answers[i] = answer
            logprobs[i] += answer.left if piece is None else piece.logprobs
        if len(answers) < len(asked):
            return Response(status_code=499)  # nobody waits for it
        return _json(form.whole([answers[i] for i in range(len(asked))], logprobs))
    first = await anext(events, None)  # what is wrong with a request shows before anything is sent

    async def stream() -> AsyncIterator[bytes]:
        ended: dict[int, Answer] = {}
        begun: set[int] = set()
        event = first
        try:
            while event is not None:
                i, answer, piece = event
                if form.chat and i not in begun:
                    begun.add(i)
                    yield _event(_dumped(form.begin(i)))
                if piece is None:
                    ended[i] = answer
                    if answer.tool_calls:
                        yield _event(_dumped(form.calls(i, answer)))
                    yield _event(_dumped(form.end(i, answer)))
                else:
                    yield _event(_dumped(form.chunk(i, piece)))
                event = await anext(events, None)
        except Exception as error:
            yield _event(bytes(_failure(error).body))
        if not isinstance(form, NativeForm):
            if body.stream_options is not None and body.stream_options.include_usage and ended:
                yield _event(_dumped(form.usage([ended[i] for i in sorted(ended)])))
            yield _event(b"[DONE]")
        await events.aclose()  # type: ignore[attr-defined]

    return EventSourceResponse(stream())


def _event(data: bytes) -> bytes:
    """As a server sends it. sse-starlette makes one of text too, at the cost of the rest of a token's way."""
    return b"data: " + data + b"\n\n"


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()  # what is no UTF-8 is escaped


def _json(value: Any) -> Response:
    return Response(_dumped(value), media_type="application/json")


def make_app(server: Server) -> FastAPI:
    """The application; whoever runs it closes the server's conversations."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    engine, settings = server.engine, server.settings

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, PromptTooLong):
            param = "messages" if "chat" in request.url.path else "prompt"
            error = BadRequest(str(error).rpartition(".gguf: ")[2], param, "context_length_exceeded")
        return _failure(error)

    for kind in (BadRequest, Unavailable, HTTPException, ClientDisconnect, EngineError, FileFormatError):
        app.add_exception_handler(kind, failed)

    @app.post("/v1/chat/completions")
    @app.post("/chat/completions")
    async def chat(request: Request) -> Response:
        body: Chat = read(Chat, await request.body())
        try:
            prompt = await run_in_threadpool(engine.prompt, **server.conversation(body))
        except TextError:
            raise
        except SettingError as error:
            raise BadRequest(str(error), "chat_template_kwargs") from error
        tools = body.callable_tools
        compiles = body.has_schema or (tools is not None and bool(tools.forced or tools.strict))
        asked = await server.settle(compiles, lambda: server.asked(body, prompt, tools))
        return await _answer(server, request, body, asked)

    @app.post("/v1/completions")
    async def completion(request: Request) -> Response:
        body: Completion = read(Completion, await request.body())
        if body.suffix:
            if not isinstance(body.prompt, str):
                raise BadRequest("prompt: is one text where a suffix follows", "prompt")
            ids = await run_in_threadpool(infill_prompt, engine.model, body.prompt, body.suffix)
        else:
            ids, *others = await run_in_threadpool(server.prompts, body.prompt)
            if others:
                raise BadRequest("prompt: one at a time", "prompt")
        asked = await server.settle(body.has_schema, lambda: server.asked(body, ids))
        return await _answer(server, request, body, asked)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body: Tokenize = read(Tokenize, await request.body())

        def tokens() -> list[Any]:
            ids = server.mixed(body.content, "content", body.parse_special, body.add_special)
            if not body.with_pieces:
                return ids
            return [{"id": i, "piece": _shown(piece)} for i, piece in zip(ids, server.pieces(ids), strict=True)]

        return await run_in_threadpool(lambda: _json({"tokens": tokens()}))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body: Detokenize = read(Detokenize, await request.body())

        def text() -> str:
            return b"".join(server.pieces(server.known(body.tokens, "tokens"))).decode("utf-8", "replace")

        return await run_in_threadpool(lambda: _json({"content": text()}))

    def entry() -> dict[str, Any]:
        model = engine.model
        meta = {"n_vocab": model.n_vocab, "n_ctx_train": model.n_ctx_train, "n_embd": model.n_embd}
        head = {"id": settings.alias, "object": "model", "created": server.started, "owned_by": "gguf-trim"}
        return head | {"meta": meta}

    @app.get("/v1/models")
    @app.get("/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [entry()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != settings.alias:
            return _error(404, f"there is no model {name[:100]}; there is {settings.alias}", "model", "model_not_found")
        return _json(entry())

    @app.api_route("/health", methods=["GET", "HEAD"])
    @app.api_route("/v1/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        return _json({"status": "ok"})

    add_native(app, server, _answer)

    @app.get("/metrics")
    async def metrics() -> Response:
        if not settings.metrics:
            return _error(501, "start the server with --metrics", kind="not_supported_error")
        return Response(prometheus.generate_latest(server.metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    @app.api_route("/", methods=["GET", "HEAD"])
    async def page() -> Response:
        return FileResponse(PAGE, headers=HEADERS)

    app.add_middleware(Guard, key=settings.api_key, most_bytes=settings.most_bytes)
    if settings.cors:  # the outermost, so that a page can read what the guard says
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors), allow_methods=["*"], allow_headers=["*"]
        )  # fmt: skip
    return app


def _shown(piece: bytes) -> str | list[int]:
    """As llama-server gives a piece: text, or bytes where it is none."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
