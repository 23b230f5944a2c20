"""The server before its model is ready: 503, with what is being done; then the application."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse, Response

from .page import page_response


class Door:
    """ASGI: stands in for an application until `open` gives it.

    Until then it serves the page, which waits, and answers all else with a 503 as llama-server does; `doing` says why.
    """

    def __init__(self, doing: Callable[[], str]) -> None:
        self._doing = doing
        self._app: Any = None

    def open(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        await (self._app or self._wait)(scope, receive, send)

    async def _wait(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        answer: Response
        if scope["path"] == "/" and scope["method"] in ("GET", "HEAD"):
            answer = page_response()
        else:
            error = {"code": 503, "message": "Loading model", "type": "unavailable_error", "doing": self._doing()}
            answer = JSONResponse({"error": error}, 503, headers={"Retry-After": "1"})
        await answer(scope, receive, send)
