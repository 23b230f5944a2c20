"""A process that tokenizes, so that a test outlives what llama.cpp would end.

`python -m tests.tokenizing` reads JSON lines {"path", "text" as a list of [unit, times], "special", "add_bos"} and
answers each: {"n": tokens}, {"refused": why} or {"differs": [ours, llama.cpp's]}.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp

from llamabase.errors import TextError
from llamabase.llama.model import Model

BARE = 1 << 31  # bytes of stack for llama.cpp's own call


def bare(model: Model, text: str, special: bool, add_bos: bool) -> list[int]:
    """llama_tokenize of the whole text, called as it is, on a stack for six million characters."""
    found: list[int] = []

    def run() -> None:
        data = text.encode()
        room = 4 * len(data) + 8
        ids = (llama_cpp.llama_token * room)()
        n = llama_cpp.llama_tokenize(model.vocab, data, len(data), ids, room, add_bos, special)
        assert n >= 0
        found.extend(ids[:n])

    before = threading.stack_size(BARE)
    thread = threading.Thread(target=run)
    thread.start()
    threading.stack_size(before)
    thread.join()
    return found


def answer(models: dict[str, Model], asked: dict[str, Any]) -> dict[str, Any]:
    model = models.get(asked["path"]) or models.setdefault(asked["path"], Model(asked["path"], vocab_only=True))
    text = "".join(unit * times for unit, times in asked["text"])
    special, add_bos = asked["special"], asked["add_bos"]
    started = time.monotonic()
    try:
        ids = model.tokenize(text, special, add_bos)
    except TextError as error:
        return {"refused": str(error), "seconds": time.monotonic() - started}
    seconds = time.monotonic() - started
    if asked["compare"] and ids != (own := bare(model, text, special, add_bos)):
        return {"differs": [len(ids), len(own)]}
    return {"n": len(ids), "seconds": seconds}


class Child:
    """Such a process, started anew after each death, of which `ask` tells by AssertionError."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(
        self,
        path: Path,
        text: Sequence[tuple[str, int]],
        special: bool = True,
        add_bos: bool = True,
        compare: bool = True,
    ) -> dict[str, Any]:
        if self._process is None:
            command = [sys.executable, "-m", "tests.tokenizing"]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, cwd=Path(__file__).parent.parent
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        row = {"path": str(path), "text": list(text), "special": special, "add_bos": add_bos, "compare": compare}
        self._process.stdin.write(json.dumps(row) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.stdout.close()
            self._process = None
            raise AssertionError(f"{path.name}: the process ended with {code}")
        found: dict[str, Any] = json.loads(line)
        assert "differs" not in found, found
        return found

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None


if __name__ == "__main__":
    opened: dict[str, Model] = {}
    for row in sys.stdin:
        print(json.dumps(answer(opened, json.loads(row))), flush=True)
