"""What clients may ask for: fields of OpenAI's API and of llama-server's, read, bounded, and turned into settings.

Unknown fields are ignored, as OpenAI's clients expect; impossible values raise BadRequest, which names the field.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import fields
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from llamabase.errors import TrimError
from llamabase.sampling.guidance import schema_guide
from llamabase.sampling.settings import LETTERS, Sampling, samplers_lettered, samplers_named
from runner.draft.auto import LONGEST
from runner.draft.contracts import AUTO
from runner.tools.calls import Tools

log = logging.getLogger("uvicorn.error")

MOST_TOKENS = 1 << 31
MOST_ANSWERS, MOST_LOGPROBS = 16, 20
MOST_STOPS, LONGEST_STOP = 64, 1000
MOST_BREAKERS = 16  # of DRY: each is looked for in every token
MOST_COMPARED = 1000  # tokens among which infill compares each with every other


class BadRequest(Exception):
    """An answer of 400: what is wrong, and with which field."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class Body(BaseModel):
    """Fields of which null is as good as none, as clients send them."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


def _joined(content: Any) -> Any:
    """Content given as parts: their text."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        raise ValueError("parts of a message must be of text")
    return "".join(part["text"] for part in content)


class Function(Body):
    """A function that the model has called; its arguments are JSON in a string."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Body):
    id: str | None = None
    type: str = "function"
    function: Function

    def for_template(self) -> dict[str, Any]:
        function = {"name": self.function.name, "arguments": _object(self.function)}
        return ({} if self.id is None else {"id": self.id}) | {"type": "function", "function": function}


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_joined)] = None
    name: str | None = None
    reasoning_content: str | None = Field(None, validation_alias=AliasChoices("reasoning_content", "reasoning"))
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: a content always, and arguments as an object where they are one."""
        role = "system" if self.role == "developer" else self.role
        found: dict[str, Any] = {"role": role, "content": self.content or ""}
        for field in ("name", "reasoning_content", "tool_call_id"):
            if (value := getattr(self, field)) is not None:
                found[field] = value
        if self.tool_calls:
            found["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return found


def _object(function: Function) -> Any:
    if isinstance(function.arguments, dict):
        return function.arguments
    try:
        return json.loads(function.arguments)
    except (ValueError, RecursionError):
        return function.arguments


class JsonSchema(Body):
    schema_: dict[str, Any] | bool = Field(True, alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")  # llama-server's: without json_schema between


class StreamOptions(Body):
    include_usage: bool = False


Number = Annotated[float, Field(strict=False, allow_inf_nan=False)]


def _strings(given: Any) -> Any:
    """DRY's breakers where they come as one string: JSON, with brackets or without, or a single breaker."""
    if not isinstance(given, str):
        return given
    for text in (given, f"[{given}]"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, list) and all(isinstance(each, str) for each in found):
            return found
    return [given]


class Adapter(Body):
    id: int = 0
    scale: Number = 1.0


# Fields of llama-server that change nothing of a text here, and the values with which they ask for nothing.
IGNORED = {
    "cache_prompt": True,
    "id_slot": -1,
    "n_keep": 0,
    "n_discard": 0,
    "n_cache_reuse": 0,
    "return_progress": False,
}


@cache
def _warn(name: str) -> None:
    log.warning("%s is ignored: this server has nothing of the kind (said once)", name)


class Common(Body):
    """What both kinds of completions take. None stands for the default."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    n: int = Field(1, ge=1, le=MOST_ANSWERS)
    max_tokens: int | None = Field(None, le=MOST_TOKENS, validation_alias=AliasChoices("max_tokens", "n_predict"))
    temp: Number | None = Field(None, ge=0, validation_alias=AliasChoices("temperature", "temp"))
    top_k: int | None = Field(None, le=MOST_TOKENS, ge=-MOST_TOKENS)
    top_p: Number | None = None
    min_p: Number | None = None
    typical_p: Number | None = Field(None, validation_alias=AliasChoices("typical_p", "typ_p"))
    top_n_sigma: Number | None = None
    xtc_probability: Number | None = None
    xtc_threshold: Number | None = None
    dynatemp_range: Number | None = None
    dynatemp_exponent: Number | None = None
    repeat_penalty: Number | None = None
    repeat_last_n: int | None = Field(None, ge=-1, le=MOST_TOKENS)
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    dry_multiplier: Number | None = None
    dry_base: Number | None = None
    dry_allowed_length: int | None = Field(None, ge=0, le=MOST_TOKENS)
    dry_penalty_last_n: int | None = Field(None, ge=-1, le=MOST_TOKENS)
    dry_sequence_breakers: Annotated[tuple[str, ...] | None, BeforeValidator(_strings)] = Field(
        None, max_length=MOST_BREAKERS
    )
    adaptive_target: Number | None = None
    min_keep: int | None = Field(None, ge=0, le=MOST_TOKENS)
    mirostat: int | None = None
    samplers: tuple[str, ...] | str | None = None
    logit_bias: dict[str, float | bool] | list[tuple[int, float | bool]] | None = None
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, le=MOST_TOKENS)
    n_probs: int = Field(0, ge=0, le=MOST_LOGPROBS)
    lora: list[Adapter] = Field(default_factory=list)
    grammar: str | None = None
    json_schema: dict[str, Any] | bool | None = None
    response_format: ResponseFormat | None = None
    draft_max: int | None = Field(None, ge=0, validation_alias="speculative.n_max")
    vocab: str = Field(AUTO, validation_alias="speculative.vocab")

    @field_validator("lora")
    @classmethod
    def _no_adapters(cls, given: list[Adapter]) -> list[Adapter]:
        if any(adapter.scale for adapter in given):
            raise ValueError("no adapter is loaded here; leave it out")
        return given

    @property
    def stops(self) -> list[str]:
        """Empty ones, which clients send for none, end nothing."""
        found = [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if stop]
        if len(found) > MOST_STOPS or not all(len(stop) <= LONGEST_STOP for stop in found):
            raise BadRequest(f"stop: at most {MOST_STOPS} strings of up to {LONGEST_STOP} characters", "stop")
        return found

    def limit(self, default: int) -> int:
        """Tokens to answer with at most; llama-server's -1 is no limit."""
        if self.max_tokens is None or self.max_tokens == -1:
            return default
        if self.max_tokens < 1:
            raise BadRequest(f"max_tokens: {self.max_tokens} is less than 1", "max_tokens")
        return min(self.max_tokens, default)

    def seed_of(self, i: int) -> int | None:
        """Of the i-th of several answers; OpenAI's and llama-server's -1 draw one."""
        return None if self.seed is None or self.seed < 0 else self.seed + i

    def rounds_of(self) -> int | None:
        return None if self.draft_max is None else min(self.draft_max, LONGEST)

    def wanted_schema(self) -> tuple[str, Any]:
        """The field that asks for a JSON schema, and the schema that the answer must obey, or None."""
        form = self.response_format
        if form is None or form.type == "text":
            return "json_schema", self.json_schema
        schema = form.schema_ if form.json_schema is None else form.json_schema.schema_
        if schema is None and form.type == "json_schema":
            raise BadRequest("response_format: a json_schema names its schema", "response_format")
        return "response_format", {"type": "object"} if schema is None else schema

    @property
    def has_schema(self) -> bool:
        return self.wanted_schema()[1] is not None

    def sampling(self, defaults: Sampling, n_vocab: int) -> Sampling:
        settings = {field.name: getattr(defaults, field.name) for field in fields(Sampling)}
        for name in settings.keys() & Common.model_fields.keys() - {"samplers", "logit_bias", "grammar"}:
            if (value := getattr(self, name)) is not None:
                settings[name] = value
        if isinstance(self.samplers, str):  # llama-server's are letters, as --sampler-seq has them; here names, too
            lettered = set(self.samplers) <= {*LETTERS.values(), "a"}
            settings["samplers"] = (samplers_lettered if lettered else samplers_named)(self.samplers)
        elif self.samplers is not None:
            settings["samplers"] = samplers_named(";".join(self.samplers))
        if self.logit_bias is not None:
            settings["logit_bias"] = _biases(self.logit_bias, n_vocab)
        param, schema = self.wanted_schema()
        if schema is not None:
            try:
                settings["guide"], settings["grammar"] = schema_guide(json.dumps(schema)), ""
            except (TrimError, RecursionError) as error:
                raise BadRequest(f"{param}: {error}", param) from error
        if self.grammar:
            settings["grammar"] = self.grammar
            if schema is None:
                settings["guide"] = ""
        try:
            found = Sampling(**settings)
        except ValueError as error:
            named = next((name for name in settings if str(error).startswith(name)), "samplers")
            named = "temperature" if named == "temp" else named
            raise BadRequest(str(error), named) from error
        before, infill, _ = ";".join(found.chain).partition("infill")
        if infill and not ("top_k" in before.split(";") and found.top_k <= MOST_COMPARED):
            raise BadRequest(f"samplers: infill needs top_k before it, of at most {MOST_COMPARED}", "samplers")
        return found


def _biases(given: dict[str, float | bool] | list[tuple[int, float | bool]], n_vocab: int) -> dict[int, float]:
    found = {}
    for key, bias in given.items() if isinstance(given, dict) else given:
        if not str(key).isascii() or not str(key).isdigit() or len(str(key)) > 9 or int(key) >= n_vocab:
            raise BadRequest(f"logit_bias: there is no token {str(key)[:20]}", "logit_bias")
        # OpenAI's -100 bans, as does llama-server's false.
        found[int(key)] = float("-inf") if bias is False or bias <= -100 else float(bias)
    return found


class Chat(Common):
    """A body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(
        None, le=MOST_TOKENS, validation_alias=AliasChoices("max_completion_tokens", "max_tokens", "n_predict")
    )
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool | None = None

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """The tools that the template is told of."""
        return self.tools if self.tools and self.tool_choice != "none" else None

    @property
    def callable_tools(self) -> Tools | None:
        """The functions that may, or must, be called. Raises BadRequest."""
        functions = {}
        for tool in self.offered or ():
            function = tool.get("function", tool)
            if isinstance(function, dict) and isinstance(name := function.get("name"), str):
                functions[name] = function
        forced: tuple[str, ...] = ()
        match self.tool_choice:
            case None | "auto" | "none":
                pass
            case "required":
                forced = tuple(functions)
            case {"type": "function", "function": {"name": str(name)}}:
                if name not in functions:
                    raise BadRequest(f"tool_choice: no function {name[:100]} is offered in tools", "tool_choice")
                forced = (name,)
            case _:
                raise BadRequest("tool_choice: is auto, none, required or a function by name", "tool_choice")
        if self.tool_choice == "required" and not forced:
            raise BadRequest("tool_choice: required, and tools offers no function by name", "tool_choice")
        if not self.offered:
            return None
        schemas = {name: function.get("parameters") or {} for name, function in functions.items()}
        strict = frozenset(name for name, function in functions.items() if function.get("strict") is True)
        return Tools(schemas, forced, strict, self.parallel_tool_calls)

    @property
    def how(self) -> dict[str, Any]:
        """How the template is to end the conversation; see `Engine.prompt_text`. Raises BadRequest."""
        last, wanted = self.messages[-1], self.continue_final_message
        if wanted and last.role != "assistant":
            raise BadRequest(
                "continue_final_message: the last message is not the assistant's", "continue_final_message"
            )
        goes_on = last.role == "assistant" and wanted is not False and self.add_generation_prompt
        if wanted or goes_on:
            if wanted and "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt:
                raise BadRequest(
                    "continue_final_message: the answer cannot both go on and begin; leave add_generation_prompt out",
                    "continue_final_message",
                )
            if last.tool_calls:
                raise BadRequest("messages: an answer cannot go on after its calls; add their results", "messages")
            if len(self.messages) > 1 and self.messages[-2].role == "assistant":
                raise BadRequest("messages: two of the assistant's at the end; join them to go on from", "messages")
            return {"continued": True}
        return {"continued": False, "answered": not self.add_generation_prompt}

    @property
    def n_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else self.n_probs or None


class Completion(Common):
    """A body of /v1/completions: a prompt in one of llama-server's forms, see `Server.prompts`."""

    prompt: Any = ""
    suffix: str = ""
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False

    @property
    def n_logprobs(self) -> int | None:
        return self.n_probs or None if self.logprobs is None else self.logprobs

    @field_validator("echo")
    @classmethod
    def _no_echo(cls, echo: bool) -> bool:
        if echo:
            raise ValueError("the prompt is not given back; leave it out")
        return echo


class Native(Common):
    """A body of llama-server's own /completion."""

    prompt: Any = ""
    n: int = Field(1, ge=1, le=MOST_ANSWERS, validation_alias=AliasChoices("n_cmpl", "n"))
    max_tokens: int | None = Field(
        None, ge=-2, le=MOST_TOKENS, validation_alias=AliasChoices("n_predict", "max_completion_tokens", "max_tokens")
    )
    n_probs: int = Field(0, ge=0, le=MOST_LOGPROBS, validation_alias=AliasChoices("n_probs", "logprobs"))
    post_sampling_probs: bool = False
    n_indent: int = Field(0, ge=0, le=MOST_TOKENS)
    t_max_predict_ms: Number = 0.0
    return_tokens: bool = False
    timings_per_token: bool = False
    response_fields: list[str] = Field(default_factory=list)

    @field_validator("post_sampling_probs")
    @classmethod
    def _before_samplers(cls, given: bool) -> bool:
        if given:
            raise ValueError("probabilities are the target's own here, before the samplers; leave it out")
        return given

    @property
    def n_logprobs(self) -> int | None:
        return self.n_probs or None

    def limit(self, default: int) -> int:
        """0 reads the prompt alone, so that it is remembered."""
        return default if self.max_tokens is None or self.max_tokens < 0 else min(self.max_tokens, default)


class Chunk(Body):
    text: str
    filename: str = "tmp"


class Infill(Native):
    """A body of llama-server's /infill: the texts around a gap, what is known besides, and how the answer begins."""

    prompt: str = ""
    input_prefix: str
    input_suffix: str
    input_extra: list[Chunk] = Field(default_factory=list)


class Tokenize(Body):
    content: str | list[str | int]
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class Detokenize(Body):
    tokens: list[int]


_KIND = re.compile(r"function-.*|\w+\[.*|str|bool|int|float")  # what pydantic names beside fields


def read(kind: type[BaseModel], body: bytes) -> Any:
    """A body as one of these; raises BadRequest."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest("the body is no JSON that can be read") from error
    if not isinstance(found, dict):
        raise BadRequest("the body is no JSON object")
    try:
        valid = kind.model_validate(found)
        for name in IGNORED.keys() & found.keys():
            if found[name] not in (None, IGNORED[name]):
                _warn(name)
        return valid
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not _KIND.fullmatch(str(part)))
        raise BadRequest(f"{place}: {first['msg']}", place.partition(".")[0] or None) from error
    except RecursionError as error:
        raise BadRequest("the body nests too deep") from error
