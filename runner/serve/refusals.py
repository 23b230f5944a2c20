"""Errors in OpenAI's form."""

from __future__ import annotations

import logging

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from llamabase.errors import FileFormatError, PromptTooLong, SettingError
from llamabase.llama.context import CacheFull

from .conversations import Unavailable
from .requests import BadRequest

ENDPOINT = {404: "there is no such endpoint", 405: "this endpoint takes another method"}
log = logging.getLogger("uvicorn.error")


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    kind: str = "invalid_request_error",
) -> JSONResponse:
    clean = message.encode("utf-8", "replace").decode()
    body = {"message": clean, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": body}, status, headers={"Retry-After": "1"} if status == 503 else None)


def failure(error: BaseException, path: str = "") -> JSONResponse:
    """What went wrong at an endpoint; what only the server's log should know stays there."""
    if isinstance(error, BadRequest):
        return error_response(error.status, str(error), error.param, error.code)
    if isinstance(error, HTTPException):  # the router's, whose headers say which methods there are
        response = error_response(error.status_code, ENDPOINT.get(error.status_code, error.detail))
        response.headers.update(error.headers or {})
        return response
    if isinstance(error, ClientDisconnect):
        return error_response(499, "the client went away while it sent")
    message = str(error).rpartition(".gguf: ")[2]  # a client learns no path
    if isinstance(error, Unavailable | CacheFull):
        return error_response(503, message, kind="server_error", code="unavailable")
    if isinstance(error, PromptTooLong):
        return error_response(400, message, "messages" if "chat" in path else "prompt", "context_length_exceeded")
    if isinstance(error, SettingError | FileFormatError):
        return error_response(400, message)
    log.error("a request failed", exc_info=error)
    return error_response(500, "the model could not go on; the server's log says why", kind="server_error")
