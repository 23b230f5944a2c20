"""llama-server's own endpoints: bodies as its clients send them, what they read of the answers, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamabase.errors import SettingError
from llamabase.llama.context import F32
from llamabase.llama.model import Model
from runner.loop.engine import Engine
from runner.loop.stops import TextPiece
from runner.loop.weights import LoadOptions
from runner.serve import requests
from runner.serve.infill import infill_prompt
from runner.serve.lines import LineLimit
from runner.serve.requests import Common
from runner.serve.server import Server

from . import toy
from .test_serve import serving

CLIENTS = json.loads((Path(__file__).parent / "data" / "clients.json").read_text("utf-8"))
GAP = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>"]


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy whose vocabulary has tokens to fill a gap in with."""
    usual = toy.vocabulary

    def with_gap(*arguments: Any) -> tuple[list[str], list[int], list[str]]:
        names, types, merges = usual(*arguments)
        first = next(i for i, name in enumerate(names) if name.startswith("[PAD"))
        names[first : first + len(GAP)], types[first : first + len(GAP)] = GAP, [3] * len(GAP)
        return names, types, merges

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "vocabulary", with_gap)
        return toy.write_model(tmp_path_factory.mktemp("code") / "code.gguf", seed=1)


@pytest.fixture(scope="module")
def server(code: Path) -> Iterator[tuple[str, Server]]:
    """A server of it whose texts end at their limit."""
    with serving(Engine(LoadOptions(code, n_ctx=512, n_threads=1, cache=F32)), draft_max=0) as found:
        yield found


@pytest.fixture(scope="module")
def model(server: tuple[str, Server]) -> Model:
    return server[1].engine.model


def ask(server: tuple[str, Server], path: str, **body: Any) -> Any:
    answer = httpx.post(server[0] + path, json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(server: tuple[str, Server], path: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, which end without [DONE], as llama-server's do."""
    answer = httpx.post(server[0] + path, json={**body, "stream": True}, timeout=30)
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.splitlines() if line.startswith("data:")]
    return [json.loads(line[5:]) for line in lines]


def refused(server: tuple[str, Server], path: str, **body: Any) -> tuple[str | None, str]:
    answer = httpx.post(server[0] + path, json=body, timeout=30)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error["param"], error["message"]


# --- the clients


def has(found: dict[str, Any], path: str) -> bool:
    """Whether an answer has a field; a.b is one inside another, while llama.vim's a/b is the field's own name."""
    value: Any = found
    for name in path.split("."):
        if name not in value:
            return False
        value = value[name]
    return True


@pytest.mark.parametrize("client", CLIENTS)
def test_clients_get_what_they_read(server: tuple[str, Server], client: str) -> None:
    path, body, reads = (CLIENTS[client][part] for part in ("path", "body", "reads"))
    if not body.get("stream"):
        found = ask(server, path, **body)
        assert all(has(found, field) for field in reads), found
        assert not reads or found.get("content", "x")
        assert body.get("response_fields") != [""] or found == {}
        return
    *pieces, last = events(server, path, **body)
    assert pieces and all(has(piece, field) for piece in pieces for field in reads)
    assert "".join(piece["content"] for piece in pieces)
    assert not any(piece["stop"] for piece in pieces)
    assert last["stop"] and last["content"] == "" and last["timings"]["predicted_n"] == last["tokens_predicted"] > 0


def test_a_warmed_cache_is_read_no_more(server: tuple[str, Server], model: Model) -> None:
    """llama.vim sends its files ahead with n_predict 0, and its completions find them read."""
    files = [{"text": "the sea and the king and the tea " * 6, "filename": "a"}]
    around = {"input_prefix": "", "input_suffix": "", "input_extra": files}
    warm = ask(server, "/infill", **around, n_predict=0, samplers=[])
    assert (warm["content"], warm["tokens_predicted"], warm["stop_type"]) == ("", 0, "limit")
    assert warm["timings"]["prompt_n"] > 60 and warm["timings"]["prompt_ms"] > 0
    found = ask(server, "/infill", **{**around, "input_prefix": "king", "input_suffix": "tea"}, n_predict=4)
    assert found["timings"]["cache_n"] > 60 and found["timings"]["prompt_n"] < 12
    assert [event["stop"] for event in events(server, "/completion", prompt="the", n_predict=0)] == [True]


# --- filling in


def test_a_gap_is_written_as_llama_server_writes_it(model: Model) -> None:
    prefix, suffix, middle, repository, file = (model.tokenize(name)[0] for name in GAP)
    assert model.tokenize("".join(GAP)) == [prefix, suffix, middle, repository, file]  # each is one token

    def ids(text: str) -> list[int]:
        return model.tokenize(text, special=False, add_bos=False)

    assert infill_prompt(model, "the king", "tea") == [prefix, *ids("the king"), suffix, *ids("tea"), middle]
    assert infill_prompt(model, "a", "b", "in<|im_end|>", [("f.py", "sea")]) == [
        repository, *ids("myproject\n"), file, *ids("f.py\n"), *ids("sea"), file, *ids("filename\n"),
        prefix, *ids("a"), *model.tokenize("in<|im_end|>"), suffix, *ids("b"), middle,
    ]  # fmt: skip
    assert infill_prompt(model, "<|im_end|>", "")[1] != model.tokenize("<|im_end|>")[0]  # code is no control token


@given(st.integers(0, 90), st.integers(0, 90), st.integers(0, 90), st.integers(3, 200))
def test_what_is_near_a_gap_stays(model: Model, n_before: int, n_after: int, n_file: int, room: int) -> None:
    """Never more than there is room for, none of it wasted, and what is left out lies farthest from the gap."""
    prefix, suffix, middle = (model.tokenize(name)[0] for name in GAP[:3])
    before, after, other = "[" * n_before, "]" * n_after, "{" * n_file
    whole = infill_prompt(model, before, after, "", [("f", other)])
    found = infill_prompt(model, before, after, "", [("f", other)], room)
    assert len(found) == min(room, len(whole))
    at, then = found.index(prefix), found.index(suffix)
    kept_before, kept_after, files = then - at - 1, len(found) - then - 2, found[:at]
    assert found[-1] == middle
    assert kept_before <= n_before and kept_after <= n_after
    assert not files or (kept_before, kept_after) == (n_before, n_after)  # files go first
    assert files == whole[: whole.index(prefix)][len(whole[: whole.index(prefix)]) - at :]  # from the front
    if kept_after < n_after:
        assert kept_after >= (room - 3) // 4
    if kept_before < n_before:
        assert kept_after <= max((room - 3) // 4, 0) or kept_after <= room - 3 - n_before


def test_a_suffix_is_filled_in_before(server: tuple[str, Server], model: Model) -> None:
    asked: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
    prompt = infill_prompt(model, "the king", "tea")
    filled = ask(server, "/v1/completions", prompt="the king", suffix="tea", **asked)
    assert filled["choices"][0]["text"] == ask(server, "/completion", prompt=prompt, **asked)["content"]
    assert filled["usage"]["prompt_tokens"] == len(prompt)
    assert filled["choices"][0]["text"] != ask(server, "/completion", prompt="the king", **asked)["content"]
    none = ask(server, "/v1/completions", prompt="the king", suffix="", **asked)
    assert none["choices"][0]["text"] == ask(server, "/completion", prompt="the king", **asked)["content"]
    assert refused(server, "/v1/completions", prompt=[1], suffix="tea") == (
        "prompt",
        "prompt: must be one text if a suffix is given",
    )


def test_a_vocabulary_without_such_tokens_says_so(toys: dict[str, Path]) -> None:
    with serving(Engine(LoadOptions(toys["target"], n_ctx=64, n_threads=1)), draft_max=0) as other:
        for path, body in (
            ("/infill", {"input_prefix": "a", "input_suffix": "b"}),
            ("/v1/completions", {"prompt": "a", "suffix": "b"}),
        ):
            _, said = refused(other, path, **body)
            assert "has no token for the prefix and the suffix and the middle of a gap" in said
    with Model(toys["target"], vocab_only=True) as model, pytest.raises(SettingError, match="use a model for code"):
        infill_prompt(model, "a", "b")


# --- prompts


def test_every_form_of_a_prompt(server: tuple[str, Server], model: Model) -> None:
    def said(prompt: Any) -> Any:
        return ask(server, "/completion", prompt=prompt, n_predict=8, temperature=0)

    ids = model.tokenize("the king and the sea")
    wanted = said("the king and the sea")["content"]
    mixed = [*model.tokenize("the king"), " and the sea"]
    assert {said(prompt)["content"] for prompt in (ids, mixed, {"prompt_string": "the king and the sea"})} == {wanted}
    for path in ("/completions", "/v1/completions"):  # the former is llama-server's own form, too
        found = ask(server, path, prompt=mixed, n_predict=8, temperature=0)
        assert (found["content"] if path == "/completions" else found["choices"][0]["text"]) == wanted
    several = said(["the tea", ids, mixed])
    assert [each["index"] for each in several] == [0, 1, 2]
    assert [each["content"] for each in several] == [said("the tea")["content"], wanted, wanted]
    streamed = events(server, "/completion", prompt=["the tea", ids], n_predict=8, temperature=0)
    for i, text in enumerate((said("the tea")["content"], wanted)):
        assert "".join(event["content"] for event in streamed if event["index"] == i) == text
    assert (
        len({each["content"] for each in ask(server, "/completion", prompt="the", n_cmpl=3, seed=1, temperature=3)})
        == 3
    )
    tokens = ask(server, "/tokenize", content=mixed)["tokens"]
    assert tokens == model.tokenize("the king") + model.tokenize(" and the sea")


def test_an_empty_prompt_is_bos(server: tuple[str, Server], model: Model) -> None:
    asked: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
    wanted = ask(server, "/completion", prompt=[model.bos], **asked)["content"]
    for empty in ([], ""):
        assert ask(server, "/completion", prompt=empty, **asked)["content"] == wanted
        assert ask(server, "/v1/completions", prompt=empty, **asked)["choices"][0]["text"] == wanted


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"prompt": [1, 700]}, "prompt", "there is no token 700"),
        ({"prompt": [True, 1]}, "prompt", "there is no token True"),
        ({"prompt": 5}, "prompt", "give a text, a list of token ids and texts"),
        ({"prompt": [[["a"]]]}, "prompt", "there is no token"),
        ({"prompt": {"text": "a"}}, "prompt", "give a text, a list"),
        ({"prompt": {"prompt_string": "a", "multimodal_data": ["x"]}}, "prompt", "this server reads text only"),
        ({"prompt": ["a"] * 17}, "prompt", "at most 16 answers at once"),
        ({"prompt": "a", "lora": [{"id": 0, "scale": 0.5}]}, "lora", "no adapter is loaded"),
        ({"prompt": "a", "n_probs": 3, "post_sampling_probs": True}, "post_sampling_probs", "before the samplers"),
        ({"prompt": "a", "min_tokens": 5}, "min_tokens", "no answer can be kept from ending"),
        ({"prompt": "a", "adaptive_target": 0.4}, "adaptive_target", "adaptive_p follows its own draws"),
        ({"prompt": "a", "mirostat": 2}, "mirostat", "is not supported"),
        ({"prompt": "a", "n_predict": -3}, "n_predict", "greater than or equal to -2"),
        ({"prompt": "a", "samplers": "kz"}, "samplers", "kz: is not a sampler"),
        ({"prompt": "a", "n_probs": 21}, "n_probs", "less than or equal to 20"),
    ],
)
def test_what_is_not_had_is_refused(server: tuple[str, Server], body: dict[str, Any], param: str, said: str) -> None:
    field, message = refused(server, "/completion", **body)
    assert field == param and said in message, message


def test_what_changes_no_text_is_ignored(server: tuple[str, Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set to nothing, and, with a line in the log, what only says how llama-server is to compute."""
    warned: list[str] = []
    monkeypatch.setattr(requests.log, "warning", lambda text, name: warned.append(name))
    requests._warn.cache_clear()
    asked: dict[str, Any] = {"prompt": "the", "n_predict": 6, "temperature": 0}
    plain = ask(server, "/completion", **asked)["content"]
    off: dict[str, Any] = {"lora": [{"id": 0, "scale": 0}], "min_tokens": 0, "adaptive_target": -0.01, "stop": ""}
    assert ask(server, "/completion", **asked, **off, cache_prompt=True, id_slot=-1)["content"] == plain
    assert not warned
    for _ in range(2):
        assert ask(server, "/completion", **asked, n_keep=4, id_slot=2, cache_prompt=False)["content"] == plain
    assert sorted(warned) == ["cache_prompt", "id_slot", "n_keep"]  # once each


# --- ends


def test_what_has_ended_it(server: tuple[str, Server], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"prompt": "the king", "n_predict": 30, "temperature": 0, "return_tokens": True}
    whole = ask(server, "/completion", **asked)
    text = whole["content"]
    assert (whole["stop_type"], whole["stopping_word"], whole["truncated"]) == ("limit", "", False)
    assert (whole["tokens_predicted"], len(whole["tokens"])) == (30, 30)
    stop = text[10:14]
    found = ask(server, "/completion", **asked, stop=["never", "", stop, stop + "x"])
    assert (found["content"], found["stop_type"], found["stopping_word"]) == (text[: text.index(stop)], "word", stop)
    last = events(server, "/completion", **asked, stop=[stop])[-1]
    assert (last["stop_type"], last["stopping_word"]) == ("word", stop)
    full = ask(server, "/completion", prompt="the king " * 90, n_predict=-1)
    assert full["truncated"] and full["stop_type"] == "limit"
    assert full["tokens_evaluated"] + full["tokens_predicted"] == 513
    end = whole["tokens"][5]
    monkeypatch.setattr(Model, "is_end", lambda self, token: token == end)
    found = ask(server, "/completion", **asked)
    assert (found["stop_type"], found["tokens"]) == ("eos", whole["tokens"][: whole["tokens"].index(end) + 1])
    monkeypatch.setitem(vars(server[1]), "ends", [end])
    goes_on = ask(server, "/completion", **asked, ignore_eos=True)
    assert (goes_on["stop_type"], goes_on["tokens_predicted"]) == ("limit", 30)
    assert end not in goes_on["tokens"]


def test_a_stream_says_the_same(server: tuple[str, Server]) -> None:
    asked: dict[str, Any] = {"prompt": "the king", "n_predict": 30, "temperature": 0, "n_probs": 4}
    whole = ask(server, "/completion", **asked, return_tokens=True)
    *pieces, last = events(server, "/completion", **asked)
    assert "".join(piece["content"] for piece in pieces) == whole["content"]
    assert [token for piece in pieces for token in piece["tokens"]] == whole["tokens"][: pieces[-1]["tokens_predicted"]]
    probs = [entry for piece in pieces for entry in piece["completion_probabilities"]]
    assert [entry["id"] for entry in probs] == whole["tokens"][: len(probs)]
    assert [entry["id"] for entry in whole["completion_probabilities"]] == whole["tokens"]
    for entry in probs:
        assert len(entry["top_logprobs"]) == 4 and entry["id"] == entry["top_logprobs"][0]["id"]  # greedy
    same = ("stop_type", "tokens_predicted", "tokens_evaluated", "generation_settings", "has_new_line", "model")
    assert {name: last[name] for name in same} | {"generation_settings": None} == (
        {name: whole[name] for name in same} | {"generation_settings": None}
    )
    settings = last["generation_settings"]
    assert (settings["temperature"], settings["n_predict"], settings["stream"]) == (0, 30, True)


TEXT = st.text("a \t\n", max_size=8)


@given(st.lists(TEXT, max_size=6), st.integers(1, 4))
def test_a_text_ends_before_a_line_of_too_few_blanks(pieces: list[str], indent: int) -> None:
    """However it is cut into pieces. The first line may begin as it will, for it goes on with the user's own."""
    text = "".join(pieces)
    wanted, first, *lines = len(text), *text.split("\n")
    at = len(first) + 1
    for n, line in enumerate(lines):
        blanks = len(line) - len(line.lstrip(" \t"))
        more = blanks < len(line) or n < len(lines) - 1  # another character follows the blanks, if only a line's end
        if blanks < indent and more:
            wanted = at + blanks
            break
        at += len(line) + 1
    limit = LineLimit(indent, 0)
    found = "".join(piece for piece, _ in limit.through(TextPiece(piece, False) for piece in pieces))
    assert (found, limit.reached) == (text[:wanted], wanted < len(text))


def test_time_is_up_at_the_end_of_a_line() -> None:
    def slowly() -> Iterator[TextPiece]:
        for piece in ("a", "\n", "b", "c", "d\ne", "f"):
            yield TextPiece(piece, False)
            time.sleep(0.02)

    limit = LineLimit(0, 30)
    assert [piece for piece, _ in limit.through(slowly())] == ["a", "\n", "b", "c", "d\ne"]
    assert limit.reached
    assert len(list(LineLimit(0, 0).through(slowly()))) == 6


def test_an_answer_ends_at_a_line(server: tuple[str, Server]) -> None:
    asked: dict[str, Any] = {"prompt": "the", "n_predict": 40, "grammar": 'root ::= "a\\n  b\\n c" "d"*', "n_probs": 1}
    found = ask(server, "/completion", **asked, n_indent=2)
    assert (found["content"], found["stop_type"], found["has_new_line"]) == ("a\n  b\n ", "limit", True)
    assert bytes(byte for entry in found["completion_probabilities"] for byte in entry["bytes"]).decode() == "a\n  b\n "
    assert found["truncated"] is False


# --- the rest


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ('["\\n", ":"]', ("\n", ":")),
        ('"\\n", ":", "\\""', ("\n", ":", '"')),
        ('"', ('"',)),
        (":", (":",)),
        ("3", ("3",)),
        (["a", "b"], ("a", "b")),
        (None, None),
    ],
)
def test_breakers_as_one_string(given: Any, wanted: Any) -> None:
    assert Common.model_validate({"dry_sequence_breakers": given}).dry_sequence_breakers == wanted


def test_numbers_as_clients_write_them(server: tuple[str, Server]) -> None:
    asked: dict[str, Any] = {"prompt": "the", "seed": 3}
    wanted = ask(server, "/completion", **asked, n_predict=6, top_k=40, temperature=1)["content"]
    assert ask(server, "/completion", **asked, n_predict=6.0, top_k=40.0, temperature="1")["content"] == wanted
    usual = ask(server, "/completion", **asked, n_predict=6)["content"]
    nothing: dict[str, Any] = dict.fromkeys(("temperature", "top_k", "stop", "samplers", "grammar", "n_probs", "lora"))
    assert ask(server, "/completion", **asked, n_predict=6, **nothing)["content"] == usual
    letters = ask(server, "/completion", **asked, n_predict=6, samplers="kt")["content"]
    assert letters == ask(server, "/completion", **asked, n_predict=6, samplers=["top_k", "temperature"])["content"]
    assert letters == ask(server, "/completion", **asked, n_predict=6, samplers="top_k;temperature")["content"]


def test_properties_templates_and_slots(server: tuple[str, Server], code: Path) -> None:
    url, inside = server
    props = httpx.get(f"{url}/props").json()
    assert props["chat_template"] == toy.CHAT_TEMPLATE
    assert (props["bos_token"], props["eos_token"]) == ("<|endoftext|>", "<|im_end|>")
    assert (props["model_path"], props["total_slots"]) == ("code.gguf", 4)
    assert props["default_generation_settings"]["params"]["temperature"] == 0.8
    messages = [{"role": "user", "content": "the sea"}]
    text = ask(server, "/apply-template", messages=messages)["prompt"]
    assert text == "<|im_start|>user\nthe sea<|im_end|>\n<|im_start|>assistant\n"
    asked: dict[str, Any] = {"temperature": 0, "n_predict": 8}
    chat = ask(server, "/v1/chat/completions", messages=messages, **asked)["choices"][0]["message"]["content"]
    assert ask(server, "/completion", prompt=text, **asked)["content"] == chat  # what ST and others build on
    slots = httpx.get(f"{url}/slots").json()
    assert [slot["id"] for slot in slots] == [0, 1, 2, 3]
    assert slots[0] == {"id": 0, "n_ctx": 512, "speculative": False, "is_processing": False} | {
        "n_prompt_tokens": len(inside.conversations._open[0].reader.held)
    }
    assert httpx.get(f"{url}/slots?fail_on_no_slot=1").status_code == 200
    assert httpx.post(f"{url}/slots/0?action=save").status_code == 501


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", " Bearer "])
def test_the_scheme_of_a_key_knows_no_case(toys: dict[str, Path], scheme: str) -> None:
    with serving(Engine(LoadOptions(toys["target"], n_ctx=64, n_threads=1)), api_key="secret", draft_max=0) as (url, _):

        def status(**headers: str) -> int:
            return httpx.get(f"{url}/v1/models", headers=headers).status_code

        assert status(authorization=f"{scheme} secret".strip()) == 200
        assert status(authorization=f"{scheme} Secret".strip()) == 401
        assert status(authorization="Basic secret") == 401
        assert status(**{"x-api-key": "secret"}) == 200


def test_bos_belongs_before_a_text_that_comes_first() -> None:
    """And before no other part of a mixed prompt, nor before ids."""
    server: Any = object.__new__(Server)
    tokenize = lambda text, special, add_bos, n_ctx: [1, len(text)] if add_bos else [len(text)]  # noqa: E731
    server.engine = SimpleNamespace(
        model=SimpleNamespace(n_vocab=9, bos=1, tokenize=tokenize), context=SimpleNamespace(n_ctx=9)
    )
    assert server.prompts(["ab", 5, "abc"]) == [[1, 2, 5, 3]]
    assert server.prompts([5, "abc"]) == [[5, 3]]
    assert server.prompts(["ab", [5, "a"]]) == [[1, 2], [5, 1]]
    assert server.mixed("ab", "content", True, False) == [2]
