"""The HTTP side: OpenAI's endpoints and those that both APIs have, metrics in Prometheus' form, and the page."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import MutableMapping
from typing import Annotated, Any

import prometheus_client as prometheus
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from llamabase.errors import EngineError, FileFormatError, SettingError, TextError

from .conversations import Unavailable
from .formats import Json, OpenAIFormat, json_response, send
from .infill import infill_prompt
from .native import add_native
from .page import page_response
from .refusals import error_response, failure
from .requests import BadRequest, Chat, Completion, Detokenize, Tokenize, body_of
from .server import Server

OPEN = {"/", "/health", "/v1/health"}  # need no API key


class Guard:
    """ASGI: the API key, compared in constant time, a bound on bodies, and an answer to whom the end cuts off."""

    def __init__(self, app: Any, key: str, most_bytes: int) -> None:
        self._app, self._key, self._most = app, key.encode(), most_bytes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._key and scope["path"] not in OPEN and scope["method"] != "OPTIONS":
            scheme, _, key = headers.get(b"authorization", b"").strip().partition(b" ")
            key = key.strip() if scheme.lower() == b"bearer" else scheme  # HTTP's schemes know no case
            if not hmac.compare_digest(key or headers.get(b"x-api-key", b""), self._key):
                refusal = error_response(401, "the API key is missing or wrong", kind="authentication_error")
                await refusal(scope, receive, send)
                return
        length, too_large = headers.get(b"content-length", b"0"), f"the body is larger than {self._most} bytes"
        if length.isdigit() and int(length) > self._most:
            await error_response(413, too_large)(scope, receive, send)
            return
        n_read, answered = 0, False

        async def bounded() -> Any:
            nonlocal n_read
            message = await receive()
            n_read += len(message.get("body", b""))
            if n_read > self._most:
                raise BadRequest(too_large, status=413)
            return message

        async def seen(message: MutableMapping[str, Any]) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, bounded, seen)
        except asyncio.CancelledError:  # the server ends before this client has sent its request, or read its answer
            if not answered:
                await failure(Unavailable("the server ends"))(scope, receive, send)


def make_app(server: Server) -> FastAPI:
    """The application; whoever runs it closes the server's conversations."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    engine, settings = server.engine, server.settings

    async def failed(request: Request, error: Exception) -> Response:
        return failure(error, request.url.path)

    for kind in (Exception, BadRequest, Unavailable, HTTPException, ClientDisconnect, EngineError, FileFormatError):
        app.add_exception_handler(kind, failed)

    @app.post("/v1/chat/completions")
    @app.post("/chat/completions")
    async def chat(request: Request, body: Annotated[Chat, body_of(Chat)]) -> Response:
        try:
            prompt = await run_in_threadpool(server.rendered, body, engine.prompt)
        except TextError:
            raise
        except SettingError as error:
            raise BadRequest(str(error), "chat_template_kwargs") from error
        asked = await server.asked(body, [prompt], body.callable_tools)
        return await send(server, request, OpenAIFormat(server, body), body.stream, asked)

    @app.post("/v1/completions")
    async def completion(request: Request, body: Annotated[Completion, body_of(Completion)]) -> Response:
        if not body.suffix:
            prompts = await run_in_threadpool(server.prompts, body.prompt)
        elif isinstance(body.prompt, str):
            prompts = [await run_in_threadpool(infill_prompt, engine.model, body.prompt, body.suffix)]
        else:
            raise BadRequest("prompt: must be one text if a suffix is given", "prompt")
        if len(prompts) > 1:
            raise BadRequest("prompt: one at a time", "prompt")
        asked = await server.asked(body, prompts)
        return await send(server, request, OpenAIFormat(server, body), body.stream, asked)

    @app.post("/tokenize")
    def tokenize(body: Annotated[Tokenize, body_of(Tokenize)]) -> Response:
        ids = server.mixed(body.content, "content", body.parse_special, body.add_special)
        if not body.with_pieces:
            return json_response({"tokens": ids})
        pieces = zip(ids, map(_shown, server.pieces(ids)), strict=True)
        return json_response({"tokens": [{"id": i, "piece": piece} for i, piece in pieces]})

    @app.post("/detokenize")
    def detokenize(body: Annotated[Detokenize, body_of(Detokenize)]) -> Response:
        text = b"".join(server.pieces(server.known(body.tokens, "tokens")))
        return json_response({"content": text.decode("utf-8", "replace")})

    def entry() -> Json:
        model = engine.model
        meta = {"n_vocab": model.n_vocab, "n_ctx_train": model.n_ctx_train, "n_embd": model.n_embd}
        head = {"id": settings.alias, "object": "model", "created": server.started, "owned_by": "gguf-trim"}
        return head | {"meta": meta}

    @app.get("/v1/models")
    @app.get("/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [entry()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name == settings.alias:
            return json_response(entry())
        message = f"there is no model {name[:100]}; the only one is {settings.alias}"
        return error_response(404, message, "model", "model_not_found")

    @app.api_route("/health", methods=["GET", "HEAD"])
    @app.api_route("/v1/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        if not settings.metrics:
            return error_response(501, "start the server with --metrics", kind="not_supported_error")
        return Response(prometheus.generate_latest(server.metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    @app.api_route("/", methods=["GET", "HEAD"])
    async def page() -> Response:
        return page_response()

    add_native(app, server)
    app.add_middleware(Guard, key=settings.api_key, most_bytes=settings.most_bytes)
    if settings.cors:  # the outermost, so that a page can read what the guard says
        cors: Json = {"allow_origins": list(settings.cors), "allow_methods": ["*"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, **cors)
    return app


def _shown(piece: bytes) -> str | list[int]:
    """A piece as llama-server gives it: text, or bytes if it is not UTF-8."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
