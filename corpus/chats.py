"""What the assistant says in a conversation, cut out of what the model's own template writes.

An answer is rendered as the last message, so a template that drops earlier reasoning keeps its own. What follows the
prompt in that rendering is what the target emits. Some templates write the prompt otherwise than they later begin the
answer: they open a `<think>`, or move the system message. There the answer is what changes if another one is given.
Both ways are tried on a copy in which the other messages hold a mark; a way is taken only if the mark is not in what it
cuts out. Where neither is certain, the conversation is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from llamabase.errors import FileFormatError
from llamabase.llama.messages import Message, for_template, parsed
from llamabase.llama.template import ChatTemplate

Render = Callable[[Sequence[Message], bool], str]  # of messages, with the last one answered or a prompt for the next

CHATS = ("messages", "conversations")  # fields that hold a conversation: OpenAI's name and ShareGPT's
# For private use, and in no known font: characters that stand for texts, each different from the first character on.
_OTHERS, _ANSWER, _ANOTHER = "\U0010fa01", "\U0010fa02", "\U0010fa03"
_MARKUP = re.compile(r"<[^<>]*>|\s")
_OPEN_TAG = re.compile(r"<[^<>\s]*\Z")  # two tags may begin alike, and are not to be cut in two


def assistant_texts(messages: Sequence[Any], tools: Any, template: ChatTemplate | None) -> list[str]:
    """Each answer of a conversation (OpenAI's form, or ShareGPT's), as `template` writes it; None gives bare contents.

    The end-of-turn token is part of it. Raises FileFormatError, or what Python raises on items that are no messages.
    """
    talk = [for_template(message) for message in messages]
    tools = parsed(tools)

    def render(messages: Sequence[Message], answered: bool) -> str:
        assert template is not None
        return template.text(messages, tools, answered=answered)

    said = []
    for i, message in enumerate(talk):
        if message["role"] == "assistant":
            said.append(message["content"] if template is None else _said(render, talk[:i], message).rstrip("\n"))
    if talk and not said:
        raise FileFormatError("no message is the assistant's")
    return said


def _said(render: Render, before: list[Message], answer: Message) -> str:
    said = _cut(render, before, answer)
    if not _is_whole(said, answer) and answer["content"]:
        # Some templates drop the reasoning that stands in a content, even from the last answer.
        said = _cut(render, before, answer | {"content": _ANSWER}).replace(_ANSWER, answer["content"])
    elif not _is_whole(said, answer):
        # Some write calls only where the content is null; others would then print "None".
        said = _cut(render, before, answer | {"content": None})
    if not _is_whole(said, answer):
        raise FileFormatError("the chat template leaves out a part of an answer")
    return said


def _is_whole(said: str, answer: Message) -> bool:
    """Whether the content is there, tags and white space aside, and the name of every function that is called."""
    names = [call["function"]["name"] for call in answer.get("tool_calls", ())]
    return _MARKUP.sub("", answer["content"]) in _MARKUP.sub("", said) and all(name in said for name in names)


def _cut(render: Render, before: list[Message], answer: Message) -> str:
    """The rendered answer, cut in the first way that gives nothing of the other messages."""
    marked = [message | {"content": _OTHERS} if message["content"] else message for message in before]
    for way in (_after_prompt, _what_changes):
        tried = way(render, marked, answer)
        if tried is not None and _OTHERS not in tried:
            said = way(render, before, answer)
            if said is not None:
                return said
    raise FileFormatError("the chat template writes other messages among the words of an answer")


def _after_prompt(render: Render, before: list[Message], answer: Message) -> str | None:
    """What follows the prompt in the conversation with the answer; None where that does not begin with the prompt."""
    whole = render([*before, answer], True)
    try:
        prompt = render(before, False) if before else None
    except FileFormatError:  # half a conversation may be refused
        return None
    return whole[len(prompt) :] if prompt is not None and whole.startswith(prompt) else None


def _what_changes(render: Render, before: list[Message], answer: Message) -> str | None:
    """The conversation from where it would go on otherwise with another answer."""
    whole = render([*before, answer], True)
    other = render([*before, {"role": "assistant", "content": _ANOTHER}], True)
    shared = next(i for i, (a, b) in enumerate(zip(whole + _OTHERS, other + _ANSWER, strict=False)) if a != b)
    return whole[len(_OPEN_TAG.sub("", whole[:shared])) :]
