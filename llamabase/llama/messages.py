"""Messages as chat templates expect them: contents are text, arguments are objects, and no field is null."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]
_ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}  # other names of the roles templates know


class Arguments(dict[str, Any]):
    """The arguments of a call: an object for templates that write JSON of it, and text for those that print it."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, other: str) -> str:
        return str(self) + other

    def __radd__(self, other: str) -> str:
        return other + str(self)


def for_template(message: Mapping[str, Any]) -> Message:
    """A message in OpenAI's form or ShareGPT's, as templates expect it.

    Pictures and the like are left out of messages of others; the assistant's content must be text. Raises TypeError, or
    what Python raises, for what is not a message.
    """
    kept = {key: value for key, value in message.items() if value is not None}
    role, other_role = kept.pop("role", None), kept.pop("from", None)  # ShareGPT's names are from and value
    content, other_content = kept.pop("content", None), kept.pop("value", None)
    role = other_role if role is None else role
    if not isinstance(role, str):
        raise TypeError("a message has no role")
    role = _ROLES.get(role, role)
    calls = kept.pop("tool_calls", None)
    if "function_call" in kept:  # OpenAI's older form
        calls = calls or [{"function": kept.pop("function_call")}]
    if calls:
        kept["tool_calls"] = [_call(call) for call in calls]
    return kept | {"role": role, "content": _text(other_content if content is None else content, role)}


def _text(content: Any, role: str) -> str:
    if content is None or isinstance(content, str):
        return clean(content or "")
    if not isinstance(content, list):
        raise TypeError("a content is neither text nor a list of parts")
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    if role == "assistant" and None in texts:
        raise TypeError("a part of the assistant's content is not text")
    return clean("".join(text for text in texts if text is not None))


def _call(call: Message) -> Message:
    function = call["function"]
    arguments = parsed(function.get("arguments"))
    if arguments is None or isinstance(arguments, dict):
        arguments = Arguments(arguments or {})
    return {"type": "function"} | call | {"function": {**function, "arguments": arguments}}


def parsed(value: Any) -> Any:
    """What a JSON text holds; anything else as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def clean(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")
