"""Calls of tools: the forms in which models write them, read out of an answer, and as grammars for forced calls.

Each form says how a call opens, reads one from a text, and writes a grammar in llguidance's dialect of Lark. Which one
a model has is found out by reading back what its own chat template makes of a call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llamabase.errors import FileFormatError
from llamabase.llama.template import ChatTemplate
from llamabase.sampling.guidance import lark_guide
from runner.loop.stops import first_of

from .grammar import ObjectSchema, Writer, types_of

GROWTH = 16  # What may become a call is read again once it has grown by this part of its length.
PARTIAL = 8  # characters: the longest unfinished JSON token, `-Infinit`, of which more text may still make a value
NAME = re.compile(r"[\w.-]+")


class Incomplete(Exception):
    """A text that may become a call as it goes on."""


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


class Form(Protocol):
    """How a model writes calls. A block holds one or more of them."""

    @property
    def openings(self) -> tuple[str, ...]:
        """What a block begins with."""

    @property
    def apart(self) -> str | None:
        """What stands between two blocks; None if an answer has only one."""

    def read(self, text: str, tools: Tools, ended: bool) -> tuple[list[Call], int] | None:
        """(calls, length) of the block that a text begins with; None if it is no call.

        Raises Incomplete if what follows may decide, which it cannot once the answer has `ended`.
        """

    def block(self, writer: Writer, tools: Tools, names: Sequence[str]) -> str:
        """A block as an expression of Lark."""


class _Reader:
    """Goes through a text piece by piece; a piece that is missing at the end of the text may still come."""

    def __init__(self, text: str, ended: bool) -> None:
        self.text, self.at, self._ended = text, 0, ended

    def take(self, literal: str) -> bool:
        """Go past a literal, in which a line's end stands for any white space; False if it is not there."""
        start = self.at
        for i, part in enumerate(literal.split("\n")):
            if i:
                self.skip()
            if not self.text.startswith(part, self.at):
                if part.startswith(self.text[self.at : self.at + len(part)]) and self.at + len(part) > len(self.text):
                    self.missing()
                self.at = start
                return False
            self.at += len(part)
        return True

    def skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.text, self.at)
        if found is not None and found.end() < len(self.text):
            self.at = found.end()
            return found
        if found is not None or self.at >= len(self.text):
            self.missing()
        return None

    def past(self, pattern: re.Pattern[str]) -> bool:
        """Go past a pattern that stands before the brace of an object; False if it does not."""
        if (found := pattern.match(self.text, self.at)) is None:
            if self.text.find("{", self.at) < 0:
                self.missing()
            return False
        self.at = found.end()
        return True

    def missing(self) -> None:
        if not self._ended:
            raise Incomplete

    def value(self) -> Any:
        """The JSON value that begins here. Raises ValueError if there is none."""
        try:
            found, self.at = _DECODER.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            if error.msg.startswith("Unterminated") or error.pos >= len(self.text) - PARTIAL:
                self.missing()
            raise
        except RecursionError as error:
            raise ValueError("nests too deep") from error
        return found


_DECODER = json.JSONDecoder(strict=False)


def _require_readable(pattern: re.Pattern[str], names: Iterable[str], what: str) -> None:
    """Raise FileFormatError for a name that could be written in a form, and not be read back from it."""
    for name in names:
        if not pattern.fullmatch(name):
            raise FileFormatError(
                f"{name[:100]!r}, the name of {what}, cannot be read back in the form in which this model writes "
                "calls; rename it"
            )


def _call(name: Any, arguments: Any) -> Call | None:
    """A call of arguments as models give them: an object, an object as text, or null for none."""
    if not isinstance(name, str) or not name:
        return None
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments or "{}", strict=False)
        except (ValueError, RecursionError):
            return Call(name, arguments)
        arguments = parsed if isinstance(parsed, dict | None) else arguments
    if arguments is None:
        arguments = {}
    return Call(name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


def _calls_of(value: Any, marked: bool) -> list[Call]:
    """Of an object with a name and arguments, or a list of such; none for anything else.

    Arguments may be left out if a mark says that it is a call.
    """
    found = []
    for said in value if isinstance(value, list) else [value]:
        if not isinstance(said, dict):
            return []
        function = said.get("function")
        inner = function if isinstance(function, dict) else said
        name = inner.get("name", function)
        if not marked and not {"arguments", "parameters"} & inner.keys():
            return []
        call = _call(name, inner.get("arguments", inner.get("parameters")))
        if call is None:
            return []
        found.append(call)
    return found


@dataclass(frozen=True)
class JsonForm:
    """Objects of a name and arguments between two marks: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`.

    listed: they stand in a list. loose: it is not what the model was trained on, but what it also writes; it is a call
    only if it names a tool that was offered.
    """

    opening: str
    closing: str = ""
    arguments: str = "arguments"
    listed: bool = False
    loose: bool = False

    @property
    def openings(self) -> tuple[str, ...]:
        return (self.opening,)

    def read(self, text: str, tools: Tools, ended: bool) -> tuple[list[Call], int] | None:
        reader, found = _Reader(text, ended), list[Call]()
        if not reader.take(self.opening):
            return None
        end = reader.at
        if self.loose:
            any(reader.take(word) for word in _LANGUAGES)
        while True:
            reader.skip()
            if found and text[reader.at : reader.at + 1] in (";", ","):  # as Llama 3 parts them
                reader.at += 1
                reader.skip()
            if reader.at >= len(text):
                reader.missing()
                break
            if text[reader.at] not in "{[" or not (self._marked or _begins_call(reader)):
                break
            try:
                calls = _calls_of(reader.value(), self._marked)
            except ValueError:
                break
            if not calls or not all(self._known(call.name, tools) for call in calls):
                break
            found += calls
            end = reader.at
        if not found:
            return None
        reader.at = end
        if self.closing:
            reader.take("\n" + self.closing)
        return found, reader.at

    @property
    def _marked(self) -> bool:
        """Whether the opening alone says that a call follows."""
        return bool(self.opening) and not self.loose

    def _known(self, name: str, tools: Tools) -> bool:
        """Whether a name makes a call."""
        return self._marked or (name in tools.schemas and not (self.loose and name in tools.strict))

    @property
    def apart(self) -> str | None:
        return "\n" if self.closing and not self.listed else None

    def block(self, writer: Writer, tools: Tools, names: Sequence[str]) -> str:
        head, middle = '{"name": "', f'", "{self.arguments}": '
        one = writer.one_of(
            f"{writer.literal(head + json.dumps(name)[1:-1] + middle)} {writer.arguments(tools.schemas[name])} "
            + writer.literal("}")
            for name in names
        )
        if self.listed:
            more = f"({writer.literal(', ')} {one})*" if tools.several else ""
            return f"{writer.literal('[')} {one} {more} {writer.literal(']' + self.closing)}"
        pad = "\n" if self.closing else ""
        return f"{writer.literal(pad)} {one} {writer.literal(pad + self.closing)}"


_LANGUAGES = ("json", "tool_calls", "tool_call", "xml", "JSON")  # after a fence
_FIRST_KEY = re.compile(r'[\[{\s]*"(?:name|arguments|parameters|function|type|id)"\s*:')
_FIRST_KEY_PREFIX = re.compile(r'[\[{\s]*(?:"[a-z]*(?:"\s*)?)?')


def _begins_call(reader: _Reader) -> bool:
    """Whether a value begins with one of a call's keys: other JSON is not held back any longer."""
    if _FIRST_KEY.match(reader.text, reader.at):
        return True
    if (begun := _FIRST_KEY_PREFIX.match(reader.text, reader.at)) is not None and begun.end() == len(reader.text):
        reader.missing()
    return False


@dataclass(frozen=True)
class NamedForm:
    """A name and the JSON of its arguments, with marks around each: `[TOOL_CALLS]name[ARGS]{...}`.

    between: what the model writes between the two; sep: a pattern of all that is read there, if that is more.
    """

    opening: str
    between: str
    before: str = ""
    after: str = ""
    closing: str = ""
    sep: str = ""

    @property
    def openings(self) -> tuple[str, ...]:
        return (self.opening,)

    @property
    def apart(self) -> str | None:
        return None if self.closing else ""

    def read(self, text: str, tools: Tools, ended: bool) -> tuple[list[Call], int] | None:
        reader, found, end = _Reader(text, ended), list[Call](), 0
        sep = re.compile(self.sep) if self.sep else None
        if not reader.take(self.opening):
            return None
        while not found or self.closing:
            reader.skip()
            if not reader.take(self.before) or (name := reader.match(NAME)) is None:
                break
            if not (reader.take(self.between) if sep is None else reader.past(sep)):
                break
            try:
                reader.skip()
                call = _call(name[0], reader.value())
            except ValueError:
                break
            if call is None:
                break
            found.append(call)
            end = reader.at
            if self.after and reader.take("\n" + self.after.lstrip("\n")):
                end = reader.at
        if not found:
            return None
        reader.at = end
        if self.closing:
            reader.take("\n" + self.closing)
        return found, reader.at

    def block(self, writer: Writer, tools: Tools, names: Sequence[str]) -> str:
        _require_readable(NAME, names, "a function")
        one = writer.one_of(
            f"{writer.literal(self.before + name + self.between)} {writer.arguments(tools.schemas[name])} "
            + writer.literal(self.after)
            for name in names
        )
        many = f"{one} {one}*" if self.closing and tools.several else one
        return f"{many} {writer.literal(self.closing)}"


@dataclass(frozen=True)
class TaggedForm:
    """Every argument between tags of its own: `<function=NAME><parameter=P>value</parameter></function>`.

    name, key: what stands before and after each; value, function: what ends each. A line's end in them stands for any
    white space. A value that may be text is written without quotes.
    """

    opening: str
    closing: str
    name: tuple[str, str]
    key: tuple[str, str]
    value: str
    function: str = ""
    pad: str = ""  # around the value

    @property
    def openings(self) -> tuple[str, ...]:
        inner = self.name[0].lstrip()
        return (self.opening, inner) if inner else (self.opening,)  # the outer tag is often forgotten

    @property
    def apart(self) -> str | None:
        return "\n"

    def read(self, text: str, tools: Tools, ended: bool) -> tuple[list[Call], int] | None:
        reader, found, end = _Reader(text, ended), list[Call](), 0
        outer = reader.take(self.opening)
        while not found or outer:
            reader.skip()
            if not reader.take(self.name[0].lstrip()) or (name := reader.match(NAME)) is None:
                break
            if not reader.take(self.name[1]):
                break
            arguments = self._arguments(reader, name[0], tools)
            if arguments is None:
                break
            found.append(Call(name[0], json.dumps(arguments, ensure_ascii=False)))
            end = reader.at
            if not self.function:
                break
        if not found:
            return None
        reader.at = end
        if outer:
            reader.take("\n" + self.closing)
        return found, reader.at

    def _arguments(self, reader: _Reader, name: str, tools: Tools) -> dict[str, Any] | None:
        """All up to the function's end; None if that is not reached."""
        found: dict[str, Any] = {}
        first, last = self.key[0].lstrip(), (self.function or self.closing).lstrip()
        ends = re.compile(rf"{re.escape(self.value)}\s*(?:{re.escape(first)}|{re.escape(last)})")
        schema = ObjectSchema(tools.schemas.get(name))
        while True:
            reader.skip()
            start = reader.at
            if reader.take(last):
                reader.at = reader.at if self.function else start
                return found
            if not reader.take(first) or (key := reader.match(_KEY)) is None or not reader.take(self.key[1]):
                return None
            if (end := ends.search(reader.text, reader.at)) is None:
                reader.missing()
                return None
            said = reader.text[reader.at : end.start()].removeprefix(self.pad).removesuffix(self.pad)
            found[key[0]] = typed(said, schema.types(key[0]))
            reader.at = end.start() + len(self.value)

    def block(self, writer: Writer, tools: Tools, names: Sequence[str]) -> str:
        _require_readable(NAME, names, "a function")
        functions = []
        for name in names:
            schema = ObjectSchema(tools.schemas[name])
            schema.require_listed()
            parts = [writer.literal(self.name[0] + name + self.name[1])]
            _require_readable(_KEY, schema.keys, f"a property of {name}")
            for key in schema.keys:
                head = writer.literal(self.key[0] + key + self.key[1] + self.pad)
                part = f"{head} {writer.value(schema, key, self.pad + self.value)}"
                parts.append(part if key in schema.required else f"({part})?")
            functions.append(" ".join([*parts, writer.literal(self.function)]))
        one = writer.one_of(functions)
        return f"{one} {writer.literal(self.closing)}"


_KEY = re.compile(r"[^<>\"\n]+")


def typed(said: str, types: set[str] | None) -> Any:
    """The value of an argument that may be one of these types of JSON, and that has no quotes if it is text."""
    if types == {"string"}:
        return said
    try:
        value = _PYTHON[said.strip()] if said.strip() in _PYTHON else json.loads(said, strict=False)
    except (ValueError, RecursionError):
        return said
    return value if types is None or "string" not in types or types_of(value) & types else said


_PYTHON = {"True": True, "False": False, "None": None}  # as Jinja's `string` filter writes what JSON calls otherwise


HERMES = JsonForm("<tool_call>", "</tool_call>")
BARE = JsonForm("", arguments="parameters")  # Llama 3
DEEPSEEK = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)

# The first whose reader finds the call in what a template writes is the model's.
FORMS: tuple[Form, ...] = (
    HERMES,
    TaggedForm(  # Qwen3-Coder, Qwen3.5, Nemotron 3, Step 3.5
        "<tool_call>", "\n</tool_call>", ("\n<function=", ">"), ("\n<parameter=", ">"), "</parameter>",
        "\n</function>", "\n",
    ),
    TaggedForm(  # GLM 4.5 and later
        "<tool_call>", "\n</tool_call>", ("", "\n"), ("<arg_key>", "</arg_key>\n<arg_value>"), "</arg_value>",
    ),
    TaggedForm(  # Seed-OSS
        "<seed:tool_call>", "\n</seed:tool_call>", ("\n<function=", ">"), ("\n<parameter=", ">"), "</parameter>",
        "\n</function>",
    ),
    TaggedForm(  # MiniMax-M2
        "<minimax:tool_call>", "\n</minimax:tool_call>", ('\n<invoke name="', '">'), ('\n<parameter name="', '">'),
        "</parameter>", "\n</invoke>",
    ),
    JsonForm("[TOOL_CALLS]", listed=True),  # Mistral up to Nemo
    NamedForm("[TOOL_CALLS]", "[ARGS]", sep=r"(?:\[CALL_ID\]\w*)?\[ARGS\]"),  # Mistral from Small 3.1 on
    NamedForm("<function=", ">", after="</function>"),  # Functionary 3.1
    NamedForm(DEEPSEEK[0], DEEPSEEK[2], DEEPSEEK[1], DEEPSEEK[3], DEEPSEEK[4]),  # DeepSeek V3.1
    NamedForm(  # DeepSeek R1 and V3
        DEEPSEEK[0], "\n```json\n", f"{DEEPSEEK[1]}function{DEEPSEEK[2]}", f"\n```{DEEPSEEK[3]}", DEEPSEEK[4],
    ),
    NamedForm(  # Kimi K2
        "<|tool_calls_section_begin|>", ":0<|tool_call_argument_begin|>", "<|tool_call_begin|>functions.",
        "<|tool_call_end|>", "<|tool_calls_section_end|>", r":\d+<\|tool_call_argument_begin\|>",
    ),
    JsonForm("<TOOLCALL>", "</TOOLCALL>", listed=True),  # Nemotron Nano 2
    JsonForm("<tool_calls>", "</tool_calls>", listed=True),  # Apriel, MiniMax-M1
    JsonForm("<|tool_call|>", listed=True),  # Granite 3
    JsonForm("<|function_call|>"),  # GigaChat 3.1
    BARE,
)  # fmt: skip

# What models write beside their own form: Qwen2.5-Coder the first two, Llama 3 the tag of its tools.
LOOSE: tuple[Form, ...] = (
    JsonForm("```", "```", loose=True),
    JsonForm("<tools>", "</tools>", loose=True),
    JsonForm("<|python_tag|>", loose=True),
    JsonForm("<tool_call>", "</tool_call>", loose=True),
    JsonForm("", loose=True),
)


def form_of(template: ChatTemplate) -> Form:
    """The form in which a template writes a call; else one that its source speaks of; else Hermes'."""
    name, arguments = "probe_function", {"probe": "found"}
    parameters = {"type": "object", "properties": {"probe": {"type": "string"}}, "required": ["probe"]}
    tools = [{"type": "function", "function": {"name": name, "description": "Probes.", "parameters": parameters}}]
    call = {"id": "probe0000", "type": "function", "function": {"name": name, "arguments": arguments}}
    asked = [{"role": "user", "content": "?"}]
    try:
        before = template.text(asked, tools, answered=True)
        said = template.text([*asked, {"role": "assistant", "content": "", "tool_calls": [call]}], tools, answered=True)
    except FileFormatError:
        before = said = ""
    tail = said[next((i for i, (a, b) in enumerate(zip(before, said, strict=False)) if a != b), len(before)) :]
    offered = Tools({name: parameters})
    for form in FORMS:
        for begun in re.finditer(re.escape(form.openings[0] or "{"), tail):
            found = form.read(tail[begun.start() :], offered, ended=True)
            if found and found[0] == [Call(name, json.dumps(arguments))]:
                return form
    marked = [form for form in FORMS if form.openings[0]]
    return next((form for form in marked if form.openings[0] in template.tool_source), HERMES)


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
    writer, opening = Writer(controls), form.openings[0]
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
        if writer.is_control(opening):
            text = writer.free(form.openings)  # nor may it spell the token out
            start = f"{text} ({writer.literal(opening)} {block} {text}){many}"
        else:
            start = f"({writer.free(form.openings, opening)} {block}){many} {writer.free(form.openings)}"
    return "\n".join([f"start: {start}", *writer.rules])


def control_tokens(form: Form, named: Mapping[str, int]) -> dict[str, int]:
    """Of the control tokens by name, those with which a model of this form writes calls."""
    marks = repr([form, *LOOSE]).replace("\\", "")  # patterns escape them
    return {name: i for name, i in named.items() if len(name) > 2 and name in marks}


@dataclass
class CallReader:
    """Takes the calls out of an answer as it comes; what is no call is its text.

    `reached`: characters of the answer that were given out or read as calls.
    """

    form: Form
    tools: Tools
    calls: list[Call] = field(default_factory=list)
    reached: int = 0

    def __post_init__(self) -> None:
        self._forms = [self.form, *(form for form in LOOSE if form != self.form)]
        openings = {opening for form in self._forms for opening in form.openings if opening}
        self._openings = re.compile("|".join(re.escape(each) for each in sorted(openings)))
        self._beginnings = {each[:n] for each in openings for n in range(1, len(each))}
        self._longest = max(map(len, openings))
        self._spoken = False  # whether anything but white space was given out
        self._enough = 0  # characters held back at which what may be a call is read again
        self._held = list[tuple[str, bool]]()

    def through(self, pieces: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
        """The text of an answer; after the one call that is allowed the rest is left unread."""
        size = 0
        for piece in pieces:
            self._held += [piece] if piece[0] else []
            size += len(piece[0])
            if size < self._enough:
                continue
            yield from self._read(ended=False)
            size = sum(len(text) for text, _ in self._held)
            self._enough = size + size // GROWTH  # so that a long one takes a time that grows with its length
            if self.full:
                return
        yield from self._read(ended=True)

    @property
    def full(self) -> bool:
        """Whether no more calls may follow."""
        return bool(self.calls) and not self.tools.several

    def _read(self, ended: bool) -> Iterator[tuple[str, bool]]:
        while self._held and not self.full:
            text = "".join(said for said, _ in self._held)
            if self.calls and not self._spoken and text[0].isspace():  # between calls
                self._drop(len(text) - len(text.lstrip()))
                continue
            at, wait = self._opening(text, ended)
            if self._spoken or text[:at].strip():
                yield from self._out(at)
                text, at = text[at:], 0
            if wait or at >= len(text):
                if not wait:
                    yield from self._out(at)
                return
            found, wait = self._block(text[at:], ended)
            if wait:
                return
            if found is None:
                yield from self._out(at + 1)
                continue
            self.calls += found[0][: None if self.tools.several else 1]
            self._drop(at + found[1])
            self._spoken = False

    def _opening(self, text: str, ended: bool) -> tuple[int, bool]:
        """(where a block may begin, or the text that is none ends; whether more must come to tell)."""
        if not self._spoken:
            bare = len(text) - len(text.lstrip())
            if bare == len(text) and not ended:
                return 0, True
            if text[bare : bare + 1] in ("{", "["):
                return bare, False
        if (found := self._openings.search(text)) is not None:
            return found.start(), False
        if ended:
            return len(text), False
        begun = (n for n in range(min(self._longest - 1, len(text)), 0, -1) if text[-n:] in self._beginnings)
        return len(text) - next(begun, 0), True

    def _block(self, text: str, ended: bool) -> tuple[tuple[list[Call], int] | None, bool]:
        """(calls and length of the block that a text begins with, or None; whether more must come to tell)."""
        if not ended and text in self._beginnings:
            return None, True
        for form in self._forms:
            if not any(text.startswith(opening) for opening in form.openings) or ("" in form.openings and self._spoken):
                continue
            try:
                if (found := form.read(text, self.tools, ended)) is not None:
                    return found, False
            except Incomplete:
                return None, True
        return None, False

    def _drop(self, n: int) -> None:
        for _ in self._take(n):
            pass

    def _out(self, n: int) -> Iterator[tuple[str, bool]]:
        for piece in self._take(n):
            self._spoken = self._spoken or bool(piece[0].strip())
            yield piece

    def _take(self, n: int) -> Iterator[tuple[str, bool]]:
        for piece in first_of(self._held, n):
            self.reached += len(piece[0])
            yield piece
