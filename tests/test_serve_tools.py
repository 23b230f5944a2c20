"""Tools over HTTP: forced calls of toys of every form, through OpenAI's client, with drafts and without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from llamabase.llama.context import F32
from runner import SpeculativeLM
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .test_calls import EACH, END, TEMPLATES
from .test_serve import SAY, serving
from .toy import write_model

SCHEMA = {
    "type": "object",
    "properties": {"e": {"type": "string", "enum": ["sea", "the king"]}, "b": {"type": "boolean"}},
    "required": ["e", "b"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("look", "go")
]  # fmt: skip


@pytest.fixture(scope="module", params=TEMPLATES)
def url(
    request: pytest.FixtureRequest, toys: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A toy pair whose template writes calls in one of the forms."""
    source = EACH + TEMPLATES[request.param] + END + "{{ 'assistant: ' if add_generation_prompt }}"
    target = write_model(tmp_path_factory.mktemp("tools") / "t.gguf", seed=1, template=source)
    with serving(
        Engine(LoadOptions(target, toys["good-trimmed"], n_ctx=512, n_threads=1, cache=F32, cache_draft=F32))
    ) as (
        found,
        _,
    ):
        yield found


def test_forced_calls_are_valid_with_drafts_and_without(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
    asked: dict[str, Any] = {
        "model": "any", "messages": SAY, "tools": TOOLS, "max_tokens": 200, "seed": 3, "temperature": 1.0,
        "parallel_tool_calls": False,
    }  # fmt: skip
    for choice, names in (
        ("required", {"look", "go"}),
        ({"type": "function", "function": {"name": "go"}}, {"go"}),
    ):
        found = set()
        for drafts in (0, 3):
            body: Any = {"speculative.n_max": drafts}
            whole = client.chat.completions.create(**asked, tool_choice=choice, extra_body=body).choices[0]
            assert whole.finish_reason == "tool_calls", whole
            [call] = whole.message.tool_calls or []
            assert isinstance(call, openai.types.chat.ChatCompletionMessageFunctionToolCall)
            assert call.function.name in names
            assert len(call.id) == 9
            jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
            assert whole.message.content is None
            stream = client.chat.completions.create(**asked, tool_choice=choice, extra_body=body, stream=True)
            deltas = [each for chunk in stream for each in chunk.choices[0].delta.tool_calls or []]
            assert [(each.index, each.function.name) for each in deltas if each.function] == [(0, call.function.name)]
            assert "".join(each.function.arguments or "" for each in deltas if each.function) == call.function.arguments
            found.add((call.function.name, call.function.arguments))
        assert len(found) == 1


def test_what_cannot_be_is_refused(url: str) -> None:
    bad = [{"type": "function", "function": {"name": "f", "parameters": {**SCHEMA, "not": {}}}}]
    for body, param in (
        ({"tools": bad, "tool_choice": "required"}, "tools"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ):
        found = httpx.post(f"{url}/v1/chat/completions", json={"messages": SAY, "max_tokens": 4, **body}, timeout=30)
        assert (found.status_code, found.json()["error"]["param"]) == (400, param), found.text


def test_what_reaches_the_template_is_the_same_for_server_and_python(tmp_path: Path) -> None:
    source = "{{ mood }}{{ tools | tojson if tools }}{% for m in messages %}{{ m.content }}{% endfor %}"
    target = write_model(tmp_path / "t.gguf", seed=1, template=source)
    messages: Any = [*SAY, {"role": "assistant", "content": "the and"}]
    with serving(
        Engine(LoadOptions(target, n_ctx=512, n_threads=1, cache=F32)), template_kwargs={"mood": "sad", "x": 1}
    ) as (
        url,
        server,
    ):
        engine = server.engine
        wanted = engine.model.tokenize("glad the king and the seathe and".replace("glad ", "glad"))
        body = {"messages": messages, "max_tokens": 8, "temperature": 0, "chat_template_kwargs": {"mood": "glad"}}
        found = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()
        assert found["usage"]["prompt_tokens"] == len(wanted)
        assert engine.prompt(messages, variables={"mood": "glad"}) == wanted
    with SpeculativeLM(target, n_ctx=512, n_threads=1, cache=F32) as lm:
        record = lm.chat(messages, max_tokens=8, temperature=0, chat_template_kwargs={"mood": "glad"})
        assert (record.prompt_tokens, record.text) == (len(wanted), found["choices"][0]["message"]["content"])
        assert lm.chat(messages, max_tokens=1, tools=TOOLS).prompt_tokens > len(wanted)
