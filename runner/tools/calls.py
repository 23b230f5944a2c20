"""Calls of tools: the forms in which models write them, read out of an answer, and as grammars for forced calls.

A form says how calls are written, reads them, and writes a grammar of them in llguidance's dialect of Lark. A model has
the form that reads back the call which its own chat template writes.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamabase.errors import FileFormatError
from llamabase.llama.messages import for_template
from llamabase.llama.template import ChatTemplate
from llamabase.sampling.guidance import lark_guide

from .lark import ObjectSchema, Writer, types_of

PARTIAL = 8  # characters of the longest unfinished JSON token, `-Infinit`, which more text may still make a value
NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Call:
    """A function's name and its arguments, as JSON."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Tools:
    """The functions a request offers, with the schemas of their arguments.

    forced: names of those of which one must be called, if one must. strict: names of those whose calls must obey their
    schemas. several: whether an answer may hold more than one call.
    """

    schemas: Mapping[str, Any]
    forced: tuple[str, ...] = ()
    strict: frozenset[str] = frozenset()
    several: bool = True

    @property
    def enforced(self) -> bool:
        """Whether a grammar must see to the calls."""
        return bool(self.forced or self.strict)


class CallScanner:
    """Goes through a text part by part. `short`: it has looked past the end, so more text may change what is read."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.short = text, 0, False

    def take(self, literal: str) -> bool:
        """Go past a literal, in which a line's end stands for any white space; False if the text goes on otherwise."""
        start = self.at
        for i, part in enumerate(literal.split("\n")):
            if i:
                self.skip(_SPACE)
            if not self.text.startswith(part, self.at):
                self.short |= part.startswith(self.text[self.at :])
                self.at = start
                return False
            self.at += len(part)
        return True

    def skip(self, pattern: re.Pattern[str]) -> None:
        """Go past a pattern that also matches nothing."""
        if (match := pattern.match(self.text, self.at)) is not None:
            self.at = match.end()

    def ahead(self, characters: str) -> bool:
        """Whether one of these characters comes next."""
        self.short |= self.at >= len(self.text)
        return self.text[self.at : self.at + 1] in tuple(characters)

    def match(self, pattern: re.Pattern[str]) -> str:
        """Go past a pattern that something follows; empty if it is not there."""
        match = pattern.match(self.text, self.at)
        end = self.at if match is None else match.end()
        self.short |= end == len(self.text)
        if match is None or end == len(self.text):
            return ""
        self.at = end
        return match[0]

    def past(self, pattern: re.Pattern[str]) -> bool:
        """Go past a pattern that comes before the brace of an object; False if the text goes on otherwise."""
        if (match := pattern.match(self.text, self.at)) is None:
            self.short |= self.text.find("{", self.at) < 0
            return False
        self.at = match.end()
        return True

    def value(self) -> Any:
        """The JSON value that begins here. Raises ValueError, or RecursionError, if there is none."""
        try:
            value, self.at = _DECODER.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            self.short |= error.msg.startswith("Unterminated") or error.pos >= len(self.text) - PARTIAL
            raise
        return value


_SPACE = re.compile(r"\s*")
_SEPARATOR = re.compile(r"\s*[;,]?")  # Llama 3 writes semicolons between calls
_DECODER = json.JSONDecoder(strict=False)


@dataclass(frozen=True)
class Form(ABC):
    """How a model writes calls: in blocks that begin with `opening` and end with `last`.

    first: what comes before the first call of a block. joined: what separates two calls of a block; None if a block
    holds one call. apart: what separates two blocks; None if an answer has one block.
    """

    opening: str
    last: str = ""
    joined: str | None = None
    apart: str | None = None
    first: str = ""

    @property
    def many(self) -> bool:
        """Whether a block that is read may hold several calls."""
        return True

    @property
    def openings(self) -> tuple[str, ...]:
        """What a block may begin with; the first is the one the model was trained on."""
        return (self.opening,)

    def read(self, reader: CallScanner, tools: Tools) -> list[Call]:
        """The calls of the block that begins here, which the reader goes past; none if no block begins here."""
        opened = reader.take(self.opening)
        if not opened and len(self.openings) == 1:
            return []
        calls, end = list[Call](), reader.at
        while not calls or (self.many and opened):
            if calls:
                reader.skip(_SEPARATOR)
            try:
                more = self._calls(reader, tools)
            except (ValueError, RecursionError):
                break
            if not more:
                break
            calls, end = calls + more, reader.at
        reader.at = end
        if calls and opened and (closing := self.last.lstrip("]\n")):  # the bracket of a list was read with the list
            reader.take(f"\n{closing}")
        return calls

    @abstractmethod
    def _calls(self, reader: CallScanner, tools: Tools) -> list[Call]:
        """The call, or list of calls, that begins here; none, or ValueError, if there is none."""

    def block(self, writer: Writer, tools: Tools, names: Sequence[str]) -> str:
        """What follows the opening of a block, as an expression of Lark."""
        call = writer.one_of(self._written(writer, name, tools.schemas[name]) for name in names)
        more = "" if self.joined is None or not tools.several else f"({writer.literal(self.joined)} {call})*"
        return f"{writer.literal(self.first)} {call} {more} {writer.literal(self.last)}"

    @abstractmethod
    def _written(self, writer: Writer, name: str, schema: Any) -> str:
        """A call of one function as an expression of Lark."""


@dataclass(frozen=True)
class JsonForm(Form):
    """Objects of a name and arguments between two marks: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`.

    arguments: their key. loose: a form that models write besides their own; it makes a call only of a tool that was
    offered and is not strict.
    """

    arguments: str = "arguments"
    loose: bool = False

    @property
    def _marked(self) -> bool:
        """Whether the opening alone says that a call follows."""
        return bool(self.opening) and not self.loose

    def _calls(self, reader: CallScanner, tools: Tools) -> list[Call]:
        if self.loose:
            any(reader.take(word) for word in _LANGUAGES)
        reader.skip(_SPACE)
        if not reader.ahead("{[") or not (self._marked or _begins_call(reader)):
            return []
        value = reader.value()
        calls = [_json_call(item, self._marked) for item in (value if isinstance(value, list) else [value])]
        known = tools.schemas.keys() - (tools.strict if self.loose else ())
        return calls if self._marked or all(call.name in known for call in calls) else []

    def _written(self, writer: Writer, name: str, schema: Any) -> str:
        head = f'{{"name": {json.dumps(name)}, "{self.arguments}": '
        return f"{writer.literal(head)} {writer.arguments(schema)} {writer.literal('}')}"


_LANGUAGES = ("json", "tool_calls", "tool_call", "xml", "JSON")  # after a fence
_FIRST_KEY = re.compile(r'[\[{\s]*"(?:name|arguments|parameters|function|type|id)"\s*:')
_FIRST_KEY_PREFIX = re.compile(r'[\[{\s]*(?:"[a-z]*(?:"\s*)?)?')


def _begins_call(reader: CallScanner) -> bool:
    """Whether a value begins with one of a call's keys: other JSON is not held back any longer."""
    if _FIRST_KEY.match(reader.text, reader.at):
        return True
    prefix = _FIRST_KEY_PREFIX.match(reader.text, reader.at)
    reader.short |= prefix is not None and prefix.end() == len(reader.text)
    return False


def _json_call(item: Any, marked: bool) -> Call:
    """The call of an object with a name and arguments. Raises ValueError for anything else.

    Arguments may be left out if a mark says that it is a call.
    """
    if not isinstance(item, dict):
        raise ValueError("not an object")
    function = item.get("function")
    inner = function if isinstance(function, dict) else item
    name = inner.get("name", function)
    if not isinstance(name, str) or not name or not (marked or {"arguments", "parameters"} & inner.keys()):
        raise ValueError("not a call")
    return _call(name, inner.get("arguments", inner.get("parameters")))


def _call(name: str, arguments: Any) -> Call:
    """A call with arguments as models give them: an object, an object as text, or null for none."""
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments or "{}", strict=False)
        except (ValueError, RecursionError):
            return Call(name, arguments)
        if not isinstance(parsed, dict | None):
            return Call(name, arguments)
        arguments = parsed
    return Call(name, json.dumps({} if arguments is None else arguments, ensure_ascii=False))


@dataclass(frozen=True)
class Tags:
    """One argument: its key after `before`, and its value between `between` and `after`, with `pad` on either side.

    A value that may be text is written without quotes.
    """

    before: str
    between: str
    after: str
    pad: str = ""


@dataclass(frozen=True)
class NamedForm(Form):
    """A name between `before` and `between`, then its arguments, then `after`: `[TOOL_CALLS]name[ARGS]{...}`.

    The arguments are JSON, or each has tags of its own: `<function=NAME><parameter=KEY>value</parameter></function>`.
    separator: a pattern of all that is read between name and arguments, if that is more than `between`.
    """

    before: str = ""
    between: str = ""
    after: str = ""
    separator: str = ""
    tags: Tags | None = None

    @property
    def many(self) -> bool:
        return bool(self.last)

    @property
    def openings(self) -> tuple[str, ...]:
        inner = self.before.lstrip()
        return (self.opening, inner) if self.tags and inner else (self.opening,)  # the outer tag is often forgotten

    def _calls(self, reader: CallScanner, tools: Tools) -> list[Call]:
        if not reader.take(f"\n{self.before}") or not (name := reader.match(NAME)):
            return []
        if not (reader.past(re.compile(self.separator)) if self.separator else reader.take(self.between)):
            return []
        if self.tags is None:
            reader.skip(_SPACE)
            call = _call(name, reader.value())
            reader.take(f"\n{self.after}" if self.after else "")
            return [call]
        arguments = self._tagged(reader, self.tags, ObjectSchema(tools.schemas.get(name)))
        end = reader.at
        if arguments is None or not reader.take(f"\n{self.after or self.last}"):
            return []
        if not self.after:
            reader.at = end
        return [_call(name, arguments)]

    def _tagged(self, reader: CallScanner, tags: Tags, schema: ObjectSchema) -> dict[str, Any] | None:
        """All arguments; None if one has no end."""
        arguments = dict[str, Any]()
        follows = "|".join(re.escape(mark.lstrip()) for mark in (tags.before, self.after or self.last))
        ends = re.compile(rf"{re.escape(tags.after)}\s*(?:{follows})")
        while reader.take(f"\n{tags.before}"):
            if not (key := reader.match(_KEY)) or not reader.take(tags.between):
                return None
            if (end := ends.search(reader.text, reader.at)) is None:
                reader.short = True
                return None
            value = reader.text[reader.at : end.start()].removeprefix(tags.pad).removesuffix(tags.pad)
            arguments[key] = typed(value, schema.types(key))
            reader.at = end.start() + len(tags.after)
        return arguments

    def _written(self, writer: Writer, name: str, schema: Any) -> str:
        _require_readable(NAME, [name], "a function")
        head, tail = writer.literal(self.before + name + self.between), writer.literal(self.after)
        if self.tags is None:
            return f"{head} {writer.arguments(schema)} {tail}"
        tags, described, parts = self.tags, ObjectSchema(schema), list[str]()
        described.require_listed()
        _require_readable(_KEY, described.keys, f"a property of {name}")
        for key in described.keys:
            opened = writer.literal(tags.before + key + tags.between + tags.pad)
            part = f"{opened} {writer.value(described, key, tags.pad + tags.after)}"
            parts.append(part if key in described.required else f"({part})?")
        return " ".join([head, *parts, tail])


_KEY = re.compile(r"[^<>\"\n]+")


def _require_readable(pattern: re.Pattern[str], names: Iterable[str], what: str) -> None:
    """Raise FileFormatError for a name that could be written in a form, but not read back from it."""
    for name in names:
        if not pattern.fullmatch(name):
            raise FileFormatError(
                f"{name[:100]!r}, the name of {what}, cannot be read back in the form in which this model writes "
                "calls; rename it"
            )


def typed(text: str, types: set[str] | None) -> Any:
    """The value of an argument that may be one of these types of JSON, and that has no quotes if it is text."""
    if types == {"string"}:
        return text
    try:
        value = _PYTHON[text.strip()] if text.strip() in _PYTHON else json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return text
    return value if types is None or "string" not in types or types_of(value) & types else text


_PYTHON = {"True": True, "False": False, "None": None}  # as Jinja's `string` filter writes what JSON calls otherwise


HERMES = JsonForm("<tool_call>", "\n</tool_call>", apart="\n", first="\n")
BARE = JsonForm("", arguments="parameters")  # Llama 3

# A line's end in a mark is written as it is, and read as any white space.
# The first form that reads the call in what a template writes is the model's.
FORMS: tuple[Form, ...] = (
    HERMES,
    NamedForm(  # Qwen3-Coder, Qwen3.5, Nemotron 3, Step 3.5
        "<tool_call>", "\n</tool_call>", apart="\n", before="\n<function=", between=">", after="\n</function>",
        tags=Tags("\n<parameter=", ">", "</parameter>", "\n"),
    ),
    NamedForm(  # GLM 4.5 and later
        "<tool_call>", "\n</tool_call>", apart="\n", between="\n",
        tags=Tags("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>"),
    ),
    NamedForm(  # Seed-OSS
        "<seed:tool_call>", "\n</seed:tool_call>", apart="\n", before="\n<function=", between=">",
        after="\n</function>", tags=Tags("\n<parameter=", ">", "</parameter>"),
    ),
    NamedForm(  # MiniMax-M2
        "<minimax:tool_call>", "\n</minimax:tool_call>", apart="\n", before='\n<invoke name="', between='">',
        after="\n</invoke>", tags=Tags('\n<parameter name="', '">', "</parameter>"),
    ),
    JsonForm("[TOOL_CALLS]", "]", ", ", first="["),  # Mistral up to Nemo
    NamedForm(  # Mistral from Small 3.1 on
        "[TOOL_CALLS]", apart="", between="[ARGS]", separator=r"(?:\[CALL_ID\]\w*)?\[ARGS\]",
    ),
    NamedForm("<function=", apart="", between=">", after="</function>"),  # Functionary 3.1
    NamedForm(  # DeepSeek V3.1
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "",
        before="<｜tool▁call▁begin｜>", between="<｜tool▁sep｜>", after="<｜tool▁call▁end｜>",
    ),
    NamedForm(  # DeepSeek R1 and V3
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "",
        before="<｜tool▁call▁begin｜>function<｜tool▁sep｜>", between="\n```json\n", after="\n```<｜tool▁call▁end｜>",
    ),
    NamedForm(  # Kimi K2
        "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "", before="<|tool_call_begin|>functions.",
        between=":0<|tool_call_argument_begin|>", after="<|tool_call_end|>",
        separator=r":\d+<\|tool_call_argument_begin\|>",
    ),
    JsonForm("<TOOLCALL>", "]</TOOLCALL>", ", ", first="["),  # Nemotron Nano 2
    JsonForm("<tool_calls>", "]</tool_calls>", ", ", first="["),  # Apriel, MiniMax-M1
    JsonForm("<|tool_call|>", "]", ", ", first="["),  # Granite 3
    JsonForm("<|function_call|>"),  # GigaChat 3.1
    BARE,
)  # fmt: skip

# What models write besides their own form: Qwen2.5-Coder the first two, Llama 3 the tag of its tools.
LOOSE: tuple[Form, ...] = (
    JsonForm("```", "```", loose=True),
    JsonForm("<tools>", "</tools>", loose=True),
    JsonForm("<|python_tag|>", loose=True),
    JsonForm("<tool_call>", "</tool_call>", loose=True),
    JsonForm("", loose=True),
)


def form_of(template: ChatTemplate) -> Form:
    """The form in which a template writes a call; else one whose opening is in its source; else Hermes'."""
    name, arguments = "probe_function", {"probe": "found"}
    parameters = {"type": "object", "properties": {"probe": {"type": "string"}}, "required": ["probe"]}
    tools = [{"type": "function", "function": {"name": name, "description": "Probes.", "parameters": parameters}}]
    call = {"id": "probe0000", "type": "function", "function": {"name": name, "arguments": arguments}}
    asked = [{"role": "user", "content": "?"}]
    answer = for_template({"role": "assistant", "tool_calls": [call]})
    try:
        before = template.text(asked, tools, answered=True)
        after = template.text([*asked, answer], tools, answered=True)
    except FileFormatError:
        before = after = ""
    tail = after[len(os.path.commonprefix([before, after])) :]  # noqa: RUF071 (characters of texts are meant)
    for form in FORMS:
        for opening in re.finditer(re.escape(form.opening or "{"), tail):
            calls = form.read(CallScanner(tail[opening.start() :]), Tools({name: parameters}))
            if calls == [Call(name, json.dumps(arguments))]:
                return form
    return next((form for form in FORMS if form.opening and form.opening in template.tool_source), HERMES)


_BLANK = r"[ \n]{0,2}"
_NO_JSON = r"(?s:[ \n]*([^\s{\[].*)?)"  # a text that does not begin as JSON does


def guide_of(form: Form, tools: Tools, controls: Mapping[str, int], thinking: bool) -> str:
    """The guide (`guidance`) of an answer that must hold a call, or in which calls of strict functions obey.

    controls: ids of control tokens by name. thinking: the answer begins within `<think>`, which is left to the model.
    Raises FileFormatError for a schema that this form of calls cannot enforce.
    """
    tried = lark_of(form, tools, {}, thinking)
    return lark_guide(lark_of(form, tools, controls, thinking) if controls else tried, tried)


def lark_of(form: Form, tools: Tools, controls: Mapping[str, int], thinking: bool) -> str:
    """The grammar of `guide_of` in Lark."""
    writer, opening = Writer(controls), form.opening
    block = form.block(writer, tools, tools.forced or tuple(tools.schemas))
    if tools.forced:
        call = f"{writer.literal(opening)} {block}"
        more = "" if form.apart is None or not tools.several else f"({writer.literal(form.apart)} {call})*"
        before = f"{writer.until('</think>')} {writer.text(_BLANK)}" if thinking else ""
        start = f"{before} {call} {more}"
    elif not opening:
        start = f"{block} | {writer.text(_NO_JSON)}"
    else:
        many = "*" if tools.several else "?"
        if opening in controls:
            text = writer.free(form.openings)  # nor may it spell the token out
            start = f"{text} ({writer.literal(opening)} {block} {text}){many}"
        else:
            start = f"({writer.free(form.openings, opening)} {block}){many} {writer.free(form.openings)}"
    return "\n".join([f"start: {start}", *writer.rules])


def control_tokens(form: Form, named: Mapping[str, int]) -> dict[str, int]:
    """Of the control tokens by name, those with which a model of this form writes calls."""
    marks = repr([form, *LOOSE]).replace("\\", "")  # patterns escape them
    return {name: i for name, i in named.items() if len(name) > 2 and name in marks}
