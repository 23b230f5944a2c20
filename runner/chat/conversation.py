"""Conversations as files: a JSON list of messages, each a role and a content."""

from __future__ import annotations

import json
from pathlib import Path

from llamabase.errors import FileFormatError
from llamabase.files import Kind, write_whole

Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant")
MOST = 1 << 26  # bytes to read: more than any context holds, and no model by mistake


def save(messages: Messages, path: Path) -> None:
    """Write a conversation as JSON. Raises TrimError where it cannot; replaces nothing but a conversation."""
    with write_whole(path, CONVERSATION) as file:
        file.write(json.dumps(messages, ensure_ascii=False, indent=1).encode("utf-8", "replace") + b"\n")


def load(path: Path) -> Messages:
    """A conversation that `save` has written. Raises FileFormatError for any other file."""
    try:
        if path.exists() and not path.is_file():
            raise FileFormatError(f"{path}: is not a regular file")
        with path.open("rb") as file:
            found = json.loads(file.read(MOST))
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(
        isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
        for message in found
    ):
        raise FileFormatError(
            f"{path}: is not a conversation: that is a JSON list of objects with a role ({', '.join(ROLES)}) and a "
            "content, as /save writes it"
        )
    return [{"role": message["role"], "content": message["content"]} for message in found]


def _is_conversation(path: Path) -> bool:
    try:
        load(path)
    except FileFormatError:
        return False
    return True


CONVERSATION = Kind("is not a conversation", _is_conversation)
