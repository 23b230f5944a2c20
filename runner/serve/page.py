"""The page, and how it is served."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parent / "page.html"
HEADERS = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline'"}
