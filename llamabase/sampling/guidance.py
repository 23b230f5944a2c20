"""JSON schemas and forms of tool calls, obeyed exactly: llguidance says what may come next of a text.

A keyword that it cannot enforce is refused by name. Compiling is first tried in another process (`worker`).
llguidance is imported when it is first needed: it adds some 8 MB and 20 ms.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import llama_cpp
import numpy as np

from llamabase.errors import FileFormatError, SettingError
from llamabase.llama.model import Model

from .compiling import limits, reason_against
from .worker import LIMITS, Worker, WorkerEnded

# Between two parts of JSON there may be a space, or a line's end and an indent, as in llama.cpp's own grammars of
# schemas: a model that may write any white space may write it for ever.
WHITESPACE = r" |\n{1,2}[ \t]{0,20}"
# Letters after a backslash. There is one way to write each character: spelt otherwise, the name of a listed property
# would pass for another one.
ESCAPES = '"\\bfnrt'
_WORKER = Worker()  # not that of grammars, which is lost with a schema that ends it

# Keywords by which several schemas describe one object, and those that say which properties it has.
_COMBINING = {"allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "if", "dependentSchemas", "unevaluatedProperties"}
_LISTING = {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"}
# Keywords that hold a schema, a list of them, and schemas by name.
_ONE = ("items", "additionalProperties", "additionalItems")
_LISTS = ("prefixItems", "items", "anyOf", "oneOf", "allOf")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")


def schema_guide(schema: str) -> str:
    """The guide of a JSON schema, given as its text.

    Raises FileFormatError for what is not JSON, and for a keyword that cannot be enforced, which it names.
    """
    try:
        found = json.loads(schema)
        json.dumps(found, allow_nan=False)  # Python reads numbers that JSON has not
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"the JSON schema is not JSON: {error}") from error
    if not isinstance(found, dict | bool):
        raise FileFormatError("the JSON schema is not an object, true or false")
    if found is False:
        raise FileFormatError("the JSON schema is false, which no answer obeys")
    form = prepared({} if found is True else found)
    return _tried(json.dumps({"grammars": [{"json_schema": form}]}), "the JSON schema")


def prepared(form: dict[str, Any]) -> dict[str, Any]:
    """A schema, changed in place, in which objects and white space are bounded."""
    schemas = list(_schemas(form))
    if not any(_combines(each) for each in schemas):
        for each in schemas:
            _close(each)
    # Of the schema's own settings none may loosen it.
    form["x-guidance"] = {"whitespace_pattern": WHITESPACE, "json_allowed_escapes": ESCAPES}
    return form


def lark_guide(lark: str, tried: str = "") -> str:
    """The guide of a grammar in llguidance's dialect of Lark, which may hold JSON schemas.

    tried: the same with text in place of control tokens, which only the model's own vocabulary knows; it is what is
    compiled first. Raises FileFormatError as `schema_guide` does.
    """
    _tried(json.dumps({"grammars": [{"lark_grammar": tried or lark}]}), "the form of the answer")
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all in it; what stands in constants and examples is none."""
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if not isinstance(each, dict):
            continue
        yield each
        waiting += [each[key] for key in _ONE if key in each]
        waiting += [one for key in _LISTS if isinstance(each.get(key), list) for one in each[key]]
        waiting += [one for key in _NAMED if isinstance(each.get(key), dict) for one in each[key].values()]


def _combines(schema: dict[str, Any]) -> bool:
    """Whether another schema may name more properties of the same object."""
    found = _COMBINING & schema.keys()
    all_of = schema.get("allOf")
    alone = found <= {"anyOf", "oneOf", "$ref"} or (
        found == {"allOf"} and isinstance(all_of, list) and len(all_of) == 1
    )
    return bool(found) and not (alone and len(found) == 1 and not _LISTING & schema.keys())


def _close(schema: dict[str, Any]) -> None:
    """An object whose properties are listed has no others unless the schema says so, as in llama.cpp's grammars."""
    listed, required = schema.get("properties"), schema.get("required", [])
    if not _LISTING & schema.keys() <= {"properties", "required"}:
        return
    named = isinstance(required, list) and all(isinstance(name, str) for name in required)
    if isinstance(listed, dict) and listed and named and set(required) <= listed.keys():
        schema["additionalProperties"] = False


@lru_cache(maxsize=64)
def _tried(guide: str, what: str) -> str:
    """The guide itself, if it compiles and some first token is possible. Raises FileFormatError with the reason."""
    try:
        reason = _WORKER.call(reason_against, guide)
    except WorkerEnded as error:
        raise FileFormatError(f"{what} takes over {LIMITS} to compile; simplify it") from error
    if reason:
        raise FileFormatError(f"{what} cannot be obeyed: {reason}")
    return guide


class _Tokens:
    """The vocabulary as llguidance asks for it. Control tokens stand for no text."""

    def __init__(self, model: Model) -> None:
        self.ends = [token for token in range(model.n_vocab) if llama_cpp.llama_vocab_is_eog(model.vocab, token)]
        self.tokens = [model.piece(token, special=True) for token in range(model.n_vocab)]
        attributes = [llama_cpp.llama_vocab_get_attr(model.vocab, token) for token in range(model.n_vocab)]
        self.special_token_ids = [
            token for token, attribute in enumerate(attributes) if attribute & llama_cpp.LLAMA_TOKEN_ATTR_CONTROL
        ]
        self.bos_token_id = None
        self.eos_token_id = self.ends[0] if self.ends else model.n_vocab
        self._model = model

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._model.tokenize(text, special=False, add_bos=False)


_TOKENIZERS: WeakKeyDictionary[Model, tuple[Any, list[int]]] = WeakKeyDictionary()


def _tokenizer(model: Model) -> tuple[Any, list[int]]:
    """(llguidance's tokenizer, ids of the end tokens) of a model; it takes a second or three, once."""
    if model not in _TOKENIZERS:
        from llguidance import LLTokenizer, TokenizerWrapper

        tokens = _Tokens(model)
        tokenizer = LLTokenizer(TokenizerWrapper(tokens), eos_token=tokens.ends)
        _TOKENIZERS[model] = tokenizer, tokens.ends
    return _TOKENIZERS[model]


class Guide:
    """A guide, and the place that a text has reached in it.

    Raises SettingError for one that does not compile and, later, where a step of it takes more than its limits.
    """

    def __init__(self, model: Model, source: str) -> None:
        from llguidance import LLMatcher

        tokenizer, self._ends = _tokenizer(model)
        self._n_vocab = model.n_vocab
        self._matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits())
        self._mask: np.ndarray | None = None  # a bit for each token
        self._require()

    def allowed(self, ids: np.ndarray) -> np.ndarray:
        """Which of these tokens may come next (bool). An end may where the text is complete."""
        if len(ids) == 1 and int(ids[0]) not in self._ends:  # a hundredth of the time of a mask
            return np.array([self.fitting(ids.tolist()) == 1])
        if self._mask is None:
            self._mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._require()
        if len(ids) == self._n_vocab:
            return np.unpackbits(self._mask, count=self._n_vocab, bitorder="little").view(bool)
        masked: np.ndarray = self._mask[ids >> 3] >> (ids & 7) & 1 == 1
        return masked

    def fitting(self, drafts: list[int]) -> int:
        """How many of the drafts, from the first on, may come: the others need no verifying."""
        return int(self._matcher.validate_tokens(drafts))

    def accept(self, token: int) -> None:
        """Go on by a token. Raises ValueError for one that is not allowed."""
        if token in self._ends and self._matcher.is_accepting():
            return  # the text ends, or goes on as if it had not
        if not self._matcher.validate_tokens([token]):
            raise ValueError(f"the answer's form does not allow token {token} here")
        self._matcher.consume_token(token)
        self._mask = None
        self._require()

    def _require(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            raise SettingError(f"the form of the answer cannot be followed: {reason}; simplify it")
