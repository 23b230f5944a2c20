"""SpeculativeLM: the engine's own text, its settings and stop strings, and how it is opened."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import runner.lm
import runner.loop.engine
from gguf_trim.format.companion import companion_path
from gguf_trim.pairs.prepare import Prepared
from llamabase.errors import EngineError, FileFormatError, VocabularyMismatch
from llamabase.sampling.settings import Sampling
from runner import Cache, Record, SpeculativeLM
from runner.draft.opening import open_drafter
from runner.loop.engine import Engine
from runner.loop.stops import StopFilter, TextPiece
from runner.loop.weights import LoadOptions

from .conftest import engine_of

GREEDY = {"temperature": 0, "max_tokens": 40}


# --- the text


def test_it_is_the_engines_own_text(toys, lm) -> None:
    with Engine(LoadOptions(toys["target"], None, n_ctx=512)) as engine:
        messages = [{"role": "user", "content": "the king and the sea"}]
        wanted = Record()
        list(engine.pieces(engine.prompt(messages), Sampling(temp=0), wanted, max_tokens=40))
        raw = Record()
        list(engine.pieces(engine.model.tokenize("the king"), Sampling(temp=0), raw, max_tokens=40))
    done = lm.chat(messages, draft_max=3, **GREEDY)
    assert (done.text, done.token_ids, done.finish_reason) == (wanted.text, wanted.token_ids, "length")
    assert done.accepted > 0 and done.tau > 1
    assert lm.chat("the king and the sea", **GREEDY).text == wanted.text
    assert lm.chat(messages, draft_max=0, **GREEDY).text == wanted.text
    assert lm.chat(messages, draft_max=0, **GREEDY).drafted == 0
    assert lm.complete("the king", **GREEDY).text == raw.text != wanted.text
    record = Record()
    chunks = list(lm.stream(messages, record=record, **GREEDY))
    assert len(chunks) > 2 and "".join(chunks) == record.text == wanted.text


@pytest.mark.parametrize(("tokens", "wanted"), [(0, "0 tokens, "), (1, "1 token, "), (2, "2 tokens, ")])
def test_one_token_is_no_plural(tokens: int, wanted: str) -> None:
    assert Record(tokens=tokens).line().startswith(wanted)


def test_a_seed_fixes_the_text(lm) -> None:
    texts = [lm.chat("tea", temperature=1.5, max_tokens=30, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_every_field_of_sampling_is_a_setting(lm, monkeypatch) -> None:
    @dataclass(frozen=True)
    class More(Sampling):
        brand_new: float = 0.0

    monkeypatch.setattr(runner.lm, "Sampling", More)
    assert runner.lm._sampling({"temperature": 0.1, "top_k": 3, "brand_new": 2.0}) == More(0.1, 3, brand_new=2.0)
    assert runner.lm._sampling({}) == More()
    for wrong in ("temp", "n_predict"):
        with pytest.raises(TypeError, match=rf"'{wrong}'.*temperature, top_k.*brand_new.*draft_max"):
            lm.stream("x", **{wrong: 1})
    with pytest.raises(ValueError, match="not a number"):
        lm.chat("x", temperature=float("nan"))
    for wrong in ({"repeat_penalty": 0}, {"logit_bias": {5: float("inf")}}, {"presence_penalty": -1e39}):
        with pytest.raises(ValueError, match=r"not a number|greater than 0"):
            lm.chat("x", **wrong)
    with pytest.raises(EngineError, match="has no token -3"):
        lm.chat("x", logit_bias={-3: 1.0, 5: 1.0})
    with pytest.raises(ValueError, match="at least one"):
        lm.chat("x", max_tokens=0)
    with pytest.raises(ValueError, match="no empty stop"):
        lm.chat("x", stop="")
    with pytest.raises(TypeError, match="a string"):
        lm.stream([{"role": "user", "content": "x"}], template=False)


def test_none_stands_for_the_default(lm) -> None:
    """As for OpenAI's library; without a limit the context is."""
    usual = lm.chat("tea", seed=3, max_tokens=12).text
    nothing = dict.fromkeys(("temperature", "top_k", "stop", "grammar", "json_schema", "logit_bias", "samplers"))
    assert lm.chat("tea", seed=3, max_tokens=12, **nothing).text == usual
    full = lm.chat("tea", seed=3, max_tokens=None)
    assert (full.prompt_tokens + full.tokens, full.finish_reason) == (513, "length")
    assert full.text.startswith(usual)
    assert len({lm.chat("tea", temperature=1.5, seed=seed, max_tokens=12).text for seed in (None, -1, -1)}) == 3


def test_numbers_of_any_kind(lm) -> None:
    wanted = lm.chat("tea", seed=3, top_k=5, temperature=1.5, max_tokens=12, draft_max=2, logit_bias={5: -100.0}).text
    for kind in (float, np.int64, np.int8, np.float64):
        settings = {name: kind(n) for name, n in (("seed", 3), ("top_k", 5), ("max_tokens", 12), ("draft_max", 2))}
        assert lm.chat("tea", temperature=np.float32(1.5), logit_bias={"5": kind(-100)}, **settings).text == wanted
    assert runner.lm._sampling({"samplers": "top_k;temp"}).samplers == ("top_k", "temperature")
    assert runner.lm._sampling({"samplers": ["top_k"]}).samplers == ("top_k",)
    assert runner.lm._sampling({"dry_sequence_breakers": "and"}).dry_sequence_breakers == ("and",)
    for wrong in ({"top_k": 40.5}, {"max_tokens": "many"}, {"seed": 1.5}, {"draft_max": 0.5}, {"repeat_last_n": "x"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* is not a whole number"):
            lm.chat("tea", **wrong)
    with pytest.raises(ValueError, match=r"temperature='hot' is not a number"):
        lm.chat("tea", temperature="hot")


# --- stop strings

TEXT = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(st.lists(TEXT, max_size=5), STOPS)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    ends = [(end, end - len(s)) for s in stops for end in range(len(text) + 1) if text[:end].endswith(s)]
    hold = StopFilter(stops)

    def spoken() -> Iterator[TextPiece]:
        for n, piece in enumerate(pieces, 1):
            yield TextPiece(piece, n % 2 == 0)
            seen = "".join(pieces[:n])
            waits = max((k for s in stops for k in range(1, len(s)) if seen.endswith(s[:k])), default=0)
            assert hold.given == len(seen) - waits  # all else was given out before this went on

    given_out = list(hold.through(spoken()))
    wanted = text[: min(ends)[1]] if ends else text
    flags = [n % 2 == 0 for n, piece in enumerate(pieces, 1) for _ in piece]
    assert all(piece for piece, _ in given_out)
    assert [(c, drafted) for piece, drafted in given_out for c in piece] == list(zip(wanted, flags, strict=False))
    assert (hold.stopped, hold.given) == (bool(ends), len(wanted))


def test_stop_strings_end_an_answer(lm) -> None:
    whole = lm.chat("the king", **GREEDY).text
    stop = whole[10:14]
    at = whole.index(stop)
    done = lm.chat("the king", stop=["never said", stop], **GREEDY)
    assert (done.text, done.finish_reason) == (whole[:at], "stop")
    assert lm.chat("the king", stop=stop, **GREEDY).text == whole[:at]
    assert done.tokens < 40
    assert lm.chat("the king", **GREEDY).text == whole


# --- opening


def test_wrong_files_are_refused(toys, tmp_path) -> None:
    with pytest.raises(EngineError, match="is a trimmed drafter"):
        SpeculativeLM(toys["good-trimmed"])
    with pytest.raises(VocabularyMismatch):
        SpeculativeLM(str(toys["target"]), str(toys["foreign"]))
    with pytest.raises(FileFormatError):
        SpeculativeLM(tmp_path / "missing.gguf")


def test_a_pair_by_name(toys, monkeypatch) -> None:
    names = []

    def prepare(name: str) -> Prepared:
        names.append(name)
        return Prepared(toys["target"], toys["target"], toys["good-trimmed"])

    monkeypatch.setattr(runner.lm, "prepare", prepare)
    with SpeculativeLM.from_pair("a-pair", n_ctx=256, vocab="trim") as lm:
        assert lm.chat("the king", draft_max=3, **GREEDY).accepted > 0
        with pytest.raises(EngineError, match="does not fit a context of 256"):
            lm.chat("x" * 300)
    assert names == ["a-pair"]


@pytest.mark.slow
def test_the_default_pair_by_name() -> None:
    with SpeculativeLM.from_pair("qwen2.5-coder-1.5b") as lm:
        done = lm.chat("Name the largest planet.", temperature=0, max_tokens=30, draft_max=3)
        assert "Jupiter" in done.text and done.accepted > 0


def test_the_drafters_own_threads(toys, monkeypatch) -> None:
    """And its layers on the GPU; both are the target's where they are not given. n_ctx=0 is the model's own."""
    opened = []

    def noted(options, *others):
        opened.append((options.n_ctx, options.how.n_threads, options.model.n_gpu_layers))
        return open_drafter(options, *others)

    monkeypatch.setattr(runner.loop.engine, "open_drafter", noted)
    pair = toys["target"], toys["good-trimmed"]
    SpeculativeLM(*pair, n_ctx=0, n_threads=2, n_threads_draft=1, n_gpu_layers=3, n_gpu_layers_draft=0).close()
    SpeculativeLM(*pair, n_ctx=64, n_threads=2, n_gpu_layers=0).close()
    assert opened == [(512, 1, 0), (64, 2, 0)]


def test_flash_attention_is_as_it_was_asked_for(toys, monkeypatch) -> None:
    asked = []
    make = llama_cpp.llama_init_from_model

    def noted(model, params):
        asked.append(params.flash_attn_type)
        return make(model, params)

    monkeypatch.setattr(llama_cpp, "llama_init_from_model", noted)
    for flash in (True, False, None):
        caches = {"cache": Cache(flash=flash), "cache_draft": Cache("f32", "f32", flash)}
        SpeculativeLM(toys["target"], toys["good-trimmed"], n_ctx=64, **caches).close()
    on, off, auto = (getattr(llama_cpp, f"LLAMA_FLASH_ATTN_TYPE_{name}") for name in ("ENABLED", "DISABLED", "AUTO"))
    assert asked == [on, on, off, off, auto, off]


def test_a_link_to_a_trimmed_file(toys, tmp_path) -> None:
    """Its companion is beside the link, or else beside the file that the link leads to."""
    link = tmp_path / "link.gguf"
    link.symlink_to(toys["good-trimmed"])
    with SpeculativeLM(toys["target"], link, n_ctx=256) as lm:
        assert lm.chat("the king", draft_max=3, **GREEDY).accepted > 0
    (tmp_path / "blobs").mkdir()  # as in the Hub's cache, where every file is a link to a name that says nothing
    for name, blob in ((toys["good-trimmed"], "1f"), (companion_path(toys["good-trimmed"]), "2f")):
        shutil.copy(name, tmp_path / "blobs" / blob)
    (tmp_path / "d.gguf").symlink_to(tmp_path / "blobs" / "1f")
    with pytest.raises(FileFormatError, match=r"d\.vocab\.gguf: is missing"):
        SpeculativeLM(toys["target"], tmp_path / "d.gguf")
    (tmp_path / "d.vocab.gguf").symlink_to(tmp_path / "blobs" / "2f")
    SpeculativeLM(toys["target"], tmp_path / "d.gguf", n_ctx=64).close()


def test_importing_the_package_loads_nothing() -> None:
    root = Path(__file__).parent.parent
    code = "import sys, runner; print({'numpy', 'llama_cpp', 'runner.lm'} & set(sys.modules), runner.SpeculativeLM)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.startswith("set() <class 'runner.lm.SpeculativeLM'>"), done.stderr
    code = "import sys, runner.chat; print('runner.lm' in sys.modules, 'runner.draft_model' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "False False", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        runner.nothing  # noqa: B018
    assert {"SpeculativeLM", "TrimmedDraft"} <= set(dir(runner))


def test_a_json_schema(lm) -> None:
    """As a dict or its text; the toy's answer is a whole JSON of it."""
    schema = {"enum": ["tea", "sea"]}
    for form in (schema, json.dumps(schema)):
        answer = lm.chat("the king", temperature=0, max_tokens=5, json_schema=form, stop=['a"'])
        assert answer.text in ('"te', '"se')
    with pytest.raises(ValueError, match="not both"):
        lm.chat("the king", grammar='root ::= "a"', json_schema=schema)
    with pytest.raises(FileFormatError, match=r"cannot be obeyed: .*circle"):
        lm.chat("the king", json_schema={"type": "circle"})


def test_the_drafters_context_and_both_caches(toys) -> None:
    """Arrive where they are meant to; a type that does not exist is named."""
    with SpeculativeLM(
        toys["target"],
        toys["good-trimmed"],
        n_ctx=512,
        n_ctx_draft=128,
        cache=Cache("f32", "f32"),
        cache_draft=Cache("q8_0"),
    ) as lm:
        assert (engine_of(lm).context.n_ctx, engine_of(lm).drafter.n_ctx) == (512, 128)
        assert lm.chat("the king", **GREEDY, draft_max=3).tokens
    with pytest.raises(ValueError, match="q9_0: is not a KV cache type; choose one of f32, f16"):
        Cache("q9_0")
