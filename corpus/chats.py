"""What the assistant says in a conversation, cut out of the text that the model's own template renders.

An answer is rendered as the last message, because templates drop reasoning of earlier ones. The target emits what
follows the prompt in that rendering. Some templates render the prompt alone otherwise than before an answer: they open
a `<think>`, or move the system message. Then the answer is what another answer would change. Both ways are tried on a
copy whose other messages hold a mark; a way is taken only if it cuts out no mark. If neither is certain, the
conversation is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from llamabase.errors import FileFormatError
from llamabase.llama.template import ChatTemplate

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]  # (messages, whether they end with the answer) to text

CHATS = ("messages", "conversations")  # fields that hold a conversation: OpenAI's and ShareGPT's
_ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}  # other names of roles that templates know
# Characters for private use that stand for texts; no text contains them, and they differ from the first character on.
_OTHERS, _ANSWER, _ANOTHER = "\U0010fa01", "\U0010fa02", "\U0010fa03"
_MARKUP = re.compile(r"<[^<>]*>|\s")
_OPEN_TAG = re.compile(r"<[^<>\s]*\Z")  # a tag is not cut in two, though two tags may begin alike


class _Arguments(dict[str, Any]):
    """The arguments of a call: an object for templates that write JSON of it, and text for those that print it."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, other: str) -> str:
        return str(self) + other

    def __radd__(self, other: str) -> str:
        return other + str(self)


def clean(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def assistant_texts(messages: Sequence[Any], tools: Any, template: ChatTemplate | None) -> list[str]:
    """Each answer of a conversation (OpenAI's form, or ShareGPT's) as `template` renders it; None gives bare contents.

    The end-of-turn token is part of it. Raises FileFormatError, or an error of Python's on items that are not messages.
    """
    talk = [_message(message) for message in messages]
    tools = _parsed(tools)

    def render(messages: Sequence[Message], answered: bool) -> str:
        assert template is not None
        return template.text(messages, tools, answered=answered)

    texts = []
    for i, message in enumerate(talk):
        if message["role"] == "assistant":
            texts.append(message["content"] if template is None else _rendered(render, talk[:i], message).rstrip("\n"))
    if talk and not texts:
        raise FileFormatError("no message is the assistant's")
    return texts


def _message(found: Any) -> Message:
    """As templates expect it: a content that is text, arguments that are objects, and no field that is null."""
    kept = {key: value for key, value in found.items() if value is not None}
    role, other_role = kept.pop("role", None), kept.pop("from", None)  # ShareGPT's names are from and value
    content, other_content = kept.pop("content", None), kept.pop("value", None)
    role = other_role if role is None else role
    if not isinstance(role, str):
        raise TypeError("a message has no role")
    role = _ROLES.get(role, role)
    content = _content(other_content if content is None else content, role)
    calls = kept.pop("tool_calls", None)
    if "function_call" in kept:  # OpenAI's older form
        calls = calls or [{"function": kept.pop("function_call")}]
    if calls:
        kept["tool_calls"] = [_call(call) for call in calls]
    return kept | {"role": role, "content": content}


def _content(content: Any, role: str) -> str:
    """Pictures and the like are read over in messages of others; the assistant's must be text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return clean(content)
    if not isinstance(content, list):
        raise TypeError("a content is neither text nor a list of parts")
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    if role == "assistant" and None in texts:
        raise TypeError("a part of the assistant's content is not text")
    return clean("".join(text for text in texts if text is not None))


def _call(call: Message) -> Message:
    function = call["function"]
    arguments = _parsed(function.get("arguments"))
    if arguments is None or isinstance(arguments, dict):
        arguments = _Arguments(arguments or {})
    return {"type": "function"} | call | {"function": {**function, "arguments": arguments}}


def _parsed(value: Any) -> Any:
    """What a JSON text holds; anything else as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def _rendered(render: Render, before: list[Message], answer: Message) -> str:
    text = _cut(render, before, answer)
    if not _is_whole(text, answer) and answer["content"]:
        # Some templates drop the reasoning in a content, even from the last answer.
        text = _cut(render, before, answer | {"content": _ANSWER}).replace(_ANSWER, answer["content"])
    elif not _is_whole(text, answer):
        # Some render calls only if the content is null; others would then print "None".
        text = _cut(render, before, answer | {"content": None})
    if not _is_whole(text, answer):
        raise FileFormatError("the chat template leaves out a part of an answer")
    return text


def _is_whole(text: str, answer: Message) -> bool:
    """Whether the text has the content, tags and white space aside, and the name of every called function."""
    names = [call["function"]["name"] for call in answer.get("tool_calls", ())]
    return _MARKUP.sub("", answer["content"]) in _MARKUP.sub("", text) and all(name in text for name in names)


def _cut(render: Render, before: list[Message], answer: Message) -> str:
    """The rendered answer, cut out in the first way that takes nothing of the other messages."""
    marked = [message | {"content": _OTHERS} if message["content"] else message for message in before]
    for way in (_after_prompt, _what_changes):
        tried = way(render, marked, answer)
        if tried is not None and _OTHERS not in tried and (text := way(render, before, answer)) is not None:
            return text
    raise FileFormatError("the chat template writes other messages among the words of an answer")


def _after_prompt(render: Render, before: list[Message], answer: Message) -> str | None:
    """What follows the prompt in the conversation with the answer; None if that does not begin with the prompt."""
    whole = render([*before, answer], True)
    try:
        prompt = render(before, False) if before else None
    except FileFormatError:  # a template may refuse half a conversation
        return None
    return whole[len(prompt) :] if prompt is not None and whole.startswith(prompt) else None


def _what_changes(render: Render, before: list[Message], answer: Message) -> str | None:
    """The conversation from the first character that another answer would change."""
    whole = render([*before, answer], True)
    other = render([*before, {"role": "assistant", "content": _ANOTHER}], True)
    shared = os.path.commonprefix([whole, other])  # noqa: RUF071  of texts, by characters
    return whole[len(_OPEN_TAG.sub("", shared)) :]
