"""The server, asked by OpenAI's own client and by raw HTTP: same text as the library, and nothing that hangs."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from click.testing import CliRunner
from pydantic import BaseModel

from llamabase.llama.context import F32, Context
from llamabase.llama.model import Model
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import Sampling
from runner.loop.engine import Engine
from runner.loop.stops import TextPiece
from runner.loop.weights import LoadOptions
from runner.serve.__main__ import _bound
from runner.serve.__main__ import main as serve
from runner.serve.app import make_app
from runner.serve.conversations import Unavailable
from runner.serve.responses import Answer, Asked
from runner.serve.server import Server, Settings
from runner.tools.calls import Tools

from .test_soak import handles, own_memory

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def serving(engine: Engine, **settings: Any) -> Iterator[tuple[str, Server]]:
    """A server on a free port of its own; its address."""
    server = Server(engine, Settings("toy", Sampling(), **settings))
    http = uvicorn.Server(uvicorn.Config(make_app(server), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    while not http.started:
        time.sleep(0.01)
    port = http.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        http.should_exit = True
        server.conversations.close()
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def toy(toys: dict[str, Path]) -> Iterator[tuple[str, Server]]:
    """A toy pair in F32, whose texts end at their limit."""
    engine = Engine(LoadOptions(toys["target"], toys["good-trimmed"], n_ctx=512, cache=F32, cache_draft=F32))
    with serving(engine, draft_max=3, metrics=True) as found:
        yield found


@pytest.fixture(scope="module")
def library(toys: dict[str, Path]) -> Iterator[Engine]:
    with Engine(LoadOptions(toys["target"], n_ctx=512, cache=F32)) as engine:
        yield engine


@pytest.fixture
def client(toy: tuple[str, Server]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{toy[0]}/v1", api_key="none", max_retries=0)


SAY = [{"role": "user", "content": "the king and the sea"}]


def text_of(engine: Engine, prompt: list[int], sampling: Sampling, n: int, seed: int) -> str:
    rounds = engine.rounds(prompt, sampling, max_tokens=n, draft_max=0, seed=seed)
    data = b"".join(engine.model.piece(token) for round_ in rounds for token in round_.tokens)
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)  # a character that breaks off is left out


def test_an_answer_says_what_was_drafted_from(toy: tuple[str, Server]) -> None:
    """In both APIs; plain decoding drafts from nothing."""
    wanted = {"": "context", "trim": "trim", "context": "context"}
    bodies = {"/v1/chat/completions": {"messages": SAY}, "/completion": {"prompt": "the king"}}
    for (path, body), (vocab, used) in itertools.product(bodies.items(), wanted.items()):
        asked = body | {"max_tokens": 4} | ({"speculative.vocab": vocab} if vocab else {})
        assert httpx.post(toy[0] + path, json=asked).json()["timings"]["draft_vocab"] == used
        assert "draft_vocab" not in httpx.post(toy[0] + path, json=asked | {"speculative.n_max": 0}).json()["timings"]


def test_openai_chat_stream_and_seed(client: openai.OpenAI) -> None:
    """The same seed is the same text, streamed or not, with drafts or without."""
    asked: dict[str, Any] = {"model": "any", "messages": SAY, "max_tokens": 24, "seed": 5, "temperature": 1.2}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    assert whole.timings["predicted_n"] == 24  # type: ignore[attr-defined]
    for extra in ({}, {"speculative.n_max": 0}, {"speculative.n_max": 8}):
        again = client.chat.completions.create(**asked, extra_body=extra)
        assert again.choices[0].message.content == whole.choices[0].message.content
        assert (again.timings["draft_n"] == 0) == (extra == {"speculative.n_max": 0})  # type: ignore[attr-defined]
        chunks = list(
            client.chat.completions.create(
                **asked, stream=True, stream_options={"include_usage": True}, extra_body=extra
            )
        )
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == (
            whole.choices[0].message.content
        )
        assert (chunks[-1].usage.completion_tokens, chunks[-2].choices[0].finish_reason) == (24, "length")
    other = client.chat.completions.create(**{**asked, "seed": 6})
    assert other.choices[0].message.content != whole.choices[0].message.content


def test_openai_text_completions_and_several_answers(client: openai.OpenAI, toy: tuple[str, Server]) -> None:
    found = client.completions.create(model="any", prompt="the king", max_tokens=8, n=3, seed=1, temperature=2)
    assert len({choice.text for choice in found.choices}) == 3
    alone = client.completions.create(model="any", prompt="the king", max_tokens=8, seed=2, temperature=2)
    assert alone.choices[0].text == found.choices[1].text
    ids = toy[1].engine.model.tokenize("the king")
    by_ids = client.completions.create(model="any", prompt=ids, max_tokens=8, seed=2, temperature=2)
    assert by_ids.choices[0].text == alone.choices[0].text


def test_openai_stop(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="any", messages=SAY, max_tokens=40, temperature=0)
    text = whole.choices[0].message.content or ""
    stop = text[12:15]
    at = text.find(stop)
    for stream in (False, True):
        found = client.chat.completions.create(
            model="any", messages=SAY, max_tokens=40, temperature=0, stop=[stop, "never"], stream=stream
        )
        if stream:
            chunks = list(found)
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            said, reason = found.choices[0].message.content, found.choices[0].finish_reason
        assert (said, reason) == (text[:at], "stop")


def test_openai_logprobs_are_the_targets(client: openai.OpenAI, library: Engine, toy: tuple[str, Server]) -> None:
    found = client.chat.completions.create(
        model="any", messages=SAY, max_tokens=6, temperature=0, logprobs=True, top_logprobs=4
    )
    assert found.choices[0].logprobs is not None
    prompt = toy[1].engine.prompt(SAY)
    tokens: list[int] = []
    for entry in found.choices[0].logprobs.content or []:
        library.reader.keep([], 0)
        row = library.context.decode([*prompt, *tokens], 1)[0].astype(np.float64)
        library.context.truncate(0)
        law = row - row.max() - np.log(np.exp(row - row.max()).sum())
        token = int(row.argmax())
        assert entry.logprob == pytest.approx(law[token], abs=1e-3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(sorted(law)[:-5:-1], abs=1e-3)
        assert bytes(entry.bytes or []) == library.model.piece(token, special=True)
        tokens.append(token)
    assert len(tokens) == 6


class River(BaseModel):
    name: str
    long: bool


def test_openai_json_schema_into_a_model(client: openai.OpenAI) -> None:
    """Random weights say nonsense, but in this form."""
    schema = River.model_json_schema()
    schema["properties"]["name"]["maxLength"] = 6
    for seed in range(4):
        found = client.chat.completions.create(
            model="any",
            messages=SAY,
            max_tokens=100,
            seed=seed,
            response_format={"type": "json_schema", "json_schema": {"name": "river", "schema": schema}},
        )
        assert found.choices[0].finish_reason == "stop"
        assert len(River(**json.loads(found.choices[0].message.content or "")).name) <= 6


def test_tools_through_the_template_and_back(toys: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    """A grammar makes the toy call one; OpenAI's client reads the call, streamed or not."""
    from .toy import write_model

    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m['content'] }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.a }}{% endif %}{% endfor %}"
    )
    target = write_model(tmp_path / "t.gguf", seed=1, template=template)
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    grammar = (
        'root ::= "so <tool_call>" "{" "\\"name\\": \\"f\\", \\"arguments\\": {\\"a\\": " [0-9] "}}" "</tool_call>"'
    )
    with serving(Engine(LoadOptions(target, n_ctx=512, cache=F32))) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        asked: dict[str, Any] = {"model": "any", "messages": SAY, "max_tokens": 120, "temperature": 0, "tools": tools}
        found = client.chat.completions.create(**asked, extra_body={"grammar": grammar}).choices[0]
        assert found.finish_reason == "tool_calls", found
        assert found.message.tool_calls is not None
        call: Any = found.message.tool_calls[0]
        assert (call.function.name, set(json.loads(call.function.arguments))) == ("f", {"a"})
        assert (found.message.content or "").strip() == "so"
        chunks = list(client.chat.completions.create(**asked, stream=True, extra_body={"grammar": grammar}))
        assert chunks[-2].choices[0].delta.tool_calls[0].function.arguments == call.function.arguments
        assert "".join(c.choices[0].delta.content or "" for c in chunks).strip() == "so"
        back: Any = [*SAY, found.message, {"role": "tool", "tool_call_id": call.id, "content": "12"}]
        again = client.chat.completions.create(model="any", messages=back, max_tokens=4)
        assert again.usage is not None
        assert again.usage.completion_tokens == 4


WRONG: list[tuple[str, dict[str, Any] | str, str | None]] = [
    ("chat", "{", None),
    ("chat", "[]", None),
    ("chat", "[" * 5000, None),
    ("chat", {}, "messages"),
    ("chat", {"messages": []}, "messages"),
    ("chat", {"messages": [{"role": "king", "content": "x"}]}, "messages"),
    ("chat", {"messages": [5]}, "messages"),
    ("chat", {"messages": SAY, "temperature": -1}, "temperature"),
    ("chat", {"messages": SAY, "temperature": "hot"}, "temperature"),
    ("chat", {"messages": SAY, "top_p": float("nan")}, "top_p"),
    ("chat", {"messages": SAY, "max_tokens": 0}, "max_tokens"),
    ("chat", {"messages": SAY, "n": 1000}, "n"),
    ("chat", {"messages": SAY, "stop": ["x" * 2000]}, "stop"),
    ("chat", {"messages": SAY, "logit_bias": {"100000": 1}}, "logit_bias"),
    ("chat", {"messages": SAY, "logit_bias": {"king": 1}}, "logit_bias"),
    ("chat", {"messages": SAY, "mirostat": 2}, "mirostat"),
    ("chat", {"messages": SAY, "samplers": ["luck"]}, "samplers"),
    ("chat", {"messages": SAY, "speculative.vocab": "spec"}, "speculative.vocab"),
    ("chat", {"messages": SAY, "grammar": "root ::= ("}, None),
    ("chat", {"messages": SAY, "response_format": {"type": "xml"}}, "response_format"),
    ("chat", {"messages": SAY, "response_format": {"type": "json_schema"}}, "response_format"),
    ("chat", {"messages": SAY, "tool_choice": "required", "tools": [{}]}, "tool_choice"),
    ("chat", {"messages": SAY, "top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ("chat", {"messages": [{"role": "user", "content": "the sea " * 900}]}, "messages"),
    ("text", {"prompt": [1, 700]}, "prompt"),
    ("text", {"prompt": ["a", "b"]}, "prompt"),
    ("text", {"prompt": "a", "seed": 10**40}, "seed"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "body", "field"), WRONG)
def test_what_is_wrong_is_named(toy: tuple[str, Server], kind: str, body: Any, field: str | None) -> None:
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    data = body if isinstance(body, str) else json.dumps(body)
    answer = httpx.post(toy[0] + path, content=data)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, field, "invalid_request_error"), error
    assert "/" not in error["message"]


def test_openai_client_raises_its_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="more than the context of 512"):
        client.chat.completions.create(model="any", messages=[{"role": "user", "content": "the sea " * 900}])
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="any", input="x")


def random_request(rng: np.random.Generator) -> dict[str, Any]:
    words = rng.choice(["the", "king", "and", "sea", "tea", "in", "on"], int(rng.integers(1, 12))).tolist()
    settings: dict[str, Any] = {
        "prompt": " ".join(words),
        "max_tokens": int(rng.integers(1, 20)),
        "temperature": float(rng.choice([0, 0.7, 1.5, 3])),
        "top_k": int(rng.choice([0, 5, 40])),
        "top_p": float(rng.choice([1, 0.9])),
        "seed": int(rng.integers(1000)),
        "repeat_penalty": float(rng.choice([1, 1.2])),
        "speculative.n_max": int(rng.integers(0, 6)),
        "stream": bool(rng.integers(2)),
    }
    return settings


def said(url: str, body: dict[str, Any]) -> str:
    if not body["stream"]:
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])
    text = ""
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
    return text


def expected(library: Engine, body: dict[str, Any]) -> str:
    names = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "repeat_penalty": "repeat_penalty"}
    sampling = Sampling(**{to: body[name] for name, to in names.items()})
    return text_of(library, library.model.tokenize(body["prompt"]), sampling, body["max_tokens"], body["seed"])


@pytest.mark.parametrize("n", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_the_text_is_the_librarys(toy: tuple[str, Server], library: Engine, n: int) -> None:
    """Random requests; near-ties of two batch shapes are next to none in F32."""
    rng, different = np.random.default_rng(4), 0
    for _ in range(n):
        body = random_request(rng)
        different += said(toy[0], body) != expected(library, body)
    assert different <= 1


def test_turns_of_two_conversations_read_only_what_is_new(toy: tuple[str, Server]) -> None:
    texts = {name: f"{name} " + "the king and the sea and tea " * 8 for name in ("one", "two")}
    for turn in range(4):
        for name in texts:
            answer = httpx.post(f"{toy[0]}/v1/completions", json={"prompt": texts[name], "max_tokens": 6}).json()
            timings = answer["timings"]
            if turn:
                assert timings["prompt_n"] < 20, (name, turn)
                assert timings["cache_n"] > 40
            texts[name] += answer["choices"][0]["text"] + " and more"


def test_a_client_that_goes_ends_its_answer(toy: tuple[str, Server], monkeypatch: pytest.MonkeyPatch) -> None:
    url, server = toy
    before = server.metrics.registry.get_sample_value("gguf_run_requests_total", {"finish_reason": "cancelled"}) or 0
    decode = Context._decode

    def slow(self: Context, batch: Any) -> None:
        time.sleep(0.005)
        decode(self, batch)

    monkeypatch.setattr(Context, "_decode", slow)  # a whole answer would take over half a second
    for _ in range(3):
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={"prompt": "a", "stream": True, "max_tokens": 400}
        ) as s:
            next(s.iter_lines())
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 480}, timeout=0.05)
    end = time.monotonic() + 10
    while server.conversations.busy and time.monotonic() < end:
        time.sleep(0.02)
    assert not server.conversations.busy
    after = server.metrics.registry.get_sample_value("gguf_run_requests_total", {"finish_reason": "cancelled"})
    assert after >= before + 3  # the others may have been given up before they began
    assert said(url, {"prompt": "a", "max_tokens": 12, "temperature": 0, "stream": False})


def test_requests_that_need_not_wait_do_not_count_as_waiting(toys: dict[str, Path]) -> None:
    with (
        serving(Engine(LoadOptions(toys["target"], n_ctx=2048), 4), waiting=1, parallel=4) as (url, server),
        ThreadPoolExecutor(5) as pool,
    ):
        ask = partial(httpx.post, f"{url}/completion", json={"prompt": "a", "n_predict": 2}, timeout=30)
        with server.conversations._changed:  # which the computing thread needs to begin them
            asked = [pool.submit(ask) for _ in range(5)]
            time.sleep(0.5)
        assert [each.result().status_code for each in asked] == [200] * 5


def test_a_full_queue_says_so(toys: dict[str, Path], monkeypatch) -> None:
    with serving(Engine(LoadOptions(toys["target"], n_ctx=512)), waiting=1, parallel=1) as (url, server):
        go = threading.Event()
        monkeypatch.setattr(server.engine, "set_cancel_check", lambda go_on: go.wait())
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 3}, timeout=30))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for i, thread in enumerate(threads):
            thread.start()
            while not (server.conversations.busy if i == 0 else server.conversations.waiting):
                time.sleep(0.01)
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "a"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        go.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]


def test_keys_bounds_and_origins(toys: dict[str, Path]) -> None:
    settings = {"api_key": "secret", "most_bytes": 1000}
    with serving(Engine(LoadOptions(toys["target"], n_ctx=128)), **settings) as (url, _):
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer secre"}).status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{url}/v1/models", headers=key).json()["data"][0]["id"] == "toy"
        assert httpx.post(f"{url}/tokenize", content=b" " * 1001, headers=key).status_code == 413

        def endless() -> Iterator[bytes]:
            yield from [b" " * 600] * 4

        assert httpx.post(f"{url}/tokenize", content=endless(), headers=key).status_code in (400, 413)
        asked = {**key, "Origin": "http://evil.example"}
        assert "access-control-allow-origin" not in httpx.get(f"{url}/v1/models", headers=asked).headers
        assert httpx.get(f"{url}/metrics", headers=key).status_code == 501
    with serving(Engine(LoadOptions(toys["target"], n_ctx=128)), cors=("http://good.example",)) as (url, _):
        asked = {"Origin": "http://good.example"}
        assert httpx.get(f"{url}/v1/models", headers=asked).headers["access-control-allow-origin"] == asked["Origin"]


def test_the_rest_of_the_endpoints(toy: tuple[str, Server], toys: dict[str, Path]) -> None:
    url, server = toy
    ids = httpx.post(f"{url}/tokenize", json={"content": "the sea"}).json()["tokens"]
    assert ids == server.engine.model.tokenize("the sea")
    assert httpx.post(f"{url}/detokenize", json={"tokens": ids}).json() == {"content": "the sea"}
    pieces = httpx.post(f"{url}/tokenize", json={"content": "é", "with_pieces": True}).json()["tokens"]
    assert [piece["piece"] for piece in pieces] == [[0xC3], [0xA9]]
    props = httpx.get(f"{url}/props").json()
    assert (props["default_generation_settings"]["n_ctx"], props["model_alias"]) == (512, "toy")
    assert str(toys["target"].parent) not in httpx.get(f"{url}/props").text
    said(url, {"prompt": "the king and the sea", "max_tokens": 24, "temperature": 0, "stream": False})
    text = httpx.get(f"{url}/metrics").text
    assert 'gguf_run_spec_decode_num_accepted_tokens_per_pos_total{position="0"}' in text
    page = httpx.get(url)
    assert "<html" in page.text
    assert "http" not in page.text.replace("http-equiv", "")  # nothing is asked of elsewhere


def started(arguments: list[str], **environment: str) -> tuple[subprocess.Popen[str], str]:
    """The command itself, and the address it says."""
    command = [sys.executable, "-m", "runner.serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | environment)
    assert process.stderr is not None
    for line in process.stderr:
        if "listens on" in line:
            return process, line.split()[-1]
    raise AssertionError(f"ended with {process.wait()}")


def ended(process: subprocess.Popen[str]) -> int:
    code = process.wait(10)
    assert process.stderr is not None
    process.stderr.close()
    return code


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_time(toys: dict[str, Path], tmp_path: Path, signal_: int) -> None:
    """Also while an answer is streamed to a client that reads on: exit 0 within five seconds."""
    pair = ["--target", str(toys["target"]), "--draft", str(toys["good-trimmed"]), "-c", "512", "--draft-max", "0"]
    process, url = started(pair, GGUF_TRIM_CACHE=str(tmp_path))
    half = socket.create_connection((httpx.URL(url).host, httpx.URL(url).port))
    half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
    body = {"prompt": "a", "stream": True, "max_tokens": 500, "logit_bias": {"598": -100}}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        began = time.monotonic()
        process.send_signal(signal_)
        for _ in lines:
            pass
    with half:  # who has sent half of a request hears why there is no answer
        heard = half.makefile("rb").read()
    assert b" 503 " in heard and b"the server ends" in heard
    assert process.stderr is not None and "Traceback" not in process.stderr.read()
    assert ended(process) == 0
    assert time.monotonic() - began < 5


def test_a_full_cache_makes_prompts_wait_and_says_why_an_answer_failed(toys: dict[str, Path]) -> None:
    with (
        serving(Engine(LoadOptions(toys["target"], n_ctx=512, cache=F32), 4), parallel=4) as (url, _),
        ThreadPoolExecutor(4) as pool,
    ):

        def ask(first: int, read: int, n: int) -> httpx.Response:
            prompt = [first, *(3 + i % 300 for i in range(read))]
            body = {"prompt": prompt, "n_predict": n, "logit_bias": [[598, False]]}
            return httpx.post(f"{url}/completion", json=body, timeout=60)

        assert [answer.status_code for answer in pool.map(ask, range(3, 7), [300] * 4, [20] * 4)] == [200] * 4
        long = list(pool.map(ask, range(3, 5), [200] * 2, [200] * 2))
    assert sorted(answer.status_code for answer in long) == [200, 503]
    failed = max(long, key=lambda answer: answer.status_code)
    assert "which conversations share, is full" in failed.json()["error"]["message"] and "Retry-After" in failed.headers


def test_small_pieces_do_not_wait_for_each_other() -> None:
    """TCP holds a small piece back until the last one is acknowledged, up to 40 ms, unless told not to."""
    with (
        _bound("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_that_is_taken(toys: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(serve, ["--target", str(toys["target"]), "--port", port])
    assert done.exit_code == 1
    assert f"127.0.0.1:{port}: cannot listen there" in done.stderr


def test_the_page_of_docs_is_true(toys: dict[str, Path], tmp_path: Path) -> None:
    """Its curl lines and its Python, against a server of the command's own."""
    page = (ROOT / "docs" / "serve.md").read_text("utf-8")
    lines = [line.strip() for line in page.splitlines() if line.startswith("    ")]
    process, url = started(["--target", str(toys["target"]), "-c", "512"], GGUF_TRIM_CACHE=str(tmp_path))
    try:
        curls = [line.replace("http://127.0.0.1:8080", url) for line in lines if line.startswith("curl ")]
        assert len(curls) == 5
        for line in curls:
            done = subprocess.run(["bash", "-c", f"{line} -sS --fail"], capture_output=True, text=True)
            assert done.returncode == 0, (line, done.stderr)
            assert done.stdout.startswith(("{", "data:"))
        code = "\n".join(line for line in lines if line.startswith(("from openai", "client", "print")))
        done = subprocess.run(
            [sys.executable, "-c", code.replace("http://127.0.0.1:8080", url)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "ChatCompletion(" in done.stdout
    finally:
        process.terminate()
        assert ended(process) == 0


@pytest.mark.parametrize(
    ("pieces", "wanted"),
    [
        (["a<tool_ca", "ll>STOPb", "c"], "a<tool_call>"),
        (["a", "STOP<tool_call>{}", "c"], "a"),
        (["a<tool_call>{", "}STOP", "c"], "a<tool_call>{}"),
    ],
)
def test_a_stop_string_that_comes_with_a_call_ends_the_answer(pieces: list[str], wanted: str) -> None:
    left = (TextPiece(piece, False) for piece in pieces)
    engine: Any = SimpleNamespace(drafter=None, model=None, reader=SimpleNamespace(held=[]))
    engine.token_texts = lambda *_, **__: (piece for piece in left)
    answer = Answer(Asked([1], Sampling(temp=0), 9, None, 0, ["STOP"], None, Tools({"f": {}}), "auto"))
    said = "".join(piece.text for piece in answer.pieces(engine))
    assert (said, answer.record.text, answer.record.finish_reason) == (wanted, wanted, "stop")
    assert list(left) == [("c", False)]  # nothing is decoded after it


def fuzzed(rng: np.random.Generator) -> bytes:
    """A body that is a little, or wholly, wrong."""
    odd: list[Callable[[], Any]] = [
        lambda: None, lambda: int(rng.integers(-5, 5)), lambda: 10**30, lambda: float("nan"), lambda: float("inf"),
        lambda: "\ud800", lambda: "x" * int(rng.integers(0, 200)), list, dict, lambda: [[[[]]]],
        lambda: {"a": {"type": "object"}}, lambda: True, lambda: [1, "a", None], lambda: SAY, lambda: "</s>\0",
    ]  # fmt: skip
    names = [
        "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "n", "stop", "logit_bias", "tools",
        "grammar", "response_format", "json_schema", "stream", "stream_options", "logprobs", "top_logprobs", "samplers",
        "speculative.n_max", "repeat_last_n", "dry_sequence_breakers", "dry_multiplier", "tool_choice",
        "xtc_probability",
    ]  # fmt: skip
    body: dict[str, Any] = {"messages": SAY, "prompt": "the", "max_tokens": 1}
    for name in rng.choice(names, int(rng.integers(1, 4))):
        body[str(name)] = odd[int(rng.integers(len(odd)))]()
    data = json.dumps(body).encode()
    if rng.random() < 0.2:
        place = int(rng.integers(len(data)))
        data = data[:place] + bytes(rng.integers(0, 256, 2).tolist()) + data[place + 1 :]
    return data


def assert_flat(before: tuple[int, int]) -> None:
    """What was (own_memory, handles) has not grown, but by conversations opened and connections being closed."""
    assert own_memory() - before[0] < 24 << 20
    assert handles() - before[1] <= 8


@pytest.mark.parametrize("n", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_body_is_too_much_for_it(toy: tuple[str, Server], n: int) -> None:
    rng = np.random.default_rng(7)
    paths = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
    with httpx.Client(base_url=toy[0], timeout=30) as client:
        for i in range(n):
            if i == n // 4:
                before = own_memory(), handles()
            body = fuzzed(rng)
            answer = client.post(paths[int(rng.choice(4, p=[0.5, 0.3, 0.1, 0.1]))], content=body)
            assert answer.status_code in (200, 400), (i, body, answer.text)
        assert_flat(before)


@pytest.mark.parametrize(("clients", "requests"), [(8, 40), pytest.param(16, 300, marks=pytest.mark.slow)])
def test_a_load_of_clients(toy: tuple[str, Server], library: Engine, clients: int, requests: int) -> None:
    """Some go in the middle, some ask for nonsense; every answer that was not cut is right."""
    url, _ = toy
    rngs = [np.random.default_rng(i) for i in range(clients)]
    answered: list[tuple[dict[str, Any], str]] = []
    failures: list[BaseException] = []

    def one(rng: np.random.Generator) -> None:
        try:
            for _ in range(requests // clients):
                body = random_request(rng)
                kind = rng.random()
                if kind < 0.15:
                    with httpx.stream(
                        "POST", f"{url}/v1/completions", json={**body, "stream": True, "max_tokens": 200}, timeout=60
                    ) as stream:
                        next(stream.iter_lines())
                elif kind < 0.3:
                    wrong = httpx.post(f"{url}/v1/completions", content=fuzzed(rng), timeout=60)
                    assert wrong.status_code in (200, 400, 503)
                else:
                    answered.append((body, said(url, body)))
        except BaseException as error:
            failures.append(error)

    def all_of_them() -> None:
        threads = [threading.Thread(target=one, args=(rng,)) for rng in rngs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
            assert not thread.is_alive()
        assert not failures, failures[0]

    all_of_them()
    before = own_memory(), handles()
    all_of_them()
    assert_flat(before)
    different = sum(text != expected(library, body) for body, text in answered)
    assert len(answered) > requests / 2
    assert different <= 1


def test_noise_is_of_every_seed() -> None:
    """A client's seed may be any that fits 64 bits."""
    assert Noise((1 << 64) - 1).uniform(3) != Noise(1).uniform(3)


def test_null_is_as_good_as_nothing(client: openai.OpenAI, toy: tuple[str, Server]) -> None:
    """Clients send it for what they leave open."""
    nothing: dict[str, Any] = dict.fromkeys((
        "stream", "n", "logprobs", "stop", "tools", "response_format", "temperature", "max_completion_tokens", "seed",
        "speculative.vocab", "logit_bias", "stream_options", "tool_choice", "top_logprobs", "samplers",
    ))  # fmt: skip
    answer = httpx.post(f"{toy[0]}/v1/chat/completions", json={"messages": SAY, "max_tokens": 3, **nothing}).json()
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 3)
    body = {"messages": SAY, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": None}}
    assert httpx.post(f"{toy[0]}/v1/chat/completions", json=body).status_code == 200
    assert httpx.post(f"{toy[0]}/tokenize", json={"content": "a", "add_special": None}).status_code == 200
    form: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "x", "schema": None}}
    assert httpx.post(f"{toy[0]}/v1/chat/completions", json={**body, "response_format": form}).status_code == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"dry_multiplier": 1, "dry_sequence_breakers": ["c" * n for n in range(1, 3000)]}, "dry_sequence_breakers"),
        ({"samplers": "infill"}, "infill needs top_k before it"),
        ({"samplers": "top_k;infill", "top_k": 100_000}, "infill needs top_k before it"),
        ({"stop": ["a" * 200_000] * 64}, "stop.0: String should have at most 1000"),
        ({"logit_bias": {str(i): False for i in range(600)}}, "no token is left"),
        ({"echo": True}, "echo: "),
        ({"samplers": "e" * 300, "repeat_last_n": -1, "repeat_penalty": 1.1}, "samplers: 300 are more than"),
        ({"samplers": "t" * 32, "temperature": 1e-6}, "no distribution"),
        ({"response_format": {"type": "json_object", "schema": {"required": [["a"]]}}}, "response_format: "),
    ],
)
def test_what_would_hold_everybody_up_is_refused(toy: tuple[str, Server], body: dict[str, Any], said: str) -> None:
    """And what no token obeys. At once, and in one sentence."""
    began = time.monotonic()
    answer = httpx.post(f"{toy[0]}/v1/completions", json={"prompt": "the", "max_tokens": 2, **body}, timeout=60)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text
    assert time.monotonic() - began < 2
    usual = {"prompt": "the", "max_tokens": 2, "dry_multiplier": 1, "samplers": "dry;top_k;infill"}
    assert httpx.post(f"{toy[0]}/v1/completions", json=usual).status_code == 200


def test_schemas_that_compile_hold_up_nobody_else(toy: tuple[str, Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time, as many may wait as may for a conversation, and who asks for none does not wait at all."""
    server, go, running = toy[1], threading.Event(), []
    most = server.settings.waiting

    def slow() -> int:
        running.append(1)
        go.wait()
        return 1

    async def ask() -> tuple[list[Any], int]:
        waiting = [asyncio.create_task(server.in_thread(True, slow)) for _ in range(most + 4)]
        await asyncio.sleep(0.2)
        one = len(running)
        assert await server.in_thread(False, lambda: 2) == 2
        go.set()
        return await asyncio.gather(*waiting, return_exceptions=True), one

    found, one = asyncio.run(ask())
    assert one == 1
    assert [each for each in found if each == 1] == [1] * (most + 1)
    assert all(each == 1 or isinstance(each, Unavailable) for each in found)


def test_a_prompt_of_many_parts_is_refused_early(toy: tuple[str, Server], monkeypatch: pytest.MonkeyPatch) -> None:
    parts, honest = [], Model.tokenize
    monkeypatch.setattr(Model, "tokenize", lambda self, *how, **more: (parts.append(1), honest(self, *how, **more))[1])
    answer = httpx.post(f"{toy[0]}/v1/completions", json={"prompt": [65, *["the "] * 20_000]}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert len(parts) < 600


def test_clients_that_went_keep_no_places(toys: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Engine(LoadOptions(toys["target"], n_ctx=512)), waiting=2, parallel=1) as (url, server):
        go = threading.Event()
        monkeypatch.setattr(server.engine, "set_cancel_check", lambda go_on: go.wait())
        body = {"prompt": "a", "max_tokens": 2}
        for _ in range(3):  # one is computed, two wait
            with contextlib.suppress(httpx.TimeoutException):
                httpx.post(f"{url}/v1/completions", json=body, timeout=0.2)
        end = time.monotonic() + 5
        while server.conversations.waiting and time.monotonic() < end:
            time.sleep(0.01)
        assert server.conversations.waiting == 0
        threading.Timer(0.1, go.set).start()
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=30).status_code == 200


def test_what_the_end_cuts_off_is_told(toys: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits and who is being answered, several answers at once too: 503, or the error at the end of a stream."""
    decode = Context._decode

    def slow(self: Context, batch: Any) -> None:
        time.sleep(0.01)
        decode(self, batch)

    monkeypatch.setattr(Context, "_decode", slow)
    with serving(Engine(LoadOptions(toys["target"], n_ctx=512)), parallel=1) as (url, server):
        answers: list[httpx.Response] = []

        def ask(**more: Any) -> threading.Thread:
            def post() -> None:
                answers.append(
                    httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 400, **more}, timeout=30)
                )

            thread = threading.Thread(target=post)
            thread.start()
            return thread

        threads = [ask(n=2)]
        while not server.conversations.busy:
            time.sleep(0.01)
        threads += [ask(), ask(n=2)]
        while server.conversations.waiting < 2:
            time.sleep(0.01)
        server.conversations.stop()
        for thread in threads:
            thread.join(5)
            assert not thread.is_alive()
        assert [answer.status_code for answer in answers] == [503] * 3
        assert all(answer.json()["error"]["message"] == "the server ends" for answer in answers)
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 503


def test_a_long_last_batch_does_not_hold_up_the_end(toys: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun = threading.Event(), threading.Event()
    decode = Context._decode

    def slow(self: Context, batch: Any) -> None:
        begun.set()
        go.wait()
        decode(self, batch)

    engine = Engine(LoadOptions(toys["target"], n_ctx=512))
    monkeypatch.setattr(Context, "_decode", slow)
    with serving(engine) as (url, server):
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=0.2)
        assert begun.wait(5)
        assert not server.conversations.close(0.1)
        go.set()


def test_small_things_of_http(toy: tuple[str, Server], toys: dict[str, Path]) -> None:
    url = toy[0]
    assert httpx.head(f"{url}/health").status_code == httpx.head(url).status_code == 200
    refused = httpx.get(f"{url}/v1/completions")
    assert refused.status_code == 405 and refused.headers["allow"] == "POST"
    assert httpx.get(f"{url}/v1/models/toy").json()["id"] == "toy"
    assert httpx.get(f"{url}/v1/models/gpt").json()["error"]["code"] == "model_not_found"
    nested = httpx.post(f"{url}/v1/completions", json={"prompt": [[65, 66]], "max_tokens": 1, "logprobs": 0}).json()
    (top,) = nested["choices"][0]["logprobs"]["top_logprobs"]
    assert list(top) == nested["choices"][0]["logprobs"]["tokens"]
    origin = {"Origin": "http://site.example"}
    with serving(Engine(LoadOptions(toys["target"], n_ctx=64)), api_key="k", cors=(origin["Origin"],)) as (other, _):
        refused = httpx.get(f"{other}/v1/models", headers=origin)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, origin["Origin"])


def test_log_probabilities_end_with_the_text(toy: tuple[str, Server]) -> None:
    """Where a stop string ends what may have become a call: those of the text that is given out, all of them."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    asked: dict[str, Any] = {"messages": SAY, "tools": tools, "logprobs": True, "max_tokens": 40}
    for grammar, stop, text in (
        ('root ::= "abc <toolXYZ"', "X", "abc <tool"),
        ('root ::= "abc <tool_call>\\nking and"', "and", "abc <tool_call>\nking "),
    ):
        body = {**asked, "grammar": grammar, "stop": stop}
        choice = httpx.post(f"{toy[0]}/v1/chat/completions", json=body, timeout=30).json()["choices"][0]
        said = b"".join(bytes(each["bytes"]) for each in choice["logprobs"]["content"]).decode()
        assert choice["message"]["content"] == text
        assert said.startswith(text.rstrip()) and text.startswith(said.rstrip()[: len(text)]), (said, text)
