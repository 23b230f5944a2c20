"""What the assistant says in a conversation, cut out of the text that the model's own template renders.

An answer is rendered as the last message, because templates drop reasoning of earlier ones. The target emits what
follows the prompt in that rendering. Some templates render the prompt alone otherwise than before an answer: they open
a `<think>`, or move the system message. Then the answer is what another answer would change. Both ways are tried on a
copy whose other messages hold a mark; a way is taken only if it cuts out no mark. If neither is certain, the
conversation is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from llamabase.errors import FileFormatError
from llamabase.llama.messages import Message, for_template, parsed
from llamabase.llama.template import ChatTemplate

Render = Callable[[Sequence[Message], bool], str]  # of messages, with the last one answered or a prompt for the next

CHATS = ("messages", "conversations")  # fields that hold a conversation: OpenAI's name and ShareGPT's
# Characters for private use that stand for texts; no text contains them, and they differ from the first character on.
_OTHERS, _ANSWER, _ANOTHER = "\U0010fa01", "\U0010fa02", "\U0010fa03"
_MARKUP = re.compile(r"<[^<>]*>|\s")
_OPEN_TAG = re.compile(r"<[^<>\s]*\Z")  # a tag is not cut in two, though two tags may begin alike


def assistant_texts(messages: Sequence[Any], tools: Any, template: ChatTemplate | None) -> list[str]:
    """Each answer of a conversation (OpenAI's form, or ShareGPT's) as `template` renders it; None gives bare contents.

    The end-of-turn token is part of it. Raises FileFormatError, or an error of Python's on items that are not messages.
    """
    talk = [for_template(message) for message in messages]
    tools = parsed(tools)

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
    shared = os.path.commonprefix([whole, other])  # noqa: RUF071
    return whole[len(_OPEN_TAG.sub("", shared)) :]
