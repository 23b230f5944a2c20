"""The server from its first moment: 503 and what is being done until the model is ready, then the application."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.responses import FileResponse, JSONResponse, Response

from .page import HEADERS, PAGE


class Door:
    """ASGI: answers for an application that is still to come. `open` hands it the application.

    Until then the page is served, which waits, and all else is a 503 in llama-server's form; `doing` says why.
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
            answer = FileResponse(PAGE, headers=HEADERS)
        else:
            error = {"code": 503, "message": "Loading model", "type": "unavailable_error", "doing": self._doing()}
            answer = JSONResponse({"error": error}, 503, headers={"Retry-After": "1"})
        await answer(scope, receive, send)
