"""What clients may ask for: fields of OpenAI's API and of llama-server's, checked, bounded, and turned into settings.

Unknown fields are ignored, as OpenAI's clients expect; impossible values raise BadRequest, which names the field.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Depends, Request
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from llamabase.errors import TrimError
from llamabase.llama.messages import for_template, parsed
from llamabase.llama.rounds import LONGEST
from llamabase.sampling.guidance import schema_guide
from llamabase.sampling.settings import LETTERS, Sampling, samplers_lettered, samplers_named
from runner.draft.contracts import AUTO
from runner.tools.calls import Tools

log = logging.getLogger("uvicorn.error")

MOST_TOKENS = 1 << 31
MOST_ANSWERS, MOST_LOGPROBS = 16, 20
MOST_STOPS, LONGEST_STOP = 64, 1000  # stop strings, and characters of one
MOST_BREAKERS = 16  # DRY's sequence breakers: each is looked for in every token
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


def _only_off(reason: str) -> AfterValidator:
    """A validator of a field that may only ask for nothing."""

    def check(value: Any) -> Any:
        if value:
            raise ValueError(reason)
        return value

    return AfterValidator(check)


Number = Annotated[float, Field(allow_inf_nan=False)]
TokenCount = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
LastTokens = Annotated[int, Field(ge=-1, le=MOST_TOKENS)]
LogprobCount = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]
JsonSchema = dict[str, Any] | bool


def _joined(content: Any) -> Any:
    """The text of content that is given as parts."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        raise ValueError("parts of a message must be of text")
    return "".join(part["text"] for part in content)


class Function(Body):
    """A function by name; `arguments`, if it was called, are JSON in a string or an object."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Body):
    id: str | None = None
    function: Function


class ToolChoice(Body):
    type: Literal["function"]
    function: Function


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_joined)] = None
    name: str | None = None
    reasoning_content: str | None = Field(None, validation_alias=AliasChoices("reasoning_content", "reasoning"))
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        return for_template(self.model_dump(exclude_none=True))


class NamedSchema(Body):
    schema_: JsonSchema = Field(True, alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: JsonSchema | None = Field(None, alias="schema")  # llama-server's: without json_schema between

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None and self.schema_ is None:
            raise ValueError("a json_schema names its schema")
        return self

    @property
    def wanted(self) -> JsonSchema | None:
        """The schema that the answer must obey; None for any text."""
        if self.type == "text":
            return None
        schema = self.schema_ if self.json_schema is None else self.json_schema.schema_
        return {"type": "object"} if schema is None else schema


class StreamOptions(Body):
    include_usage: bool = False


class Adapter(Body):
    id: int = 0
    scale: Annotated[Number, _only_off("no adapter is loaded here; leave it out")] = Field(1.0, validate_default=True)


def _breakers(given: Any) -> Any:
    """DRY's breakers if they come as one string: JSON, with brackets or without, or a single breaker."""
    if not isinstance(given, str):
        return given
    for text in (given, f"[{given}]"):
        breakers = parsed(text)
        if isinstance(breakers, list) and all(isinstance(breaker, str) for breaker in breakers):
            return breakers
    return [given]


def _samplers(given: Any) -> Any:
    """llama-server takes a string of letters, as --sampler-seq has them; here it may be names, too."""
    if not isinstance(given, str):
        return given
    return samplers_lettered(given) if set(given) <= {*LETTERS.values(), "a"} else given.split(";")


def _by_token(given: Any) -> Any:
    """llama-server takes biases also as a list of pairs."""
    pairs = isinstance(given, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in given)
    return {str(token): bias for token, bias in given} if pairs else given


def _bias(given: float | bool) -> float:
    """-inf bans a token, as OpenAI's -100 and llama-server's false do."""
    return -math.inf if given is False or given <= -100 else float(given)


def _without_empty(given: Any) -> Any:
    """Stop strings as a list; clients send empty ones for none."""
    given = [given] if isinstance(given, str) else given
    return [stop for stop in given if stop != ""] if isinstance(given, list) else given


def _not_zero(limit: int) -> int:
    if not limit:
        raise ValueError("0 is less than 1; leave it out or give -1 for no limit")
    return limit


AnswerLimit = Annotated[int, Field(ge=-1, le=MOST_TOKENS), AfterValidator(_not_zero)]
Breakers = Annotated[tuple[str, ...], BeforeValidator(_breakers), Field(max_length=MOST_BREAKERS)]
Stop = Annotated[str, Field(max_length=LONGEST_STOP)]
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float | bool, AfterValidator(_bias)]
Biases = Annotated[dict[TokenId, Bias], BeforeValidator(_by_token)]
Samplers = Annotated[
    tuple[str, ...], BeforeValidator(_samplers), AfterValidator(lambda names: samplers_named(";".join(names)))
]

# Fields of llama-server that do not change the text here, with the values that ask for nothing.
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
    log.warning("%s is ignored: it has no effect on this server (this is logged once)", name)


class Common(Body):
    """What all kinds of completions take. None stands for the default."""

    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    stop: Annotated[list[Stop], BeforeValidator(_without_empty), Field(max_length=MOST_STOPS)] = []
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    n: int = Field(1, ge=1, le=MOST_ANSWERS)
    max_tokens: AnswerLimit | None = Field(None, validation_alias=AliasChoices("max_tokens", "n_predict"))
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
    repeat_last_n: LastTokens | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    dry_multiplier: Number | None = None
    dry_base: Number | None = None
    dry_allowed_length: TokenCount | None = None
    dry_penalty_last_n: LastTokens | None = None
    dry_sequence_breakers: Breakers | None = None
    adaptive_target: Number | None = None
    min_keep: TokenCount | None = None
    mirostat: int | None = None
    samplers: Samplers | None = None
    logit_bias: Biases | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[
        TokenCount, _only_off("no answer can be kept from ending here; ignore_eos lets none end")
    ] = 0  # fmt: skip
    n_probs: LogprobCount = 0
    lora: list[Adapter] = []
    grammar: str | None = None
    json_schema: JsonSchema | None = None
    response_format: ResponseFormat | None = None
    draft_max: Annotated[int, Field(ge=0), AfterValidator(lambda n: min(n, LONGEST))] | None = Field(
        None, validation_alias="speculative.n_max"
    )
    vocab: str = Field(AUTO, validation_alias="speculative.vocab")

    def limit(self, most: int) -> int:
        """Tokens to answer with at most; a negative limit is none. 0 reads the prompt alone, so it is remembered."""
        return most if self.max_tokens is None or self.max_tokens < 0 else min(self.max_tokens, most)

    def seed_of(self, i: int) -> int | None:
        """The seed of the i-th of several answers; None, as for OpenAI's and llama-server's -1, draws one."""
        return None if self.seed is None or self.seed < 0 else self.seed + i

    @property
    def n_logprobs(self) -> int | None:
        """Alternatives to each token whose log probabilities are wanted; None for no log probabilities."""
        return self.n_probs or None

    @property
    def schema_wanted(self) -> JsonSchema | None:
        """The JSON schema that the answer must obey: response_format's before json_schema."""
        wanted = None if self.response_format is None else self.response_format.wanted
        return self.json_schema if wanted is None else wanted

    def sampling(self, defaults: Sampling, n_vocab: int) -> Sampling:
        """The defaults with what is asked for. Raises BadRequest."""
        settings = {field.name: getattr(defaults, field.name) for field in fields(Sampling)}
        for name in settings.keys() & Common.model_fields.keys():
            if (value := getattr(self, name)) not in (None, ""):
                settings[name] = value
        if unknown := [token for token in self.logit_bias or () if token >= n_vocab]:
            raise BadRequest(f"logit_bias: there is no token {str(unknown[0])[:20]}", "logit_bias")
        if (schema := self.schema_wanted) is not None:
            try:
                settings["guide"], settings["grammar"] = schema_guide(json.dumps(schema)), self.grammar or ""
            except (TrimError, RecursionError) as error:
                param = "json_schema" if schema is self.json_schema else "response_format"
                raise BadRequest(f"{param}: {error}", param) from error
        elif self.grammar:
            settings["guide"] = ""
        try:
            sampling = Sampling(**settings)
        except ValueError as error:
            param = next((name for name in settings if str(error).startswith(name)), "samplers")
            raise BadRequest(str(error), "temperature" if param == "temp" else param) from error
        before, infill, _ = ";".join(sampling.chain).partition("infill")
        if infill and not ("top_k" in before.split(";") and sampling.top_k <= MOST_COMPARED):
            raise BadRequest(f"samplers: infill needs top_k before it, of at most {MOST_COMPARED}", "samplers")
        return sampling


class Chat(Common):
    """A body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: AnswerLimit | None = Field(
        None, validation_alias=AliasChoices("max_completion_tokens", "max_tokens", "n_predict")
    )
    logprobs: bool = False
    top_logprobs: LogprobCount = 0
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool | None = None

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """The tools that the template gets."""
        return self.tools if self.tools and self.tool_choice != "none" else None

    @property
    def callable_tools(self) -> Tools | None:
        """The functions that may, or must, be called. Raises BadRequest."""
        functions: dict[str, Mapping[str, Any]] = {}
        for tool in self.offered or ():
            function = tool.get("function", tool)
            if isinstance(function, dict) and isinstance(name := function.get("name"), str):
                functions[name] = function
        forced: tuple[str, ...] = ()
        if isinstance(self.tool_choice, ToolChoice):
            forced = (self.tool_choice.function.name,)
            if forced[0] not in functions:
                raise BadRequest(f"tool_choice: no function {forced[0][:100]} is offered in tools", "tool_choice")
        elif self.tool_choice == "required":
            forced = tuple(functions)
            if not forced:
                raise BadRequest("tool_choice: required, and tools offers no function by name", "tool_choice")
        if not self.offered:
            return None
        schemas = {name: function.get("parameters") or {} for name, function in functions.items()}
        strict = frozenset(name for name, function in functions.items() if function.get("strict") is True)
        return Tools(schemas, forced, strict, self.parallel_tool_calls)

    @property
    def continued(self) -> bool:
        """Whether the answer goes on from the last message. Raises BadRequest."""
        last, wanted = self.messages[-1], self.continue_final_message
        if wanted and last.role != "assistant":
            raise BadRequest(
                "continue_final_message: the last message is not the assistant's", "continue_final_message"
            )
        if wanted is None:
            wanted = last.role == "assistant" and self.add_generation_prompt
        elif wanted and "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt:
            raise BadRequest(
                "continue_final_message: the answer cannot both go on and begin; leave add_generation_prompt out",
                "continue_final_message",
            )
        if wanted and last.tool_calls:
            raise BadRequest("messages: an answer cannot go on after its calls; add their results", "messages")
        if wanted and len(self.messages) > 1 and self.messages[-2].role == "assistant":
            raise BadRequest("messages: the last two are the assistant's; join them to go on from", "messages")
        return wanted

    @property
    def n_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else super().n_logprobs


class Completion(Common):
    """A body of /v1/completions: a prompt in one of llama-server's forms, see `Server.prompts`."""

    prompt: Any = ""
    suffix: str = ""
    logprobs: LogprobCount | None = None
    echo: Annotated[bool, _only_off("the prompt is not given back; leave it out")] = False

    @property
    def n_logprobs(self) -> int | None:
        return super().n_logprobs if self.logprobs is None else self.logprobs


class Native(Common):
    """A body of llama-server's own /completion."""

    prompt: Any = ""
    n: int = Field(1, ge=1, le=MOST_ANSWERS, validation_alias=AliasChoices("n_cmpl", "n"))
    max_tokens: Annotated[int, Field(ge=-2, le=MOST_TOKENS)] | None = Field(
        None, validation_alias=AliasChoices("n_predict", "max_completion_tokens", "max_tokens")
    )
    n_probs: LogprobCount = Field(0, validation_alias=AliasChoices("n_probs", "logprobs"))
    post_sampling_probs: Annotated[
        bool, _only_off("probabilities are the target's own here, before the samplers; leave it out")
    ] = False
    n_indent: TokenCount = 0
    t_max_predict_ms: Number = 0.0
    return_tokens: bool = False
    timings_per_token: bool = False
    response_fields: list[str] = []


class Chunk(Body):
    text: str
    filename: str = "tmp"


class Infill(Native):
    """A body of llama-server's /infill: the texts around a gap, other files, and how the answer begins."""

    prompt: str = ""
    input_prefix: str
    input_suffix: str
    input_extra: list[Chunk] = []


class Tokenize(Body):
    content: str | list[str | int]
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class Detokenize(Body):
    tokens: list[int]


B = TypeVar("B", bound=Body)
_KIND = re.compile(r"function-.*|\w+\[.*|\[key\]|[A-Z]\w*|str|bool|int|float")  # what pydantic names beside fields


def read(kind: type[B], body: bytes) -> B:
    """A body of this kind; raises BadRequest."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest("the body is not JSON that can be read") from error
    if not isinstance(given, dict):
        raise BadRequest("the body is not a JSON object")
    try:
        valid = kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part)[:100] for part in first["loc"] if not _KIND.fullmatch(str(part)))
        reason = first["msg"].removeprefix("Value error, ")
        raise BadRequest(f"{place}: {reason}", place.partition(".")[0] or None) from error
    except RecursionError as error:
        raise BadRequest("the body nests too deep") from error
    for name in IGNORED.keys() & given.keys():
        if given[name] not in (None, IGNORED[name]):
            _warn(name)
    return valid


def body_of(kind: type[Body]) -> Any:
    """A parameter of an endpoint: the body of its request."""

    async def given(request: Request) -> Body:
        return read(kind, await request.body())

    return Depends(given)
