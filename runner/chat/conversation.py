"""Conversations as files: a JSON list of messages, each a role and a content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llamabase.errors import FileFormatError
from llamabase.files import Kind, require_regular, write_whole

Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant")
MOST = 1 << 26  # bytes to read at most: more than any context holds, and a bound if a model is given by mistake


def save(messages: Messages, path: Path) -> None:
    """Write a conversation as JSON. Raises TrimError if that fails, or if the file is there and is none."""
    with write_whole(path, CONVERSATION) as file:
        file.write(json.dumps(messages, ensure_ascii=False, indent=1).encode("utf-8", "replace") + b"\n")


def load(path: Path) -> Messages:
    """A conversation that `save` wrote. Raises FileFormatError for any other file."""
    require_regular(path)
    try:
        with path.open("rb") as file:
            messages = json.loads(file.read(MOST))
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError):
        messages = None
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise FileFormatError(
            f"{path}: is not a conversation: that is a JSON list of objects with a role ({', '.join(ROLES)}) and a "
            "content, as /save writes it"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and isinstance(value.get("content"), str)


def _is_conversation(path: Path) -> bool:
    try:
        load(path)
        return True
    except FileFormatError:
        return False


CONVERSATION = Kind("is not a conversation", _is_conversation)
