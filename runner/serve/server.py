"""What the endpoints share: the engine, the settings, the conversations, and the counters."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import numpy as np
import prometheus_client as prometheus
from fastapi import Request
from gguf.constants import TokenType
from starlette.concurrency import run_in_threadpool

from llamabase.errors import FileFormatError, PromptTooLong
from llamabase.llama.rounds import LONGEST
from llamabase.sampling.settings import Sampling
from runner.draft.contracts import AUTO
from runner.loop.engine import Engine
from runner.tools.calls import HERMES, Form, Tools, control_tokens, form_of, guide_of

from .conversations import Conversations, Job, Unavailable
from .requests import BadRequest, Chat, Common
from .responses import Answer, Asked, Piece

PATIENCE = 0.25  # seconds between two checks whether a client is still there
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How to serve. `sampling` and `draft_max` are the defaults of a request."""

    alias: str
    sampling: Sampling
    draft_max: int | None = None
    api_key: str = ""
    parallel: int = 4
    waiting: int = 64
    metrics: bool = False
    cors: tuple[str, ...] = ()
    most_bytes: int = 16 << 20
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """A piece of one of several answers; None at the end of the answer."""

    index: int
    answer: Answer
    piece: Piece | None


class Metrics:
    """Counters, with vLLM's names for what speculation does."""

    def __init__(self, conversations: Conversations) -> None:
        self.registry = prometheus.CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> prometheus.Counter:
            return prometheus.Counter(f"gguf_run_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str) -> prometheus.Gauge:
            return prometheus.Gauge(f"gguf_run_{name}", text, registry=self.registry)

        self.prompt = counter("prompt_tokens", "Prompt tokens read.")
        self.tokens = counter("generation_tokens", "Tokens emitted.")
        self.seconds = counter("generation_seconds", "Seconds that the emitted tokens took.")
        self.requests = counter("requests", "Answers, by how they ended.", ("finish_reason",))
        self.rounds = counter("spec_decode_num_rounds", "Calls of the target.")
        self.drafts = counter("spec_decode_num_drafts", "Rounds that drafted.")
        self.drafted = counter("spec_decode_num_draft_tokens", "Tokens drafted.")
        self.accepted = counter("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.")
        self.by_position = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Accepted tokens, by their position in a round.", ("position",)
        )
        self.speed = gauge("tokens_per_second", "Speed of the last answer.")
        gauge("num_requests_running", "Requests being computed.").set_function(lambda: float(conversations.busy))
        gauge("num_requests_waiting", "Requests that wait.").set_function(lambda: float(conversations.waiting))

    def observe(self, answer: Answer) -> None:
        record = answer.record
        if record.rounds:  # else the prompt was not read to its end
            self.prompt.inc(record.prompt_tokens - answer.n_cached)
        self.tokens.inc(record.tokens)
        self.seconds.inc(max(record.seconds, 0.0))
        self.requests.labels(record.finish_reason).inc()
        self.rounds.inc(record.rounds)
        self.drafts.inc(len(record.accepted_by_round))
        self.drafted.inc(record.drafted)
        self.accepted.inc(record.accepted)
        for place in range(LONGEST):
            if n := sum(accepted > place for accepted in record.accepted_by_round):
                self.by_position.labels(str(place)).inc(n)
        if record.seconds > 0:
            self.speed.set(record.tokens_per_second)


class Server:
    """Everything that the endpoints share."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        if settings.draft_max is None:
            _ = engine.auto  # costs are measured now, not beside others
        self.conversations = Conversations(engine, settings.parallel, settings.waiting)
        self.metrics = Metrics(self.conversations)
        self.started = int(time.time())
        self._compiling, self._n_compiling = anyio.CapacityLimiter(1), 0
        self.vocabs = [AUTO] if engine.drafter is None else engine.drafter.vocabs

    async def in_thread(self, compiles: bool, work: Callable[[], T]) -> T:
        """The result of `work`, done in a thread; work that compiles a schema waits for the others that do.

        Raises Unavailable if too many wait.
        """
        if not compiles:
            return await run_in_threadpool(work)
        if self._n_compiling > self.settings.waiting:
            raise Unavailable("too many schemas wait to be compiled; try again")
        self._n_compiling += 1
        try:
            return await anyio.to_thread.run_sync(work, limiter=self._compiling)
        finally:
            self._n_compiling -= 1

    async def asked(self, body: Common, prompts: Sequence[list[int]], tools: Tools | None = None) -> list[Asked]:
        """Each of the answers that a body asks for. Raises BadRequest."""
        compiles = body.schema_wanted is not None or (tools is not None and tools.enforced)
        return await self.in_thread(compiles, lambda: [one for ids in prompts for one in self._asked(body, ids, tools)])

    def _asked(self, body: Common, prompt: list[int], tools: Tools | None) -> list[Asked]:
        n_ctx, n_vocab = self.engine.context.n_ctx, self.engine.model.n_vocab
        if len(prompt) > n_ctx:
            raise BadRequest(
                f"the prompt has {len(prompt)} tokens, {len(prompt) - n_ctx} more than the context of {n_ctx}",
                "messages" if isinstance(body, Chat) else "prompt",
                "context_length_exceeded",
            )
        if body.vocab not in self.vocabs:
            raise BadRequest(f"speculative.vocab: choose one of {', '.join(self.vocabs)}", "speculative.vocab")
        sampling, n_logprobs = body.sampling(self.settings.sampling, n_vocab), body.n_logprobs
        if body.ignore_eos:
            sampling = replace(sampling, logit_bias=dict(sampling.logit_bias) | dict.fromkeys(self.ends, -math.inf))
        first = Asked(
            prompt=prompt,
            sampling=sampling if tools is None else self._guided(sampling, tools, prompt),
            limit=body.limit(n_ctx - len(prompt) + 1),
            seed=None,
            draft_max=self.settings.draft_max if body.draft_max is None else body.draft_max,
            stops=body.stop,
            n_logprobs=None if n_logprobs is None else min(n_logprobs, n_vocab),
            tools=tools,
            vocab=body.vocab,
            form=HERMES if tools is None else self.form,
            shown=frozenset() if tools is None else frozenset(self.control_tokens.values()),
        )
        return [replace(first, seed=body.seed_of(i)) for i in range(body.n)]

    def rendered(self, body: Chat, render: Callable[..., T]) -> T:
        """A conversation as `Engine.prompt` or `prompt_text` renders it. Raises BadRequest."""
        messages = [message.for_template() for message in body.messages]
        variables = {**self.settings.template_kwargs, **body.chat_template_kwargs}
        answered = not (body.continued or body.add_generation_prompt)
        return render(messages, body.offered, variables=variables, continued=body.continued, answered=answered)

    def _guided(self, sampling: Sampling, tools: Tools, prompt: list[int]) -> Sampling:
        """Settings under which a forced call comes, and calls of strict functions obey. Raises BadRequest."""
        if not tools.enforced:
            return sampling
        if sampling.grammar or sampling.guide:
            param = "tool_choice" if tools.forced else "tools"
            raise BadRequest(f"{param}: a call cannot obey its own schema and another grammar; leave one out", param)
        model = self.engine.model
        end = b"".join(model.piece(token, special=True) for token in prompt[-8:])  # tokens that may spell <think>
        thinking = end.rstrip().endswith(b"<think>")
        try:
            guide = guide_of(self.form, tools, self.control_tokens, thinking)
        except FileFormatError as error:
            raise BadRequest(f"tools: {error}", "tools") from error
        return replace(sampling, guide=guide)

    @cached_property
    def form(self) -> Form:
        """How this model writes calls of tools."""
        return form_of(self.engine.weights.template)

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Ids of the control tokens that this model writes calls with, by name. Elsewhere they stand for no text."""
        vocabulary = self.engine.weights.vocabulary
        controls = np.flatnonzero(vocabulary.types == TokenType.CONTROL).tolist()
        return control_tokens(self.form, {vocabulary.tokens[i].decode("utf-8", "replace"): i for i in controls})

    @cached_property
    def ends(self) -> list[int]:
        """Every token that ends an answer."""
        model = self.engine.model
        return [token for token in range(model.n_vocab) if model.is_end(token)]

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The text of each token, control tokens included."""
        texts = {token: self.engine.model.piece(token, special=True) for token in set(ids)}
        return [texts[token] for token in ids]

    def known(self, ids: Sequence[Any], param: str) -> list[int]:
        """Token ids of this vocabulary. Raises BadRequest for others."""
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.engine.model.n_vocab:
                raise BadRequest(f"{param}: there is no token {str(token)[:20]}", param)
        return list(ids)

    def mixed(
        self, given: str | list[Any], param: str, special: bool = True, add_bos: bool = True, n_ctx: int | None = None
    ) -> list[int]:
        """Token ids of a text, or of a list of texts and ids, with BOS only before a text that comes first.

        Raises BadRequest, and what `Model.tokenize` raises.
        """
        ids: list[int] = []
        for i, part in enumerate([given] if isinstance(given, str) else given):
            if n_ctx is not None and len(ids) > n_ctx:
                raise PromptTooLong(f"the prompt has more than the context's {n_ctx} tokens; shorten it")
            if isinstance(part, str):
                ids += self.engine.model.tokenize(part, special, add_bos and i == 0, n_ctx)
            else:
                ids += self.known([part], param)
        return ids

    def prompts(self, given: Any) -> list[list[int]]:
        """Token ids of one prompt or several, each a text, a list of ids and texts, or {"prompt_string": ...}.

        An empty one is BOS. Raises BadRequest.
        """
        several = isinstance(given, list) and given and not any(isinstance(part, int) for part in given)
        return [self._prompt(each) for each in (given if several else [given])]

    def _prompt(self, given: Any) -> list[int]:
        if isinstance(given, dict) and "prompt_string" in given:
            if given.get("multimodal_data"):
                raise BadRequest("prompt: this server reads text only; leave multimodal_data out", "prompt")
            given = given["prompt_string"]
        if not isinstance(given, str | list):
            raise BadRequest('prompt: give a text, a list of token ids and texts, or {"prompt_string": ...}', "prompt")
        bos = self.engine.model.bos
        ids = self.mixed(given, "prompt", n_ctx=self.engine.context.n_ctx) or ([] if bos is None else [bos])
        if not ids:
            raise BadRequest("prompt: is empty, and this vocabulary has no BOS to begin with", "prompt")
        return ids

    async def compute(self, request: Request, asked: Sequence[Asked]) -> AsyncGenerator[Event, None]:
        """Events as they come, one answer after another; ends when the client goes away.

        Raises what the computation raised.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | BaseException | None]()

        def tell(event: Event | BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
                loop.call_soon_threadsafe(events.put_nowait, event)

        def run(engine: Engine) -> None:
            for i, each in enumerate(asked):
                answer = Answer(each)
                try:
                    with contextlib.closing(answer.pieces(engine)) as pieces:
                        for piece in pieces:
                            tell(Event(i, answer, piece))
                except BaseException:
                    answer.record.finish_reason = "cancelled" if job.cancelled.is_set() else "error"
                    raise
                finally:
                    self.metrics.observe(answer)
                tell(Event(i, answer, None))

        async def watch() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(PATIENCE)
            events.put_nowait(None)

        job = Job(asked[0].prompt, run, tell)
        self.conversations.submit(job)
        watching = asyncio.create_task(watch())
        ended = 0
        try:
            while ended < len(asked) and (event := await events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                ended += event.piece is None
                yield event
        finally:
            watching.cancel()
            job.cancelled.set()
