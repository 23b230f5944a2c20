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
    language: str = ""  # of the answer, where the file says so
    more: tuple[str, ...] = ()  # what the user says in the turns after the first

    @property
    def label(self) -> str:
        """What a plan groups answers by: the task, or the language where it is not English."""
        return self.task if self.language in ("", "en") else self.language


def load_prompts(path: Path | None = None, limit: int | None = None) -> list[Prompt]:
    """Prompts of a JSON-lines file, each line with `messages` (OpenAI), `turns` (Spec-Bench) or `prompt`.

    None loads those that ship. Raises FileFormatError naming file and line.
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
            messages = _messages(data.get("messages") or [{"role": "user", "content": str(text)}])
            if text is None and "messages" not in data:
                raise KeyError("messages")
            task = str(data.get("domain") or data.get("category") or "prompt")
            name, language = data.get("id") or data.get("question_id") or number, data.get("language") or ""
            prompts.append(Prompt(str(name), task, messages, str(language), tuple(map(str, turns[1:]))))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FileFormatError(f"{source}, line {number}: needs messages, turns or prompt ({error})") from error
    if not prompts:
        raise FileFormatError(f"{source}: holds no prompts")
    return prompts if limit is None else spread(prompts, limit)


def _messages(found: Any) -> list[dict[str, str]]:
    """Raises ValueError for what no template can be given."""
    for message in found:
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError("a message has a role and a content, both text")
        content.encode()  # half a surrogate pair is no text
    return list(found)


def split(prompts: list[Prompt], part: str) -> list[Prompt]:
    """ "calibrate": four of five prompts, whose answers are counted; "judge": the fifth, which never is; or "all"."""
    if part == "all":
        return prompts
    return [prompt for i, prompt in enumerate(prompts) if (i % 5 == 4) == (part == "judge")]


def spread(prompts: list[T], n: int) -> list[T]:
    """n of the prompts, at even distances, so that every task has its share."""
    n = min(n, len(prompts))
    return [prompts[i * len(prompts) // n] for i in range(n)]
