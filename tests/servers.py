"""Two servers on loopback, as much of PyPI and of the Hugging Face Hub as pip and huggingface_hub ask for."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar


class Server(ThreadingHTTPServer):
    """Serves until `stop`; `requests` lists what was asked, as "METHOD path"."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self.shutdown()
            self._thread.join()
            self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of a test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def note(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        self.server.headers.append({key.lower(): value for key, value in self.headers.items()})

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def wheel(package: str, version: str, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A wheel with these files under the package's folder, just whole enough for `pip download`."""
    name = re.sub(r"[-_.]+", "_", package)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for path, data in files.items():
            archive.writestr(f"{name}/{path}", data)
        info = f"{name}-{version}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return out.getvalue()


class Index(Server):
    """A package index: /simple/NAME/ lists the wheels that `add` was given."""

    def __init__(self) -> None:
        self.wheels: dict[str, bytes] = {}  # by file name
        super().__init__(_IndexHandler)

    def add(self, package: str, version: str, data: bytes) -> None:
        self.wheels[f"{re.sub(r'[-_.]+', '_', package)}-{version}-py3-none-any.whl"] = data

    @property
    def downloads(self) -> list[str]:
        return [path.rpartition("/")[2] for path in self.requests if "/files/" in path]


class _IndexHandler(_Handler):
    def do_GET(self) -> None:
        self.note()
        if self.path.startswith("/files/"):
            data = self.server.wheels.get(self.path.removeprefix("/files/"))
            self.answer(404 if data is None else 200, data or b"", Content_Type="application/octet-stream")
            return
        package = self.path.removeprefix("/simple/").strip("/").replace("-", "_")
        names = [name for name in self.server.wheels if name.startswith(f"{package}-")]
        links = "".join(f'<a href="/files/{name}">{name}</a>' for name in names)
        self.answer(200 if names else 404, f"<html><body>{links}</body></html>".encode(), Content_Type="text/html")


class Hub(Server):
    """Serves one file of one repository at /REPO/resolve/REVISION/FILE, or an error in its place.

    files: instead, the files of several repositories, {"user/repo": {path: data}}, which are listed as well.
    drop_after: each of the first `drops` answers ends after that many bytes, as a broken connection does.
    """

    COMMIT: ClassVar[str] = "0123456789" * 4

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.files: dict[str, dict[str, bytes]] = {}
        self.error: tuple[int, str] | None = None
        self.others: list[str] = []
        self.drop_after, self.drops = 0, 0
        super().__init__(_HubHandler)


class _HubHandler(_Handler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub: Hub = self.server
        listed = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/main", self.path.partition("?")[0])
        if "/resolve/" not in self.path and not (hub.files and listed):  # huggingface_hub asks for other lists as well
            self.server.others.append(self.path)
            self.answer(404, b"")
            return
        self.note()
        if hub.error is not None:
            status, code = hub.error
            if not status:  # hang up without a word
                self.close_connection = True
                return
            more = {"X_Error_Code": code} if code else {}
            self.answer(status, b"", **more)
            return
        data = hub.data
        if hub.files:
            repo, _, file = self.path.strip("/").partition("/resolve/main/")
            files = hub.files.get(listed[1] if listed else repo)
            if files is None or not (listed or file in files):
                self.answer(404, b"", X_Error_Code="RepoNotFound" if files is None else "EntryNotFound")
                return
            if listed:
                rows = [{"type": "file", "path": p, "size": len(d), "oid": "0" * 40} for p, d in files.items()]
                self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
                return
            data = files[file]
        start = 0
        if (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) is not None:
            start = int(match[1])
        rest = data[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", hub.COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(rest)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if hub.drops:
            hub.drops -= 1
            self.wfile.write(rest[: hub.drop_after])
            self.close_connection = True
            return
        self.wfile.write(rest)


@contextlib.contextmanager
def running(server: Server) -> Iterator[Any]:
    try:
        yield server
    finally:
        server.stop()
