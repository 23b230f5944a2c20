"""Prompts to run: the bundled ones, or a file of them."""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llamabase.errors import FileFormatError
from llamabase.files import read_text

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """One conversation up to the answer; `task` groups prompts in tables."""

    id: str
    task: str
    messages: list[dict[str, str]]
    language: str = ""  # of the answer, if the file gives it
    more: tuple[str, ...] = ()  # the user's turns after the first

    @property
    def label(self) -> str:
        """What a plan groups answers by: the task, or the language unless it is English."""
        return self.task if self.language in ("", "en") else self.language


def load_prompts(path: Path | None = None) -> list[Prompt]:
    """Prompts of a JSON-lines file, each line with `messages` (OpenAI), `turns` (Spec-Bench) or `prompt`.

    None loads the bundled ones. Raises FileFormatError naming file and line.
    """
    source = path or importlib.resources.files("corpus") / "ready" / "prompts.jsonl"
    prompts = []
    for number, line in enumerate(read_text(source, "prompts").split("\n"), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            turns = data.get("turns") or [None]
            text = data.get("prompt") or turns[0]
            if not data.get("messages") and text is None:
                raise KeyError("messages")
            messages = _messages(data.get("messages") or [{"role": "user", "content": str(text)}])
            task = str(data.get("domain") or data.get("category") or "prompt")
            name, language = data.get("id") or data.get("question_id") or number, data.get("language") or ""
            prompts.append(Prompt(str(name), task, messages, str(language), tuple(map(str, turns[1:]))))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FileFormatError(f"{source}, line {number}: needs messages, turns or prompt ({error})") from error
    if not prompts:
        raise FileFormatError(f"{source}: holds no prompts")
    return prompts


def _messages(messages: Any) -> list[dict[str, str]]:
    """The same; raises an error of Python's if no template can render them."""
    for message in messages:
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError("a message has a role and a content, both text")
        content.encode()  # raises UnicodeEncodeError for half a surrogate pair
    return list(messages)


def split(prompts: list[Prompt], part: str) -> list[Prompt]:
    """ "calibrate": the four of five prompts whose answers are counted; "judge": the fifth; or "all"."""
    if part == "all":
        return prompts
    return [prompt for i, prompt in enumerate(prompts) if (i % 5 == 4) == (part == "judge")]


def spread(prompts: list[T], n: int | None) -> list[T]:
    """n of the prompts, at even distances, so that every task has its share; None for all."""
    n = len(prompts) if n is None else min(n, len(prompts))
    return [prompts[i * len(prompts) // n] for i in range(n)]
