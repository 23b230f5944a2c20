"""The first moments of a server: it answers before its model is ready, says what it is doing, and can be ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llamabase.cli import progress

ROOT = Path(__file__).parent.parent

# The command with a preparation that lasts until a file is there, or fails.
SLOW = """
import sys, time
from pathlib import Path
import runner.options
from gguf_trim.pairs.prepare import Prepared
from llamabase.errors import TrimError
from llamabase.cli.progress import progress
from runner.serve.__main__ import main

folder, target, trimmed = map(Path, sys.argv[1:4])

def prepare(name):
    try:
        with progress("trimming to 400", 3, "B"):
            while not (folder / "go").exists():
                time.sleep(0.01)
        if (folder / "fail").exists():
            raise TrimError("d.gguf: is no drafter; get another file")
    finally:
        (folder / "tidied").touch()
    return Prepared(target, target, trimmed)

runner.options.prepare = prepare
main(["--model", "a-pair", "--port", "0", *sys.argv[4:]])
"""


class Starting:
    """The command, and where it says it answers."""

    def __init__(self, folder: Path, toys: dict[str, Path], *arguments: str) -> None:
        command = [sys.executable, "-c", SLOW, str(folder), str(toys["target"]), str(toys["good-trimmed"]), *arguments]
        environment = os.environ | {"GGUF_TRIM_CACHE": str(folder / "cache")}
        self.folder = folder
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        assert self.process.stderr is not None
        self.url = self.process.stderr.readline().split()[0]
        while self.error()["doing"] != "trimming to 400":
            time.sleep(0.01)

    def error(self) -> dict[str, Any]:
        while True:
            with contextlib.suppress(httpx.ConnectError):
                error: dict[str, Any] = httpx.get(f"{self.url}/health").json()["error"]
                return error

    def ended(self) -> tuple[int, str]:
        """Its exit code, and what it has said."""
        assert self.process.stderr is not None
        code = self.process.wait(20)
        return code, self.process.stderr.read()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def starting(tmp_path: Path, toys: dict[str, Path]) -> Iterator[Starting]:
    started = Starting(tmp_path, toys, "-c", "128", "-t", "1", "--draft-max", "0", "--api-key", "secret")
    yield started
    started.close()


def test_it_answers_at_once_and_says_what_it_does(starting: Starting) -> None:
    for path in ("/health", "/v1/health"):
        answer = httpx.get(starting.url + path)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json() == {
            "error": {
                "code": 503,
                "message": "Loading model",
                "type": "unavailable_error",
                "doing": "trimming to 400",
            }
        }
    assert httpx.head(f"{starting.url}/health").status_code == 503
    for method, path in (("POST", "/v1/chat/completions"), ("POST", "/completion"), ("GET", "/v1/models")):
        answer = httpx.request(method, starting.url + path, json={} if method == "POST" else None)
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "Loading model")
    page = httpx.get(starting.url)
    assert page.status_code == 200 and 'fetch("/health")' in page.text
    (starting.folder / "go").touch()
    with httpx.Client(base_url=starting.url, headers={"Authorization": "Bearer secret"}) as client:
        end = time.monotonic() + 30
        while client.get("/health").status_code == 503:  # over a connection that was open before
            assert time.monotonic() < end
            time.sleep(0.02)
        assert client.get("/health").json() == {"status": "ok"}
        answer = client.post("/completion", json={"prompt": "the", "n_predict": 3})
        assert answer.status_code == 200 and answer.json()["stop"]
    starting.process.send_signal(signal.SIGTERM)
    code, said = starting.ended()
    assert code == 0 and f"target listens on {starting.url}" in said


@pytest.mark.parametrize(("number", "code", "said"), [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 0, "")])
def test_a_signal_ends_the_preparation(starting: Starting, number: int, code: int, said: str) -> None:
    """What was begun is removed, and nobody sees a traceback."""
    began = time.monotonic()
    starting.process.send_signal(number)
    found, text = starting.ended()
    assert (found, time.monotonic() - began < 5, (starting.folder / "tidied").exists()) == (code, True, True)
    assert said in text and "Traceback" not in text


def test_a_failure_of_the_preparation_is_the_commands(starting: Starting) -> None:
    (starting.folder / "fail").touch()
    (starting.folder / "go").touch()
    code, said = starting.ended()
    assert (code, said.splitlines()[-1]) == (1, "Error: d.gguf: is no drafter; get another file")
    assert "Traceback" not in said


def test_what_goes_on_is_the_innermost_step() -> None:
    assert progress.doing() == ""
    with progress.step("preparing [a pair]"):
        assert progress.doing() == "preparing [a pair]"
        with progress.progress("trimming", 3, "B"):
            assert progress.doing() == "trimming"
        with contextlib.suppress(KeyError), progress.step("loading"):
            assert progress.doing() == "loading"
            raise KeyError
        assert progress.doing() == "preparing [a pair]"
    assert progress.doing() == ""
