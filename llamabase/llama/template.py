"""A model's own chat template: from messages to the text, and the token ids, that it was trained on."""

from __future__ import annotations

import copy
import hashlib
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from llamabase.errors import FileFormatError, SettingError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary

from .model import Model

Messages = Sequence[dict[str, Any]]
ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
LETTERS_OF_ID = 9  # letters and digits of a call's id: Mistral's templates take no other length
RESERVED = {  # names of a template's variables that the formatter itself sets
    *("messages", "tools", "functions", "function_call", "tool_choice", "eos_token", "bos_token", "raise_exception"),
    *("add_generation_prompt", "strftime_now", "self"),
}


class ChatTemplate:
    """The templates of a GGUF, through llama-cpp-python's Jinja formatter; a model without one gets the bare text.

    The template named `tool_use`, if there is one, is used for conversations with tools. Raises FileFormatError for a
    template that is not Jinja.
    """

    def __init__(self, file: GGUFFile, vocabulary: Vocabulary) -> None:
        self._path = file.path

        def text(key: str) -> str:
            token = file.get(f"tokenizer.ggml.{key}_token_id")
            known = token is not None and 0 <= token < len(vocabulary)  # llama.cpp ignores others, too
            return vocabulary.text(token).decode("utf-8", "replace") if known else ""

        self._bos, eos = text("bos"), text("eos")

        def formatter(key: str) -> Jinja2ChatFormatter | None:
            source = file.get(key)
            try:
                return Jinja2ChatFormatter(source, eos_token=eos, bos_token=self._bos) if source else None
            except Exception as error:  # a source may be anything
                raise FileFormatError(
                    f"{file.path}: its chat template cannot be used: {error}; get another file"
                ) from error

        self._format = formatter("tokenizer.chat_template")
        self._with_tools = formatter("tokenizer.chat_template.tool_use") or self._format

    @property
    def tool_source(self) -> str:
        """The source of the template that is used for conversations with tools; empty if there is none."""
        return "" if self._with_tools is None else str(self._with_tools.template)

    def text(
        self,
        messages: Messages,
        tools: Any = None,
        answered: bool = False,
        *,
        continued: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the model reads it, up to the beginning of its answer.

        answered: up to its end instead, with no answer to follow. continued: the last message is the beginning of the
        answer. variables: further variables for the template, such as enable_thinking.

        If a template refuses the messages (for ids that are not nine letters and digits, or arguments that are
        objects), it gets them in other forms. Raises FileFormatError if it refuses all forms (roles out of order, say),
        and SettingError for reserved variables.
        """
        if taken := sorted(RESERVED & (variables or {}).keys()):
            raise SettingError(f"chat_template_kwargs: {taken[0]} is set by the conversation itself; leave it out")
        if continued:
            head = self.text(messages[:-1], tools, variables=variables)
            return head + _begun(messages[-1], head)
        chosen = self._with_tools if tools else self._format
        if chosen is None:
            return "\n".join(str(message["content"]) for message in messages)
        chosen = copy.copy(chosen)  # other threads may use it at the same time
        chosen.add_generation_prompt = not answered
        refused: Exception | None = None
        for form in _forms(messages):
            try:
                return str(chosen(messages=form, tools=tools, **(variables or {})).prompt)
            except Exception as error:  # a template may raise anything
                refused = refused or error
        raise FileFormatError(f"{self._path}: its chat template refuses these messages: {refused}") from refused

    def ids(self, model: Model, messages: Messages, tools: Any = None, n_ctx: int | None = None) -> list[int]:
        """Token ids of `text`; see `tokens`."""
        return self.tokens(model, self.text(messages, tools), n_ctx)

    def tokens(self, model: Model, text: str, n_ctx: int | None = None) -> list[int]:
        """Token ids of a text that the template wrote, never empty. BOS comes first if the model wants it.

        n_ctx: raise PromptTooLong, before it is split, for a large text that needs more tokens than this.
        """
        begun = bool(self._bos) and text.startswith(self._bos)
        tokens = model.tokenize(text, special=True, add_bos=not begun, n_ctx=n_ctx)
        return tokens or ([model.bos] if model.bos is not None else [])


def _begun(message: Mapping[str, Any], head: str) -> str:
    """The beginning of an answer after `head`, including its reasoning."""
    reasoning, content = message.get("reasoning_content") or "", message.get("content") or ""
    opened = head.rstrip().endswith("<think>")
    if not opened and not reasoning:
        return str(content)
    start = reasoning if opened else f"<think>\n{reasoning}"
    return f"{start}\n</think>\n\n{content}" if content else start


def _forms(messages: Messages) -> Iterator[Messages]:
    """The messages as they are, then with calls in the other forms that templates want."""
    yield messages
    if any(message.get("tool_calls") or message.get("tool_call_id") for message in messages):
        as_text = [_with_text_arguments(message) for message in messages]
        yield from (list(_with_short_ids(messages)), as_text, list(_with_short_ids(as_text)))


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = []
    for call in message.get("tool_calls") or []:
        function = dict(call.get("function") or {})
        if not isinstance(function.get("arguments"), str):
            function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
        calls.append(call | {"function": function})
    return message | {"tool_calls": calls} if calls else message


def _with_short_ids(messages: Messages) -> Iterator[dict[str, Any]]:
    """The messages with short ids of calls; a result without an id gets that of the first call without a result."""
    waiting: list[str] = []
    for i, message in enumerate(messages):
        changed = dict(message)
        if calls := message.get("tool_calls"):
            waiting = [short_id(call.get("id") or f"{i}.{n}") for n, call in enumerate(calls)]
            changed["tool_calls"] = [call | {"id": id_} for call, id_ in zip(calls, waiting, strict=True)]
        if message.get("role") == "tool":
            given = message.get("tool_call_id")
            changed["tool_call_id"] = short_id(given) if given else (waiting or [short_id("")])[0]
            waiting = [id_ for id_ in waiting if id_ != changed["tool_call_id"]]
        yield changed


def short_id(given: str) -> str:
    """The given id if it is nine letters and digits, else such an id that is always the same for the given one."""
    if len(given) == LETTERS_OF_ID and given.isascii() and given.isalnum():
        return given
    number = int.from_bytes(hashlib.sha256(given.encode("utf-8", "replace")).digest()[:8], "big")
    return "".join(ALPHABET[number // len(ALPHABET) ** i % len(ALPHABET)] for i in range(LETTERS_OF_ID))
