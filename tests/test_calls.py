"""Calls of tools: what a template writes is read back, streams and whole texts agree, and grammars force real calls."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamabase.errors import FileFormatError
from llamabase.llama.template import ChatTemplate
from runner.loop.stops import TextPiece
from runner.tools.calls import BARE, FORMS, HERMES, Call, CallScanner, Form, Tools, form_of, guide_of, lark_of
from runner.tools.stream import CallReader

EACH = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}{% set f = c.function %}"
END = "{% endfor %}<end>\n{% endfor %}"
VALUE = "{{ v if v is string else v | tojson }}"
# One template for each form, written as its family writes calls.
TEMPLATES = {
    "hermes": '<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>',
    "qwen3-coder": "\n<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments.items() %}<parameter={{ k }}>\n"
    + VALUE + "\n</parameter>\n{% endfor %}</function>\n</tool_call>",
    "glm": "\n<tool_call>{{ f.name }}\n{% for k, v in f.arguments.items() %}<arg_key>{{ k }}</arg_key>\n<arg_value>"
    + VALUE + "</arg_value>\n{% endfor %}</tool_call>",
    "seed": "\n<seed:tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments.items() %}<parameter={{ k }}>"
    + VALUE + "</parameter>\n{% endfor %}</function>\n</seed:tool_call>",
    "minimax-m2": '\n<minimax:tool_call>\n<invoke name="{{ f.name }}">\n{% for k, v in f.arguments.items() %}'
    '<parameter name="{{ k }}">' + VALUE + "</parameter>\n{% endfor %}</invoke>\n</minimax:tool_call>",
    "mistral": '[TOOL_CALLS][{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}, "id": "{{ c.id }}"}]',
    "mistral-small": "[TOOL_CALLS]{{ f.name }}[CALL_ID]{{ c.id }}[ARGS]{{ f.arguments | tojson }}",
    "functionary": "<function={{ f.name }}>{{ f.arguments | tojson }}</function>",
    "deepseek-v3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ f.name }}<｜tool▁sep｜>{{ f.arguments | tojson }}"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-r1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ f.name }}\n```json\n"
    "{{ '' + f.arguments }}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.{{ f.name }}:0<|tool_call_argument_begin|>"
    "{{ f.arguments | tojson }}<|tool_call_end|><|tool_calls_section_end|>",
    "nemotron": '<TOOLCALL>[{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}]</TOOLCALL>',
    "apriel": '<tool_calls>[{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}]</tool_calls>',
    "granite": '<|tool_call|>[{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}]',
    "gigachat": '<|function_call|>{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}',
    "llama3": '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}',
}  # fmt: skip
TAGGED = ("qwen3-coder", "glm", "seed", "minimax-m2")


def template(source: str, **more: str) -> ChatTemplate:
    keys = {"tokenizer.chat_template": source, **more}
    file: Any = SimpleNamespace(path="t.gguf", get=lambda key, default=None: keys.get(key, default))
    return ChatTemplate(file, [])  # type: ignore[arg-type]


FOUND = {family: template(EACH + source + END) for family, source in TEMPLATES.items()}


def read(form: Form, tools: Tools, pieces: list[str]) -> tuple[list[Call], str]:
    reader = CallReader(form, tools)
    text = "".join(said for said, _ in reader.through(TextPiece(piece, False) for piece in pieces))
    return reader.calls, text


def test_every_form_is_found_by_what_its_template_writes() -> None:
    assert [form_of(found) for found in FOUND.values()] == list(FORMS)
    assert form_of(template("{{ messages[0].content }}")) == HERMES
    assert form_of(template("{% if tools %}Call with <|tool_call|>{% endif %}")).openings == ("<|tool_call|>",)


keys = st.text(
    st.characters(codec="utf-8", exclude_characters='<>"\n', exclude_categories=["Cs", "Cc", "Zs"]), min_size=1
)
texts = st.one_of(
    st.text(st.characters(codec="utf-8")),
    st.sampled_from(
        ["}", "</tool_call>", '"', "\\", "a\nb", "\n", "", '{"a": "}"}', "```", "[ARGS]", "x</parameter>y"]
    ),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**12), 10**12), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)


def kind(value: Any) -> dict[str, Any]:
    kinds = {str: "string", bool: "boolean", int: "integer", type(None): "null", list: "array", dict: "object"}
    return {"type": kinds[type(value)]}


@pytest.mark.parametrize("family", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(
    name=st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True),
    arguments=st.dictionaries(keys, values, max_size=3),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
)
def test_what_the_template_renders_is_read_back(family: str, name: str, arguments: Any, cuts: list[int]) -> None:
    """Whole, and in pieces of any length."""
    parameters = {"type": "object", "properties": {key: kind(value) for key, value in arguments.items()}}
    call = {"id": "abcdef123", "type": "function", "function": {"name": name, "arguments": arguments}}
    said = FOUND[family].text([{"role": "assistant", "content": "", "tool_calls": [call]}], answered=True)
    text = said.removeprefix("assistant: ").removesuffix("<end>\n")
    tools, form = Tools({name: parameters}), form_of(FOUND[family])
    pieces, at = [], 0
    while at < len(text):
        pieces.append(text[at : at + cuts[len(pieces) % len(cuts)]])
        at += len(pieces[-1])
    whole = read(form, tools, [text])
    assert whole == read(form, tools, pieces)
    assert [(each.name, json.loads(each.arguments)) for each in whole[0]] == [(name, arguments)]
    assert not whole[1]


WEATHER = Tools({"get_weather": {"type": "object", "properties": {"city": {"type": "string"}}}, "now": {}})
PARIS = Call("get_weather", '{"city": "Paris"}')


@pytest.mark.parametrize(
    ("text", "calls", "rest"),
    [
        ('```json\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n```', [PARIS], ""),
        ('Sure:\n```json\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n```\n', [PARIS], "Sure:\n"),
        ('{"name": "get_weather", "arguments": {"city": "Paris"}}', [PARIS], ""),
        ('{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS], ""),
        ('<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS], ""),
        ('{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}', [PARIS], ""),
        ('<tools>\n{"name": "now", "arguments": null}\n</tools>', [Call("now", "{}")], ""),
        ('<tool_call>{"name": "now", "parameters": null}</tool_call>', [Call("now", "{}")], ""),
        ('<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>', [PARIS], ""),
        ('<tool_call>{"name": "now"}', [Call("now", "{}")], ""),
        ('<tool_call>{"name": "now"}</tool_call>\n<tool_call>{"name": "now"} b', [Call("now", "{}")] * 2, "b"),
        # what is no call is text
        ('{"name": "unknown", "arguments": {}}', [], None),
        ('{"name": "get_weather", "age": 3}', [], None),
        ('{"colour": "red"} and {"name": "now", "arguments": {}}', [], None),
        ('as JSON: {"name": "now", "arguments": {}}', [], None),
        ("```python\nprint({})\n```", [], None),
        ("<tool_call>nothing</tool_call> and [a](b)", [], None),
        ("<tool_call>\n" + "[" * 10_000, [], None),
        ('<tool_call>{"name": "now", "arguments": ' + "9" * 5000 + "}</tool_call>", [], None),
        ("a ``` b <tool_", [], None),
        ("   ", [], None),
    ],
)  # fmt: skip
def test_what_models_write_beside_their_own_form(text: str, calls: list[Call], rest: str | None) -> None:
    for pieces in ([text], list(text)) if len(text) < 1000 else ([text],):
        assert read(HERMES, WEATHER, pieces) == (calls, text if rest is None else rest)


def test_text_is_given_out_as_soon_as_it_cannot_become_a_call() -> None:
    for text, released in (
        ("```python\n", True),
        ('{"colour":', True),
        ("[1", True),
        ('{"name"', False),
        ("<tool_c", False),
    ):
        reader = CallReader(HERMES, WEATHER)
        pieces = iter([TextPiece(text, False), TextPiece("rest", False)])
        assert next(reader.through(pieces))[0][0] == text[0]
        assert (next(pieces, None) is not None) == released, text


def test_one_call_only_ends_the_answer() -> None:
    text = '<tool_call>{"name": "now"}</tool_call>'
    pieces = iter([TextPiece(text, False), TextPiece(text, False)])
    reader = CallReader(HERMES, Tools(WEATHER.schemas, several=False))
    assert (list(reader.through(pieces)), reader.calls) == ([], [Call("now", "{}")])
    assert next(pieces) == (text, False)


def test_a_strict_function_is_called_in_the_models_own_form_alone() -> None:
    strict = Tools(WEATHER.schemas, strict=frozenset({"now"}))
    assert read(HERMES, strict, ['{"name": "now", "arguments": {}}'])[0] == []
    assert read(BARE, strict, ['{"name": "now", "parameters": {}}'])[0] == [Call("now", "{}")]


SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "maxLength": 4},
        "n": {"type": "integer", "minimum": 1, "maximum": 99},
        "e": {"type": "string", "enum": ["x y", "z"]},
        "o": {"$ref": "#/$defs/O"},
        "u": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    },
    "required": ["n", "e"],
    "$defs": {"O": {"type": "object", "properties": {"k": {"type": "array", "maxItems": 2, "items": {"enum": [1]}}}}},
}


class Bytes:
    """A vocabulary of bytes, and one control token, for llguidance."""

    eos_token_id, bos_token_id, special_token_ids = 0, None, (0, 257)
    tokens = (b"<eos>", *(bytes([i]) for i in range(256)), b"[TOOL_CALLS]")

    def __call__(self, text: str | bytes, *_: Any) -> list[int]:
        return [byte + 1 for byte in (text if isinstance(text, bytes) else text.encode())]


def matcher(lark: str) -> Any:
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    return LLMatcher(LLTokenizer(TokenizerWrapper(Bytes())), LLMatcher.grammar_from_lark(lark), log_level=0)


def drawn(lark: str, seed: int, start: str = "") -> str:
    """A text of a grammar: most bytes are those that end things, so that it comes to an end."""
    found, out = matcher(lark), Bytes()(start)
    assert found.try_consume_tokens(out) == len(out)
    rng = random.Random(seed)
    while not found.is_stopped() and not (found.is_accepting() and len(out) > len(start)) and len(out) < 4000:
        mask = found.compute_logit_bias()
        ids = [i for i in range(1, 257) if mask[i]]
        ending = [i for i in ids if chr(i - 1) in '<>/"}]\n']
        out.append(rng.choice(ending if ending and rng.random() < 0.6 else ids))
        assert found.consume_token(out[-1])
    assert found.is_accepting()
    return b"".join(Bytes.tokens[i] for i in out).decode()


@pytest.mark.parametrize("form", FORMS, ids=list(TEMPLATES))
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_forced_call_obeys_its_schema(form: Form, seed: int) -> None:
    """Whatever a model draws from the grammar is read as calls whose arguments are valid, and as nothing else."""
    tools = Tools({"f": SCHEMA, "g": {}}, forced=("f",))
    text = drawn(lark_of(form, tools, {}, False), seed)
    calls, rest = read(form, tools, list(text))
    assert calls, text
    assert not rest.strip()
    for call in calls:
        assert call.name == "f"
        jsonschema.validate(json.loads(call.arguments), SCHEMA)


@pytest.mark.parametrize("form", FORMS, ids=list(TEMPLATES))
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_strict_function_obeys_and_text_stays_free(form: Form, seed: int) -> None:
    tools = Tools({"f": SCHEMA}, strict=frozenset({"f"}), several=False)
    lark = lark_of(form, tools, {}, False)
    said = matcher(lark)
    assert said.try_consume_tokens(Bytes()("It is <b>so</b>.")) == 16
    assert said.is_accepting()
    opening = form.openings[0]
    text = drawn(lark, seed, f"ah, {opening}" if opening else '{"')
    calls, _ = read(form, tools, [text])
    jsonschema.validate(json.loads(calls[0].arguments), SCHEMA)


def test_control_tokens_and_thinking_in_grammars() -> None:
    form = FORMS[list(TEMPLATES).index("mistral-small")]
    found = matcher(lark_of(form, Tools({"f": {}}, forced=("f",)), {"[TOOL_CALLS]": 257}, False))
    assert found.try_consume_tokens(Bytes()("[TOOL_CALLS]")) == 0  # not letter by letter
    assert found.try_consume_tokens([257, *Bytes()("f[ARGS]{}")]) == 10
    found = matcher(lark_of(HERMES, Tools({"f": {}}, forced=("f",)), {}, True))
    said = Bytes()('hm\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')
    assert found.try_consume_tokens(said) == len(said)
    strict = Tools({"f": {}}, strict=frozenset({"f"}))
    found = matcher(lark_of(form, strict, {"[TOOL_CALLS]": 257}, False))
    spelt = Bytes()("so [TOOL_CALLS]")  # by letters, after which anything might follow
    assert found.try_consume_tokens(spelt) == len(spelt) - 1


def test_what_is_almost_a_call_is_read_in_a_time_that_grows_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece of a call that never ends may be its last."""
    form, seen = FORMS[list(TEMPLATES).index("qwen3-coder")], [0]
    honest = type(form).read

    def read(self: Form, reader: CallScanner, tools: Tools) -> list[Call]:
        seen[0] += len(reader.text)
        return honest(self, reader, tools)

    monkeypatch.setattr(type(form), "read", read)
    text = "<function=f>\n" + "<parameter=a>\nx\n</parameter>\n" * 1000
    reader = CallReader(form, Tools({"f": {}}))
    said = "".join(
        part for part, _ in reader.through(TextPiece(text[i : i + 4], False) for i in range(0, len(text), 4))
    )
    assert said == text
    assert seen[0] < 40 * len(text)


def test_a_name_that_cannot_be_read_back_is_refused() -> None:
    for family in ("qwen3-coder", "glm", "mistral-small", "functionary"):
        form = FORMS[list(TEMPLATES).index(family)]
        with pytest.raises(FileFormatError, match=r"'a b', the name of a function, cannot be read back"):
            guide_of(form, Tools({"a b": {}}, forced=("a b",)), {}, False)
    tools = Tools({"f": {"properties": {"a<b": {"type": "string"}}}}, forced=("f",))
    with pytest.raises(FileFormatError, match=r"'a<b', the name of a property of f,"):
        guide_of(FORMS[list(TEMPLATES).index("qwen3-coder")], tools, {}, False)
    assert guide_of(HERMES, Tools({"a b": {}}, forced=("a b",)), {}, False)


@pytest.mark.parametrize("schema", [{"type": 5}, {"enum": 5, "const": 1}, {"anyOf": [{"type": 7}]}, {"type": None}])
def test_a_schema_of_wrong_types_allows_any(schema: Any) -> None:
    tools = Tools({"f": {"properties": {"a": schema}}})
    text = "<tool_call>\n<function=f>\n<parameter=a>\n5\n</parameter>\n</function>\n</tool_call>"
    assert read(FORMS[list(TEMPLATES).index("qwen3-coder")], tools, [text]) == ([Call("f", '{"a": 5}')], "")


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "a+"}}}, "pattern"),
        ({"type": "object", "anyOf": [{"required": ["a"]}]}, "anyOf"),
        ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
    ],
)
def test_what_a_form_cannot_enforce_is_refused_by_name(schema: Any, named: str) -> None:
    tools = Tools({"f": schema}, forced=("f",))
    with pytest.raises(FileFormatError, match=named):
        guide_of(form_of(FOUND["qwen3-coder"]), tools, {}, False)
