"""What reaches a chat template: ids of calls, reasoning, variables, tools, the beginning of an answer."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamabase.errors import FileFormatError, SettingError
from llamabase.llama.template import ChatTemplate, short_id
from runner.serve.requests import BadRequest, Chat, Message, read

# As Mistral's: ids of nine letters and digits, or an error.
MISTRAL = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('nine!') }}{% endif %}"
    "[TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}{% endfor %}"
    "{% if m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('nine!') }}{% endif %}"
    "[RESULT]{{ m.tool_call_id }}{% endif %}{% endfor %}"
)
TURNS = (
    "{% for m in messages %}<{{ m.role }}{{ ' ' + m.name if m.name }}>"
    "{{ '(' + m.reasoning_content + ')' if m.reasoning_content }}{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ '<think>\n' if enable_thinking }}{% endif %}"
)


def template(source: str, **more: str) -> ChatTemplate:
    keys = {
        "tokenizer.chat_template": source,
        **{f"tokenizer.chat_template.{name}": text for name, text in more.items()},
    }
    file: Any = SimpleNamespace(path="t.gguf", get=lambda key, default=None: keys.get(key, default))
    return ChatTemplate(file, [])  # type: ignore[arg-type]


def messages(*given: dict[str, Any]) -> list[dict[str, Any]]:
    return [Message.model_validate(each).for_template() for each in given]


def called(id_: str | None) -> list[dict[str, Any]]:
    call = {"id": id_, "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    return messages({"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": id_, "content": "2"})


def test_ids_of_calls_reach_the_template_in_its_form() -> None:
    """As they are, if it takes them; else nine letters and digits, the same for a call and its result."""
    assert "[CALL_ID]abcDEF123[RESULT]abcDEF123" in template(MISTRAL).text(called("abcDEF123"))
    for id_ in ("call_0123456789abcdef", "é", None):
        text = template(MISTRAL).text(called(id_))
        call, result = text.partition("[CALL_ID]")[2].split("[RESULT]")
        assert call == result
        assert len(call) == 9
        assert call.isalnum()
    calls = "{% for c in m.tool_calls or [] %}{{ c.id }} {% endfor %}"
    free = "{% for m in messages %}" + calls + "{{ m.tool_call_id }}{% endfor %}"
    assert template(free).text(called("functions.f:0")) == "functions.f:0 functions.f:0"


@given(st.text(), st.text())
def test_short_ids_are_nine_letters_and_differ(a: str, b: str) -> None:
    assert short_id(short_id(a)) == short_id(a)
    assert short_id(a).isalnum()
    assert (short_id(a) == short_id(b)) == (a == b or short_id(a) == b or a == short_id(b))


def test_arguments_are_json_however_a_template_writes_them() -> None:
    """DeepSeek R1's adds them to a text, others print them or write JSON of them."""
    head = "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    for written in (
        "{{ 'a: ' + f }}",
        "{{ 'a: ' ~ f }}",
        "a: {{ f }}",
        "a: {{ f | tojson }}",
        "{{ ('a: ' + f) + '' }}",
    ):
        source = head + written.replace("f ", "c.function.arguments ").replace("f)", "c.function.arguments)")
        assert template(source + "{% endfor %}{% endfor %}").text(called("x")) == 'a: {"a": 1}', written


def test_arguments_come_as_objects_or_as_text_as_the_template_wants() -> None:
    head = "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    as_object = template(head + "{{ c.function.arguments.a }}{% endfor %}{% endfor %}")
    as_text = template(head + "{{ 'args: ' + c.function.arguments }}{% endfor %}{% endfor %}")
    assert as_object.text(called("x")) == "1"
    assert as_text.text(called("x")) == 'args: {"a": 1}'


def test_reasoning_names_parts_and_variables_reach_it() -> None:
    said = messages(
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": None, "reasoning_content": "hm"},
        {"role": "assistant", "content": "x", "reasoning": "aha"},
    )
    wanted = "<user ann>hi</user><assistant>(hm)</assistant><assistant>(aha)x</assistant>"
    assert template(TURNS).text(said, answered=True) == wanted
    assert template(TURNS).text(said) == f"{wanted}<assistant>"
    assert template(TURNS).text(said, variables={"enable_thinking": True}) == f"{wanted}<assistant><think>\n"


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "self", "raise_exception", "functions"])
def test_a_variable_takes_no_place_of_the_conversations(name: str) -> None:
    with pytest.raises(SettingError, match=f"chat_template_kwargs: {name} is set"):
        template(TURNS).text([], variables={name: "x"})


def test_variables_are_data_in_the_sandbox() -> None:
    with pytest.raises(FileFormatError, match="unsafe"):
        template("{{ x.append(1) }}").text([], variables={"x": []})


def test_the_template_for_tools_is_used_for_tools() -> None:
    both = template("plain", tool_use="with tools")
    assert (both.text([]), both.text([], [{"type": "function"}])) == ("plain", "with tools")
    assert template("plain").text([], [{"type": "function"}]) == "plain"


def test_an_answer_goes_on_from_the_last_message() -> None:
    asked = {"role": "user", "content": "q"}
    for last, variables, wanted in (
        ({"content": "The an"}, {}, "<user>q</user><assistant>The an"),
        ({"content": "so", "reasoning_content": "hm"}, {}, "<user>q</user><assistant><think>\nhm\n</think>\n\nso"),
        ({"content": "", "reasoning_content": "hm"}, {"enable_thinking": True}, "<user>q</user><assistant><think>\nhm"),
    ):
        said = [asked, {"role": "assistant", **last}]
        assert template(TURNS).text(said, continued=True, variables=variables) == wanted


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({}, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, True),
        ({"continue_final_message": False}, False),
        ({"add_generation_prompt": False}, False),
        ({"continue_final_message": True, "add_generation_prompt": True}, "cannot both"),
    ],
)
def test_bodies_say_how_a_conversation_ends(body: dict[str, Any], wanted: Any) -> None:
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    chat = read(Chat, json.dumps({"messages": said, **body}).encode())
    if isinstance(wanted, bool):
        assert chat.continued == wanted
    else:
        with pytest.raises(BadRequest, match=wanted):
            _ = chat.continued
