"""llama-server's own endpoints, for the clients that speak its API rather than OpenAI's: editors and front-ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from llamabase.gguf.reader import GGUFFile
from llamabase.sampling.settings import Sampling

from .formats import Json, send
from .infill import infill_prompt
from .requests import MOST_ANSWERS, BadRequest, Chat, Infill, Native, body_of
from .responses import Answer, TokenLogprob
from .server import Event, Server

ANSWER = 4  # an infill leaves at least 1/4 of the context to the answer


def settings_of(sampling: Sampling) -> Json:
    """Sampler settings by llama-server's names."""
    settings = asdict(sampling)
    del settings["logit_bias"]
    return {"temperature": settings.pop("temp"), **settings}


class NativeFormat:
    """How answers look to clients of /completion and /infill."""

    def __init__(self, server: Server, body: Native) -> None:
        self._body, self._server, self._n_sent = body, server, dict[int, int]()

    def whole(self, answers: Sequence[Answer]) -> Any:
        bodies = []
        for i, answer in enumerate(answers):
            tokens = answer.record.token_ids if self._body.return_tokens else []
            bodies.append(self._last(i, answer, answer.record.text, tokens, answer.logprobs))
        return bodies[0] if len(bodies) == 1 else bodies

    def events(self, event: Event) -> Iterator[Json]:
        i, piece = event.index, event.piece
        if piece is None:  # its text was sent
            yield self._last(i, event.answer, "", [], None)
            return
        self._n_sent[i] = self._n_sent.get(i, 0) + len(piece.tokens)
        yield {
            "index": i,
            "content": piece.text,
            "tokens": piece.tokens,
            "stop": False,
            "id_slot": -1,
            "tokens_predicted": self._n_sent[i],
        } | self._logprobs(piece.logprobs)

    def ending(self, answers: Sequence[Answer]) -> Iterator[bytes]:
        return iter(())

    def _last(
        self, i: int, answer: Answer, content: str, tokens: list[int], logprobs: list[TokenLogprob] | None
    ) -> Json:
        record, asked, body, n_prompt = answer.record, answer.asked, self._body, len(answer.asked.prompt)
        n_ctx = self._server.engine.context.n_ctx
        stop_type = "word" if answer.stopping_word else "eos" if record.finish_reason == "stop" else "limit"
        settings = {
            "n_ctx": n_ctx,
            "n_predict": -1 if body.max_tokens is None else body.max_tokens,
            "seed": -1 if asked.seed is None else asked.seed,
            "stop": asked.stops,
            "ignore_eos": body.ignore_eos,
            "n_probs": body.n_probs,
            "stream": body.stream,
        }
        whole = {
            "index": i,
            "content": content,
            "tokens": tokens,
            "id_slot": -1,
            "stop": True,
            "model": self._server.settings.alias,
            "tokens_predicted": record.tokens,
            "tokens_evaluated": n_prompt,
            "generation_settings": settings_of(asked.sampling) | settings,
            "has_new_line": "\n" in record.text,
            "truncated": stop_type == "limit" and n_prompt + record.tokens > n_ctx,
            "stop_type": stop_type,
            "stopping_word": answer.stopping_word,
            "tokens_cached": n_prompt + max(record.tokens - 1, 0),
            "timings": answer.timings,
        } | self._logprobs(logprobs)
        return _chosen(body.response_fields, whole) if body.response_fields else whole

    def _logprobs(self, given: list[TokenLogprob] | None) -> Json:
        return {} if given is None or not self._body.n_probs else {"completion_probabilities": given}


def _chosen(paths: Sequence[str], whole: Json) -> Json:
    """Some fields only; a/b names one inside another, and stays its name. Absent fields are left out."""
    chosen = {}
    for path in paths:
        value: Any = whole
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            chosen[path] = value
    return chosen


def add_native(app: FastAPI, server: Server) -> None:
    """Add the endpoints to an application."""
    engine, settings = server.engine, server.settings

    async def answer(request: Request, body: Native, prompts: list[list[int]]) -> Response:
        if len(prompts) * body.n > MOST_ANSWERS:
            raise BadRequest(f"prompt: at most {MOST_ANSWERS} answers at once", "prompt")
        asked = await server.asked(body, prompts)
        limited = [replace(each, n_indent=body.n_indent, ms=body.t_max_predict_ms) for each in asked]
        return await send(server, request, NativeFormat(server, body), body.stream, limited)

    @app.post("/completion")
    @app.post("/completions")
    async def completion(request: Request, body: Annotated[Native, body_of(Native)]) -> Response:
        return await answer(request, body, await run_in_threadpool(server.prompts, body.prompt))

    @app.post("/infill")
    async def infill(request: Request, body: Annotated[Infill, body_of(Infill)]) -> Response:
        n_ctx = engine.context.n_ctx
        room = n_ctx - body.limit(n_ctx // ANSWER)
        files = [(chunk.filename, chunk.text) for chunk in body.input_extra]
        texts = body.input_prefix, body.input_suffix, body.prompt
        return await answer(request, body, [await run_in_threadpool(infill_prompt, engine.model, *texts, files, room)])

    @app.post("/apply-template")
    def apply_template(body: Annotated[Chat, body_of(Chat)]) -> Response:
        return JSONResponse({"prompt": server.rendered(body, engine.prompt_text)})

    @app.get("/slots")
    async def slots(request: Request) -> Response:
        if request.query_params.get("fail_on_no_slot") and all(slot.busy for slot in server.conversations.slots):
            raise BadRequest("no slot is free: as many requests are computed as there are slots", status=503)
        facts = {"n_ctx": engine.context.n_ctx, "speculative": engine.drafter is not None}
        return JSONResponse([
            {"id": i, **facts, "is_processing": slot.busy, "n_prompt_tokens": slot.tokens}
            for i, slot in enumerate(server.conversations.slots)
        ])  # fmt: skip

    @app.post("/slots/{slot}")
    async def slot(slot: int) -> Response:
        raise BadRequest("slots are neither saved nor restored nor erased here", status=501)

    @app.get("/props")
    def props() -> Response:
        file = GGUFFile(engine.model.path)

        def token(which: str) -> str:
            id_ = file.get(f"tokenizer.ggml.{which}_token_id")
            known = isinstance(id_, int) and 0 <= id_ < engine.model.n_vocab
            return engine.model.piece(id_, special=True).decode("utf-8", "replace") if known else ""

        template = file.get("tokenizer.chat_template")
        properties = {
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
        return JSONResponse(properties)
