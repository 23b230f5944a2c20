"""JSON schemas and forms of tool calls, obeyed exactly: llguidance says which tokens may come next.

A keyword that it cannot enforce is refused by name. A guide is first compiled in another process (`worker`).
llguidance is imported only when it is needed: it takes some 8 MB and 20 ms.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import llama_cpp
import numpy as np

from llamabase.errors import FileFormatError, SettingError
from llamabase.llama.model import Model

from . import compiling
from .worker import LIMITS, Worker, WorkerEnded

# Between two parts of JSON there may be a space, or a line's end and an indent, as in llama.cpp's own grammars of
# schemas: a model that may write any white space may write it for ever.
WHITESPACE = r" |\n{1,2}[ \t]{0,20}"
# Letters after a backslash. Each character has one spelling, or a listed property spelt otherwise would pass for
# another one.
ESCAPES = '"\\bfnrt'
_WORKER = Worker(compiling.__name__)

# Keywords by which several schemas describe one object, and those that say which properties it has.
_COMBINING = {"allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "if", "dependentSchemas", "unevaluatedProperties"}
_LISTING = {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"}
# Keywords that hold a schema, a list of schemas, and schemas by name.
_ONE = ("items", "additionalProperties", "additionalItems")
_LISTS = ("prefixItems", "items", "anyOf", "oneOf", "allOf")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")


def schema_guide(schema: str) -> str:
    """The guide of a JSON schema, given as its text.

    Raises FileFormatError for what is not JSON, and for a keyword that cannot be enforced, which it names.
    """
    try:
        form = json.loads(schema)
        json.dumps(form, allow_nan=False)  # Python reads numbers that JSON does not have
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"the JSON schema is not JSON: {error}") from error
    if not isinstance(form, dict | bool):
        raise FileFormatError("the JSON schema is not an object, true or false")
    if form is False:
        raise FileFormatError("the JSON schema is false, which no answer obeys")
    return _tried("json_schema", prepared({} if form is True else form), "the JSON schema")


def prepared(form: dict[str, Any]) -> dict[str, Any]:
    """A schema, changed in place, with objects and white space bounded."""
    schemas = list(_schemas(form))
    if not any(map(_combines, schemas)):
        for each in schemas:
            _close(each)
    # The schema's own settings could loosen it.
    form["x-guidance"] = {"whitespace_pattern": WHITESPACE, "json_allowed_escapes": ESCAPES}
    return form


def lark_guide(lark: str, tried: str = "") -> str:
    """The guide of a grammar in llguidance's dialect of Lark, which may hold JSON schemas.

    tried: the same with text in place of control tokens, which only the model's own vocabulary knows; this is what the
    worker compiles. Raises FileFormatError as `schema_guide` does.
    """
    _tried("lark_grammar", tried or lark, "the form of the answer")
    return _guide("lark_grammar", lark)


def _guide(kind: str, form: Any) -> str:
    return json.dumps({"grammars": [{kind: form}]})


def _tried(kind: str, form: Any, what: str) -> str:
    """The guide, if it compiles and some first token is possible. Raises FileFormatError with the reason."""
    guide = _guide(kind, form)
    try:
        reason = _reason_against(guide)
    except WorkerEnded as error:
        raise FileFormatError(f"{what} takes over {LIMITS} to compile; simplify it") from error
    if reason:
        raise FileFormatError(f"{what} cannot be obeyed: {reason}")
    return guide


@lru_cache(maxsize=64)
def _reason_against(guide: str) -> str:
    return _WORKER.call(compiling.reason_against, guide)


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all schemas in it. Constants and examples hold none."""
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
    combining, all_of = _COMBINING & schema.keys(), schema.get("allOf")
    if combining == {"allOf"}:
        alone = isinstance(all_of, list) and len(all_of) == 1
    else:
        alone = len(combining) == 1 and combining <= {"anyOf", "oneOf", "$ref"}
    return bool(combining) and not (alone and not _LISTING & schema.keys())


def _close(schema: dict[str, Any]) -> None:
    """An object that lists its properties has no others unless the schema says so, as in llama.cpp's grammars."""
    listed, required = schema.get("properties"), schema.get("required", [])
    if not _LISTING & schema.keys() <= {"properties", "required"}:
        return
    named = isinstance(required, list) and all(isinstance(name, str) for name in required)
    if isinstance(listed, dict) and listed and named and set(required) <= listed.keys():
        schema["additionalProperties"] = False


class _Vocabulary:
    """A model's vocabulary for llguidance; control tokens stand for no text. It takes one to three seconds to make."""

    bos_token_id = None

    def __init__(self, model: Model) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        ids = range(model.n_vocab)
        self.ends = [token for token in ids if llama_cpp.llama_vocab_is_eog(model.vocab, token)]
        self.eos_token_id = self.ends[0] if self.ends else model.n_vocab
        self.tokens = [model.piece(token, special=True) for token in ids]
        attributes = [llama_cpp.llama_vocab_get_attr(model.vocab, token) for token in ids]
        self.special_token_ids = [i for i in ids if attributes[i] & llama_cpp.LLAMA_TOKEN_ATTR_CONTROL]
        self._model = weakref.proxy(model)  # llguidance keeps this object
        self.tokenizer = LLTokenizer(TokenizerWrapper(self), eos_token=self.ends)

    def __call__(self, text: bytes) -> list[int]:
        ids: list[int] = self._model.tokenize(text.decode("utf-8", "replace"), special=False, add_bos=False)
        return ids


_VOCABULARIES: weakref.WeakKeyDictionary[Model, _Vocabulary] = weakref.WeakKeyDictionary()


class Guide:
    """A guide, and the place that a text has reached in it.

    Raises SettingError for a guide that does not compile, and if a later step exceeds its limits.
    """

    def __init__(self, model: Model, source: str) -> None:
        from llguidance import LLMatcher

        if model not in _VOCABULARIES:
            _VOCABULARIES[model] = _Vocabulary(model)
        vocabulary = _VOCABULARIES[model]
        self._ends = vocabulary.ends
        self._n_vocab = model.n_vocab
        self._matcher = LLMatcher(vocabulary.tokenizer, source, log_level=0, limits=compiling.limits())
        self._mask: np.ndarray | None = None  # a bit for each token
        self._require()

    def allowed(self, ids: np.ndarray) -> np.ndarray:
        """Which of these tokens may come next (bool). An end token may if the text is complete."""
        if len(ids) == 1 and int(ids[0]) not in self._ends:  # takes a hundredth of the time of a mask
            return np.array([self.fitting(ids.tolist()) == 1])
        if self._mask is None:
            self._mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._require()
        if len(ids) == self._n_vocab:
            return np.unpackbits(self._mask, count=self._n_vocab, bitorder="little").view(bool)
        allowed: np.ndarray = self._mask[ids >> 3] >> (ids & 7) & 1 == 1
        return allowed

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
