"""What clients and users send: texts of one class of characters, to the server, chat and the Python API."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import llama_cpp
import pytest

from llamabase.errors import PromptTooLong, TextError
from llamabase.llama.model import Model
from runner import SpeculativeLM
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .test_serve import serving
from .toy import write_model

TEXTS = {
    "letters": "A" * 60_000,
    "blank lines": "\n" * 60_000,
    "signs": "====" * 15_000,
    "base64": base64.b64encode(bytes(range(256)) * 176).decode(),
    "accents": "é" * 30_000,
    "Chinese": "中" * 30_000,
    "digits": "7" * 100_000,
    "emoji": "😀" * 30_000,
}


@pytest.fixture(scope="module", params=["tekken", "gpt-4o", "deepseek-v3", "default"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served") / f"{request.param}.gguf", pre=request.param, n_ctx=512)


@pytest.fixture(scope="module")
def url(target: Path) -> Iterator[str]:
    with Engine(LoadOptions(target, n_ctx=512, n_threads=1)) as engine, serving(engine) as (found, _):
        yield found


def post(url: str, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=60)


def test_the_server_outlives_any_text(url: str) -> None:
    for text in TEXTS.values():
        assert len(post(url, "/tokenize", {"content": text}).json()["tokens"]) > len(text) // 4
    text = " ".join(TEXTS.values())
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/completions", {"prompt": text}),
    ):
        answer = post(url, path, body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
        assert "more than the context of 512" in error["message"]
    assert httpx.get(url + "/health").json() == {"status": "ok"}


def test_what_cannot_fit_is_not_split(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "llama_tokenize", None)
    text = "the sea " * 250_000
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/completions", {"prompt": text}),
    ):
        answer = post(url, path, body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["param"] in ("messages", "prompt")
        assert error["message"].startswith("the prompt has at least 15")


def test_what_cannot_be_split_is_named(url: str) -> None:
    answer = post(url, "/tokenize", {"content": "a sea\n" + "A" * 1_000_001})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("a word of 1000001 characters, which begins with 'AAAA")


def test_python_says_the_same(target: Path) -> None:
    too_long = pytest.raises(PromptTooLong, match="more than the context of 512; raise --ctx-size")
    with SpeculativeLM(target, n_ctx=512, n_threads=1) as lm, too_long:
        lm.chat("the sea " * 250_000)
    with Model(target) as model, pytest.raises(TextError, match="a word of"):
        model.tokenize("A" * 1_000_001)


def test_a_file_of_letters_in_chat(target: Path, tmp_path: Path) -> None:
    task = tmp_path / "task.txt"
    task.write_text("A" * 60_000)
    command = [sys.executable, "-m", "runner.chat", "--target", str(target), "-f", str(task), "-n", "4", "-t", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 1, done.stderr
    assert "tokens does not fit a context of 512" in done.stderr
