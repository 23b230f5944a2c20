"""A model's own chat template: from messages to the text, and the token ids, it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from .errors import FileFormatError
from .gguf_file import GGUFFile
from .llama import Model
from .vocabulary import Vocabulary


class ChatTemplate:
    """The template of a GGUF, through llama-cpp-python's Jinja formatter; a model without one gets the bare text.

    Raises FileFormatError for one that is no Jinja.
    """

    def __init__(self, file: GGUFFile, vocabulary: Vocabulary) -> None:
        self._path = file.path
        source = file.get("tokenizer.chat_template")

        def text(key: str) -> str:
            token = file.get(f"tokenizer.ggml.{key}_token_id")
            known = token is not None and 0 <= token < len(vocabulary)  # as llama.cpp, which takes no others for one
            return vocabulary.text(token).decode("utf-8", "replace") if known else ""

        self._bos = text("bos")
        try:
            self._format = Jinja2ChatFormatter(source, eos_token=text("eos"), bos_token=self._bos) if source else None
        except Exception as error:  # a source may be anything
            raise FileFormatError(
                f"{self._path}: its chat template cannot be used: {error}; get another file"
            ) from error

    def text(self, messages: Sequence[dict[str, Any]], tools: Any = None, answered: bool = False) -> str:
        """The conversation as the model reads it, up to where its answer begins (or ends, where `answered`).

        Raises FileFormatError where the template refuses the messages (roles out of order, say).
        """
        if self._format is None:
            return "\n".join(str(message["content"]) for message in messages)
        self._format.add_generation_prompt = not answered
        try:
            return str(self._format(messages=list(messages), tools=tools).prompt)
        except Exception as error:  # a template may raise anything
            raise FileFormatError(f"{self._path}: its chat template refuses these messages: {error}") from error

    def ids(
        self, model: Model, messages: Sequence[dict[str, Any]], tools: Any = None, n_ctx: int | None = None
    ) -> list[int]:
        """Token ids of `text`, with BOS where the model wants one and the template has not written it; never empty.

        n_ctx: raise PromptTooLong for a large text that this context cannot hold, before it is split.
        """
        text = self.text(messages, tools)
        begun = bool(self._bos) and text.startswith(self._bos)
        tokens = model.tokenize(text, special=True, add_bos=not begun, n_ctx=n_ctx)
        return tokens or ([model.bos] if model.bos is not None else [])
