"""llama-server's own endpoints, for the clients that speak its API rather than OpenAI's: editors and front-ends."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from llamabase.gguf.reader import GGUFFile
from llamabase.llama.infill import infill_prompt
from llamabase.sampling.settings import Sampling
from runner.loop.stops import StopFilter

from .requests import MOST_ANSWERS, BadRequest, Chat, Infill, Native, read
from .responses import Answer, Asked, Piece
from .server import Server

ANSWER = 4  # an infill leaves at least one token in so many of the context to the answer
BLANKS = " \t"


@dataclass(frozen=True)
class NativeAsked(Asked):
    """`n_indent`: blanks that each line but the first must begin with; `ms`: after which the next line ends it."""

    n_indent: int = 0
    ms: float = 0.0

    def answer(self) -> NativeAnswer:
        return NativeAnswer(self)


class NativeAnswer(Answer):
    """An answer of which llama-server's clients also learn what has ended it."""

    def __init__(self, asked: NativeAsked) -> None:
        super().__init__(asked)
        self._limits, self._told = asked, 0
        self.stop_type, self.stopping_word = "limit", ""

    def _pieces(self, steps: Iterator[tuple[str, bool]]) -> Iterator[Piece]:
        hold, limit = StopFilter(self.asked.stops), _Lines(self._limits.n_indent, self._limits.ms)
        for text, drafted in limit.through(hold.through(steps)):
            yield self._given(text, drafted, len(self.record.text) + len(text))
        if hold.stopped or limit.reached:
            while self._logprobs and self._logprobs[-1][0] >= len(self.record.text):  # of what is not given out
                self._logprobs.pop()
        if limit.reached:
            self.record.finish_reason = "length"
        elif hold.stopped:
            rest = "".join(text for text, _ in hold.rest())
            self.stopping_word = min((stop for stop in self.asked.stops if rest.startswith(stop)), key=len)
            self.record.finish_reason, self.stop_type = "stop", "word"
        elif self.record.finish_reason == "stop":
            self.stop_type = "eos"

    def _given(self, text: str, drafted: bool, reached: int) -> Piece:
        piece = super()._given(text, drafted, reached)
        piece.tokens = self.record.token_ids[self._told :]
        self._told = len(self.record.token_ids)
        return piece


class _Lines:
    """Ends a text that comes in pieces before a line, but for the first, that begins with fewer than `indent` blanks,
    or after the first line that is complete when `ms` have passed; 0 switches each off.
    """

    def __init__(self, indent: int, ms: float) -> None:
        self._indent, self._ms = indent, ms
        self._blanks: int | None = None  # that the line has begun with, while it has nothing else
        self.reached = False

    def through(self, pieces: Iterator[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
        began: float | None = None
        for text, drafted in pieces:
            began = time.perf_counter() if began is None else began
            kept = self._kept(text) if self._indent else len(text)
            late = self._ms > 0 and "\n" in text and 1000 * (time.perf_counter() - began) > self._ms
            self.reached = kept < len(text) or late
            if kept:
                yield text[:kept], drafted
            if self.reached:
                return

    def _kept(self, text: str) -> int:
        for i, character in enumerate(text):
            if self._blanks is not None:
                if character in BLANKS:
                    self._blanks += 1
                    continue
                if self._blanks < self._indent:
                    return i
            self._blanks = 0 if character == "\n" else None
        return len(text)


def settings_of(sampling: Sampling) -> dict[str, Any]:
    """Sampler settings by llama-server's names."""
    found = {field.name: getattr(sampling, field.name) for field in fields(Sampling) if field.name != "logit_bias"}
    return {"temperature": found.pop("temp"), **found}


class NativeForm:
    """How answers look to clients of /completion and /infill."""

    chat = False

    def __init__(self, server: Server, body: Native) -> None:
        self._body, self._server, self._told = body, server, dict[int, int]()

    def chunk(self, i: int, piece: Piece) -> dict[str, Any]:
        self._told[i] = self._told.get(i, 0) + len(piece.tokens)
        found = {
            "index": i,
            "content": piece.text,
            "tokens": piece.tokens,
            "stop": False,
            "id_slot": -1,
            "tokens_predicted": self._told[i],
        }
        return self._seen(found, piece.logprobs)

    def end(self, i: int, answer: NativeAnswer) -> dict[str, Any]:
        """The last event of an answer: its text has been told."""
        return self._final(i, answer, "", [])

    def whole(self, answers: Sequence[NativeAnswer], logprobs: Sequence[list[dict[str, Any]]]) -> Any:
        found = []
        for i, answer in enumerate(answers):
            tokens = answer.record.token_ids if self._body.return_tokens else []
            found.append(self._final(i, answer, answer.record.text, tokens, logprobs[i]))
        return found[0] if len(found) == 1 else found

    def _final(
        self,
        i: int,
        answer: NativeAnswer,
        content: str,
        tokens: list[int],
        logprobs: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        record, asked, n_prompt = answer.record, answer.asked, len(answer.asked.prompt)
        n_ctx = self._server.engine.context.n_ctx
        found = {
            "index": i,
            "content": content,
            "tokens": tokens,
            "id_slot": -1,
            "stop": True,
            "model": self._server.settings.alias,
            "tokens_predicted": record.tokens,
            "tokens_evaluated": n_prompt,
            "generation_settings": settings_of(asked.sampling)
            | {
                "n_ctx": n_ctx,
                "n_predict": -1 if self._body.max_tokens is None else self._body.max_tokens,
                "seed": -1 if asked.seed is None else asked.seed,
                "stop": asked.stops,
                "ignore_eos": self._body.ignore_eos,
                "n_probs": self._body.n_probs,
                "stream": self._body.stream,
            },
            "has_new_line": "\n" in record.text,
            "truncated": answer.stop_type == "limit" and n_prompt + record.tokens > n_ctx,
            "stop_type": answer.stop_type,
            "stopping_word": answer.stopping_word,
            "tokens_cached": n_prompt + max(record.tokens - 1, 0),
            "timings": answer.timings,
        }
        found = self._seen(found, logprobs)
        return _named(self._body.response_fields, found) if self._body.response_fields else found

    def _seen(self, found: dict[str, Any], logprobs: list[dict[str, Any]] | None) -> dict[str, Any]:
        return found | ({"completion_probabilities": logprobs} if self._body.n_probs and logprobs is not None else {})


def _named(paths: Sequence[str], found: dict[str, Any]) -> dict[str, Any]:
    """Some fields only; a/b names one inside another and stays its name. Those that are not there are left out."""
    chosen = {}
    for path in paths:
        value: Any = found
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            chosen[path] = value
    return chosen


def add_native(app: FastAPI, server: Server, answer: Callable[..., Awaitable[Response]]) -> None:
    """Add the endpoints to an application; `answer` computes and sends what is asked."""
    engine, settings = server.engine, server.settings

    def asked(body: Native, prompts: list[list[int]]) -> list[Asked]:
        if len(prompts) * body.n > MOST_ANSWERS:
            raise BadRequest(f"prompt: at most {MOST_ANSWERS} answers at once", "prompt")
        return [
            NativeAsked(**vars(each), n_indent=body.n_indent, ms=body.t_max_predict_ms)
            for prompt in prompts
            for each in server.asked(body, prompt)
        ]

    @app.post("/completion")
    @app.post("/completions")
    async def completion(request: Request) -> Response:
        body: Native = read(Native, await request.body())
        prompts = await run_in_threadpool(server.prompts, body.prompt)
        return await answer(server, request, body, await server.settle(body.has_schema, lambda: asked(body, prompts)))

    @app.post("/infill")
    async def infill(request: Request) -> Response:
        body: Infill = read(Infill, await request.body())
        n_ctx = engine.context.n_ctx
        room = n_ctx - body.limit(n_ctx // ANSWER)
        files = [(chunk.filename, chunk.text) for chunk in body.input_extra]
        texts = body.input_prefix, body.input_suffix, body.prompt
        prompt = await run_in_threadpool(infill_prompt, engine.model, *texts, files, room)
        return await answer(server, request, body, await server.settle(body.has_schema, lambda: asked(body, [prompt])))

    @app.post("/apply-template")
    async def apply_template(request: Request) -> Response:
        body: Chat = read(Chat, await request.body())
        prompt = await run_in_threadpool(lambda: engine.prompt_text(**server.conversation(body)))
        return JSONResponse({"prompt": prompt})

    @app.get("/slots")
    async def slots(request: Request) -> Response:
        found = server.conversations.slots
        if request.query_params.get("fail_on_no_slot") and server.conversations.busy:
            raise BadRequest("no slot is free: one request is computed at a time", status=503)
        facts = {"n_ctx": engine.context.n_ctx, "speculative": engine.drafter is not None}
        return JSONResponse([
            {"id": i, **facts, "is_processing": busy, "n_prompt_tokens": n} for i, (n, busy) in enumerate(found)
        ])  # fmt: skip

    @app.post("/slots/{slot}")
    async def slot(slot: int) -> Response:
        raise BadRequest("slots are neither saved nor restored nor erased here", status=501)

    @app.get("/props")
    async def props() -> Response:
        return JSONResponse(await run_in_threadpool(_props))

    def _props() -> dict[str, Any]:
        file = GGUFFile(engine.model.path)

        def token(which: str) -> str:
            found = file.get(f"tokenizer.ggml.{which}_token_id")
            known = isinstance(found, int) and 0 <= found < engine.model.n_vocab
            return engine.model.piece(found, special=True).decode("utf-8", "replace") if known else ""

        template = file.get("tokenizer.chat_template")
        return {
            "default_generation_settings": {"n_ctx": engine.context.n_ctx, "params": settings_of(settings.sampling)},
            "total_slots": settings.parallel,
            "model_alias": settings.alias,
            "model_path": engine.model.path.name,
            "chat_template": template if isinstance(template, str) else "",
            "bos_token": token("bos"),
            "eos_token": token("eos"),
            "modalities": {"vision": False, "audio": False},
            "endpoint_slots": True,
            "endpoint_props": False,
            "endpoint_metrics": settings.metrics,
            "is_sleeping": False,
            "draft": engine.drafter is not None,
            "vocabularies": server.vocabs,
            "speculative.n_max": settings.draft_max,
            "build_info": f"llama-cpp-python {version('llama-cpp-python')}",
        }
