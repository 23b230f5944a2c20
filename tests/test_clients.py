"""Clients as people use them, unmodified: OpenAI's with pydantic models and tools, and litellm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from llamabase.llama.context import F32
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .test_serve import ROOT, SAY, serving
from .toy import CHAT_TEMPLATE, write_model

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the network at its import

TOOL_TEMPLATE = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT_TEMPLATE.replace(
    "{{ m['content'] }}",
    "{{ m['content'] }}{% for c in m.tool_calls or [] %}<tool_call>\n"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}\n</tool_call>{% endfor %}",
)


class Kind(str, Enum):
    sea = "sea"
    river = "river"


class Place(BaseModel):
    name: str = Field(max_length=5)
    kind: Kind


class Map(BaseModel):
    places: list[Place] = Field(max_length=2)
    north: bool | None


TOOLS: Any = [openai.pydantic_function_tool(Place, name="look_at"), openai.pydantic_function_tool(Map, name="draw")]


@pytest.fixture(scope="module")
def url(toys: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A toy pair whose template writes calls; random weights say nonsense, but in the form that is asked for."""
    target = write_model(tmp_path_factory.mktemp("clients") / "t.gguf", seed=1, template=TOOL_TEMPLATE, n_ctx=2048)
    engine = Engine(LoadOptions(target, toys["good-trimmed"], n_ctx=2048, n_threads=1, cache=F32, cache_draft=F32))
    with serving(engine) as (found, _):
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_openai_parses_answers_into_models(client: openai.OpenAI) -> None:
    """Strict schemas as its library makes them of pydantic models, with drafts and without, streamed and whole."""
    for seed in range(3):
        texts = set()
        for drafts in (0, 3):
            asked: Any = {"model": "any", "messages": SAY, "seed": seed, "max_tokens": 300, "response_format": Map}
            extra: Any = {"speculative.n_max": drafts}
            whole = client.chat.completions.parse(**asked, extra_body=extra).choices[0]
            assert isinstance(whole.message.parsed, Map)
            with client.chat.completions.stream(**asked, extra_body=extra) as stream:
                assert stream.get_final_completion().choices[0].message.parsed == whole.message.parsed
            texts.add(whole.message.content)
        assert len(texts) == 1


def test_openai_parses_required_calls(client: openai.OpenAI) -> None:
    """Its tools are strict; the arguments come back as the model that they were made of."""
    names = set()
    for seed in range(4):
        asked: Any = {"model": "any", "messages": SAY, "seed": seed, "max_tokens": 400, "tools": TOOLS}
        found = client.chat.completions.parse(**asked, tool_choice="required", parallel_tool_calls=False).choices[0]
        assert found.finish_reason == "tool_calls"
        [call] = found.message.tool_calls or []
        assert isinstance(call.function.parsed_arguments, Place | Map)
        names.add(call.function.name)
        back: Any = [*SAY, found.message, {"role": "tool", "tool_call_id": call.id, "content": "12"}]
        again = client.chat.completions.create(model="any", messages=back, max_tokens=4, tools=TOOLS)
        assert again.usage is not None and again.usage.completion_tokens <= 4
    assert names <= {"look_at", "draw"}


def test_openai_parses_a_named_call_streamed(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "look_at"}}
    asked: Any = {"model": "any", "messages": SAY, "seed": 1, "max_tokens": 300, "tools": TOOLS}
    with client.chat.completions.stream(**asked, tool_choice=choice, parallel_tool_calls=False) as stream:
        events = list(stream)
        [call] = stream.get_final_completion().choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Place)
    assert any(event.type == "tool_calls.function.arguments.done" for event in events)


def test_openai_says_why_a_model_cannot_be_obeyed(client: openai.OpenAI) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems cannot be enforced") as refused:
        client.chat.completions.create(model="any", messages=SAY, response_format=form)
    assert refused.value.param == "response_format"


def test_litellm(url: str) -> None:
    """In a process of its own, since it leaves event loops open."""
    code = "import sys; from tests.test_clients import talk_through_litellm as talk; talk(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, url], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def talk_through_litellm(url: str) -> None:
    """Answers, streams, a schema and a required call."""
    import litellm

    litellm.telemetry = False
    asked: Any = {
        "model": "openai/any", "api_base": f"{url}/v1", "api_key": "none", "num_retries": 0,
        "messages": SAY, "seed": 2, "max_tokens": 200,
    }  # fmt: skip
    whole = litellm.completion(**{**asked, "max_tokens": 9})
    assert whole.usage.completion_tokens <= 9
    pieces = litellm.completion(**{**asked, "max_tokens": 9}, stream=True)
    text = whole.choices[0].message.content or ""
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    found = litellm.completion(**asked, response_format=Map).choices[0].message.content
    assert Map.model_validate_json(found)
    called = litellm.completion(**asked, tools=TOOLS, tool_choice="required", parallel_tool_calls=False).choices[0]
    [call] = called.message.tool_calls
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
    with pytest.raises(litellm.BadRequestError, match="more than the context"):
        litellm.completion(**{**asked, "messages": [{"role": "user", "content": "the sea " * 2000}]})
