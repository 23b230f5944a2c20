"""The page, and how it is served."""

from __future__ import annotations

from pathlib import Path

from starlette.responses import FileResponse

PAGE = Path(__file__).parent / "page.html"


def page_response() -> FileResponse:
    return FileResponse(PAGE, headers={"Content-Security-Policy": "default-src 'self' 'unsafe-inline'"})
