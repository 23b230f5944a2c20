"""Grammars: llama.cpp's own grammar sampler, which says what may come next of a text that obeys a GBNF."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_grammar import SchemaConverter

from .errors import FileFormatError, SettingError
from .llama import LAST_ERRORS, Model, Owner, Tokens, last_error

_PARSING = threading.Lock()  # there is one stderr
_PARTS = re.compile(
    r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^]\\])*\]|#.*|[()]'
)  # literals, classes, comments; what is left nests
DEEPEST = 4000  # llama.cpp's parser calls itself for every parenthesis: some ten thousand overflow the stack


class Grammar(Owner):
    """A GBNF grammar and the place that a text has reached in it. The start symbol is `root`.

    Raises SettingError with llama.cpp's reason where the grammar does not parse.
    """

    def __init__(self, model: Model, text: str) -> None:
        self._sampler = None
        try:
            source = text.encode()
        except UnicodeEncodeError as error:  # bytes of an argument that were no UTF-8
            raise SettingError(f"the grammar cannot be used: it is not text in UTF-8: {error.reason}") from error
        if b"\0" in source:
            raise SettingError(r"the grammar cannot be used: llama.cpp would read it up to its NUL; write \x00")
        if _depth(text) > DEEPEST:
            raise SettingError(
                f"the grammar cannot be used: its parentheses nest more than {DEEPEST} deep, which would overflow "
                "llama.cpp's stack; repeat less (maxLength and maxItems of a JSON schema nest as deep)"
            )
        with _PARSING, _stderr() as said:
            LAST_ERRORS.clear()
            self._sampler = llama_cpp.llama_sampler_init_grammar(model.vocab, source, b"root")
        if not self._sampler:
            raise SettingError(f"the grammar cannot be used: {_reason(said) or last_error()}; correct it")

    @property
    def handle(self) -> Any:
        """llama.cpp's sampler: it takes the probability of what may not come. An end may where the text is complete."""
        return self._sampler

    def accept(self, token: int) -> None:
        """Go on by a token. Raises ValueError for one that is not allowed: llama.cpp would end the process on it."""
        tokens = Tokens.of(np.array([token]), np.zeros(1))
        tokens.apply(self._sampler)
        if tokens.left["logit"][0] != 0:
            raise ValueError(f"the grammar does not allow token {token} here")
        llama_cpp.llama_sampler_accept(self._sampler, token)

    def close(self) -> None:
        if self._sampler is not None:
            llama_cpp.llama_sampler_free(self._sampler)
            self._sampler = None


def _depth(grammar: str) -> int:
    """How deep its parentheses nest."""
    return max(accumulate({"(": 1, ")": -1}.get(part, 0) for part in _PARTS.findall(grammar)), default=0)


# Of JSON Schema, what the converter would pass over in silence.
_LOST = {
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "uniqueItems", "contains"),
    *("minProperties", "maxProperties", "patternProperties", "propertyNames", "dependentRequired", "dependentSchemas"),
    *("not", "if", "then", "else"),
}


class _Converter(SchemaConverter):  # type: ignore[misc]
    """llama-cpp-python's, with three of its faults mended."""

    def visit(self, schema: Any, name: str) -> str:
        """A rule for what it can say; ValueError for what it would leave out."""
        if isinstance(schema, dict):
            if lost := sorted(_LOST & schema.keys()):
                raise ValueError(f"llama-cpp-python cannot express {', '.join(lost)}")
            for least, most in (("minLength", "maxLength"), ("minItems", "maxItems")):
                if schema.get(least, 0) > schema.get(most, math.inf):
                    raise ValueError(f"{least} is greater than {most}")
                for bound in (least, most):
                    if schema.get(bound, 0) > DEEPEST:  # written out it takes gigabytes, and llama.cpp takes none of it
                        raise ValueError(f"{bound} is more than {DEEPEST}")
        return str(super().visit(schema, name))

    def _add_rule(self, name: str, rule: str) -> str:
        """JSON has no raw control characters inside a string."""
        return str(super()._add_rule(name, rule.replace(r'[^"\\]', r'[^"\\\x00-\x1F\x7F]') if name == "char" else rule))

    def _format_literal(self, literal: str) -> str:
        """A piece of JSON as a GBNF literal: a backslash in it is one, and letters beyond ASCII stay letters."""
        text = json.dumps(json.loads(literal), ensure_ascii=False)
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def schema_grammar(schema: str) -> str:
    """The GBNF of a JSON schema (its text). Raises FileFormatError where it is none, or asks for what GBNF lacks."""
    try:
        converter = _Converter(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
        found = json.loads(schema)
        if found is True:  # anything at all
            found = {}
        if "$ref" in found:  # beside which the converter would not see the definitions that it refers to
            found = {"anyOf": [{"$ref": found.pop("$ref")}], **found}
        converter.visit(converter.resolve_refs(found, "schema"), "")
        return str(converter.format_grammar())
    except json.JSONDecodeError as error:
        raise FileFormatError(f"the JSON schema is not JSON: {error}") from error
    except Exception as error:  # the converter asserts, and trips over what it does not expect
        reason = str(error) or type(error).__name__
        raise FileFormatError(f"the JSON schema has no grammar: {reason}; simplify it or give a grammar") from error


@contextlib.contextmanager
def _stderr() -> Iterator[list[str]]:
    """What C code prints to stderr meanwhile, line by line: llama.cpp's parser says there what is wrong."""
    said: list[str] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        kept = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said += file.read().splitlines()


def _reason(said: list[str]) -> str:
    """Of `parse: error parsing grammar: REASON`, a blank line and the whole grammar: the reason."""
    return said[0].partition("error parsing grammar: ")[2].strip() if said else ""
