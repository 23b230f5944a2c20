"""Gemma 4's assistants: a cut is its source bit for bit, and the text is the target's whatever one drafts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGMLQuantizationType as Quant

from corpus.answers import TargetAnswer
from gguf_trim.__main__ import main as gguf_trim
from gguf_trim.cut import lay_out, write
from gguf_trim.fit.calibrate import TeacherForced, read_assistant
from gguf_trim.format.assistant import KEPT, POST, PRE, Assistant
from gguf_trim.format.companion import Trimmed, companion_path
from gguf_trim.format.memory_bound import draft_weights, step_bytes
from gguf_trim.format.selection import CANDIDATES
from gguf_trim.format.speculator import Speculator
from gguf_trim.keep import Keep
from gguf_trim.prove import prove
from llamabase.errors import EngineError, FileFormatError, VocabularyMismatch
from llamabase.gguf.reader import GGUFFile, Tensor, bytes_of
from llamabase.gguf.writer import Output, Piece, field
from llamabase.llama.context import Cache, Context, ContextParams
from llamabase.llama.model import Model
from llamabase.llama.quantize import quantize
from llamabase.sampling.noise import Noise
from runner.bench.__main__ import main as bench
from runner.chat.__main__ import main as chat
from runner.draft.contracts import NoDrafter
from runner.draft.opening import open_drafter
from runner.exact import Law, check_prompt
from runner.exact import main as exact
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from . import toy_gemma
from .test_mtp import some
from .test_state_fed import F32, PROMPT, SAMPLINGS, answers_file, fitted, interrupt_at, read, table_of, text_of
from .toy import write_head, write_model
from .toy_gemma import HEAD, N_EMBD, WIDTH, write_assistant, write_gemma4

# What drafts: a whole assistant, a cut to 304 rows, and one to 16 rows with the text's and with the speculator's.
KINDS = {"whole": ("whole", "auto"), "trim": ("cut", "trim"), "context": ("spec", "context"), "spec": ("spec", "spec")}
GREEDY, SAMPLED = SAMPLINGS["greedy"], SAMPLINGS["few"]
F32_CONTEXT = {"n_ctx": 256, "n_threads": 1, "cache": F32}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Targets without and with embeddings for each layer, an assistant, and cuts of it."""
    folder = tmp_path_factory.mktemp("gemma")
    found = {
        "target": write_gemma4(folder / "target.gguf", seed=1),
        "layered": write_gemma4(folder / "layered.gguf", seed=2, n_per_layer=32),
        "whole": write_assistant(folder / "whole.gguf"),
    }
    for name, k in (("cut", 304), ("spec", 16)):
        found[name] = folder / f"{name}.gguf"
        write(lay_out(found["whole"], some(k), found["target"]), found[name])
    fitted(found["spec"], answers_file(folder), found["target"])
    return found


@pytest.fixture(scope="module")
def engines(files: dict[str, Path]) -> Iterator[Callable[..., Engine]]:
    """By what drafts (None: nothing), and the target."""
    opened: dict[tuple[str | None, str], Engine] = {}

    def get(what: str | None, target: str = "target") -> Engine:
        if (what, target) not in opened:
            name, vocab = KINDS[what] if what else ("", "auto")
            draft = files[name] if what else None
            opened[what, target] = Engine(LoadOptions(files[target], draft, vocab=vocab, **F32_CONTEXT))
        return opened[what, target]

    yield get
    for engine in opened.values():
        engine.close()


TYPES = [Quant.F32, Quant.F16, Quant.BF16, Quant.Q8_0, Quant.Q4_0, Quant.IQ4_NL]


@pytest.mark.parametrize(("name", "type_"), [("layered", Quant.F32), *(("target", type_) for type_ in TYPES)])
def test_a_cut_is_its_source_bit_for_bit(files, tmp_path: Path, name: str, type_: Quant) -> None:
    """Head, projections and layers in each type; for first drafts and for those that follow them."""
    source, cut = write_assistant(tmp_path / "a.gguf", head_type=type_, type_=type_), tmp_path / "cut.gguf"
    for k in (16, 304):
        write(lay_out(source, some(k), files[name]), cut)
        found = prove(cut, source, files[name])
        assert found.ok, found.differences
        assert (found.max_logit_difference, found.kept, found.positions) == (0.0, k, 24)
        assert found.logit_range > 10


@pytest.mark.slow
@pytest.mark.parametrize("type_", [*TYPES[1:], *(Quant[f"Q{n}_K"] for n in range(2, 7)), Quant.Q5_0, Quant.Q4_1])
def test_a_cut_of_e2bs_sizes_is_its_source_bit_for_bit(tmp_path: Path, monkeypatch, type_: Quant) -> None:
    """But for their tokens, and for the number of layers."""
    sizes = {"WIDTH": 1536, "N_EMBD": 256, "N_FF": 2048, "N_HEAD_KV": 1, "HEAD": 512, "HEAD_SWA": 256, "WINDOW": 512}
    for name, size in sizes.items():
        monkeypatch.setattr(toy_gemma, name, size)
    target, cut = write_gemma4(tmp_path / "t.gguf", head_type=Quant.Q6_K, n_per_layer=256), tmp_path / "cut.gguf"
    source = write_assistant(tmp_path / "a.gguf", head_type=type_, type_=type_, width=1536)
    for k in (16, 304, 512):
        write(lay_out(source, some(k), target), cut)
        assert prove(cut, source, target).max_logit_difference == 0


@pytest.mark.parametrize("type_", [Quant.F16, Quant.Q8_0, Quant.Q4_0, Quant.Q6_K])
def test_rows_of_the_targets_embeddings_are_its_own_in_any_type(tmp_path: Path, type_: Quant) -> None:
    target = write_gemma4(tmp_path / "t.gguf", head_type=type_)
    source, cut = write_assistant(tmp_path / "a.gguf"), tmp_path / "cut.gguf"
    write(lay_out(source, some(64), target), cut)
    assert prove(cut, source, target).max_logit_difference == 0


WRONG_CUTS = {
    "the scale of embeddings": ("gguf_trim.embedding_scale", None),
    "a number that is copied": (PRE, "does not copy what it is fed"),
    "a number that is returned": (POST, "does not copy what it is fed"),
}


@pytest.mark.parametrize("what", WRONG_CUTS)
def test_wrong_surgery_is_seen(files, tmp_path: Path, what: str) -> None:
    cut, (name, said) = tmp_path / "cut.gguf", WRONG_CUTS[what]
    write(lay_out(files["whole"], some(64), files["target"]), cut)
    file, data = GGUFFile(cut), bytearray(cut.read_bytes())
    if said is None:
        np.frombuffer(data, "<f4", 1, file.fields[name].value)[:] = 15.5
    else:
        np.frombuffer(data, "<f4", WIDTH + 1, file.tensors[name].offset)[-1] += 0.5
    cut.write_bytes(data)
    found = prove(cut, files["whole"], files["target"])
    assert not found.ok
    assert (said or "at position 0 the logit of token") in found.differences[0]


def test_projections_of_another_assistant_are_seen(files, tmp_path: Path) -> None:
    for name in KEPT:
        cut = tmp_path / "cut.gguf"
        write(lay_out(files["whole"], some(64), files["target"]), cut)
        path = companion_path(cut)
        tensor, data = GGUFFile(path).tensors[name], bytearray(path.read_bytes())
        np.frombuffer(data, "<f4", tensor.n_elements, tensor.offset)[-1] += 1
        path.write_bytes(data)
        assert f"of {name} is not row" in prove(cut, files["whole"], files["target"]).differences[0]
    path.write_bytes(bytes(data).replace(name.encode(), name.upper().encode()))
    with pytest.raises(FileFormatError, match=f"lacks the {name} of its assistant; trim that again"):
        Engine(LoadOptions(files["target"], cut, **F32_CONTEXT))


@pytest.mark.parametrize("type_", ["Q8_0", "Q4_0", "Q6_K"])
def test_a_requantised_cut_still_copies(files, tmp_path: Path, type_: str) -> None:
    """Only then is its step the one of the requantised source, but for what u loses in F32."""
    cut, source = tmp_path / "cut.gguf", tmp_path / "source.gguf"
    write(lay_out(files["whole"], some(304), files["target"]), cut)
    quantize(cut, cut, type_, KEPT)
    quantize(files["whole"], source, type_, KEPT)  # whose projections are as they were, too
    made, kept = GGUFFile(cut), Assistant.of(GGUFFile(cut)).copying
    assert all(made.read(made.tensors[name]) == kept[name].tobytes() for name in KEPT)
    assert made.tensors["token_embd.weight"].type != Quant.F32
    with pytest.raises(EngineError, match="which must stay F32; use Q8_0"):
        quantize(cut, cut, "F16", KEPT)
    text, found = [5, 9, 300, 97, 101], []
    for path in (source, cut):
        with Engine(LoadOptions(files["target"], path, vocab="trim", **F32_CONTEXT)) as engine:
            read(engine, text)
            reading = engine.drafter.reading
            found.append([reading.begin(text)[0].copy(), reading.follow(97)[0].copy()])
    ids = made.integers("gguf_trim.d2t")
    for whole, part in zip(*found, strict=True):
        assert (whole[ids] == part).all()


def test_a_cut_that_lost_its_copies_is_refused(files, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    write(lay_out(files["whole"], some(304), files["target"]), cut)
    quantize(cut, cut, "Q8_0")
    with pytest.raises(FileFormatError, match=f"its {PRE} is no longer F32; trim the original assistant again"):
        Engine(LoadOptions(files["target"], cut, **F32_CONTEXT))


@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("what", KINDS)
def test_the_text_is_the_plain_one(engines, eager, what: str, kind: str) -> None:
    engine, sampling = engines(what), SAMPLINGS[kind]
    engine.measure()
    plain = text_of(engines(None), sampling, draft_max=0, seed=3)
    for draft_max in (1, 3, 8, None):
        assert text_of(engine, sampling, draft_max=draft_max, seed=3) == plain


@pytest.mark.parametrize("what", ["whole", "spec"])
def test_the_text_is_that_of_a_target_with_embeddings_for_each_layer(engines, what: str) -> None:
    for sampling in (GREEDY, SAMPLED):
        plain = text_of(engines(None, "layered"), sampling, draft_max=0, seed=3)
        assert text_of(engines(what, "layered"), sampling, draft_max=3, seed=3) == plain


@pytest.mark.parametrize("what", KINDS)
def test_some_drafts_stand_and_some_do_not(engines, what: str) -> None:
    engine, prompt = engines(what), engines(what).model.tokenize(PROMPT)
    rounds = [r for seed in range(8) for r in engine.rounds(prompt, SAMPLED, max_tokens=30, draft_max=3, seed=seed)]
    assert {round_.accepted for round_ in rounds} >= {0, 1, 2}


def test_an_assistant_that_is_always_wrong_changes_nothing(engines, files, tmp_path: Path) -> None:
    """All its logits are 0, so it always drafts token 0."""
    zeros = write_assistant(tmp_path / "a.gguf", sharpness=0.0)
    with Engine(LoadOptions(files["target"], zeros, **F32_CONTEXT)) as engine:
        rounds = list(engine.rounds(engine.model.tokenize(PROMPT), GREEDY, max_tokens=40, draft_max=4))
    assert {tuple(round_.drafted) for round_ in rounds[:-4]} == {(0, 0, 0, 0)}
    assert sum(round_.accepted for round_ in rounds) == 0
    found = [token for round_ in rounds for token in round_.tokens]
    assert found == text_of(engines(None), GREEDY, 40, draft_max=0)


def test_drafts_are_those_of_the_whole_assistant(engines, files) -> None:
    """Those that a cut can make, and with all candidates every one."""
    kept = set(GGUFFile(files["cut"]).integers("gguf_trim.d2t").tolist())
    whole, cut, spec = (engines(what) for what in ("whole", "trim", "spec"))
    text, n_kept = whole.model.tokenize(PROMPT * 2), 0
    for n in range(2, len(text)):
        for engine in (whole, cut, spec):
            read(engine, text[:n])
        logits = whole.drafter.reading.begin(text[:n])[0].copy()
        assert (cut.drafter.reading.begin(text[:n])[0] == logits[sorted(kept)]).all()
        one, other, every = (e.drafter.draft(text[:n], 4, GREEDY, Noise(0)) for e in (whole, cut, spec))
        assert every == one
        agree = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), 4)
        assert agree == 4 or one[agree] not in kept
        assert set(other) <= kept
        n_kept += agree
    assert n_kept > len(text)


def test_a_draft_is_reckoned_by_hand(engines, files, tmp_path: Path) -> None:
    """Of layers that add nothing: head x norm(P [16 E ; h]), with a row of the target's table and its normed state."""
    nothing = {f"blk.{i}.{n}.weight": np.zeros(s, np.float32) for i in (0, 1) for n, s in {
        "attn_output": (N_EMBD, 4 * (HEAD if i else HEAD // 2)), "ffn_down": (N_EMBD, N_EMBD),
    }.items()}  # fmt: skip
    path = write_assistant(tmp_path / "a.gguf", more=nothing)
    file, target = GGUFFile(path), files["target"]
    norm, pre, post, head = (table_of(path, n) for n in ("output_norm.weight", PRE, POST, "token_embd.weight"))
    embeddings, output = table_of(target, "token_embd.weight"), table_of(target, "output.weight")

    def step(token: int, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u = 0.7**2 * (pre @ np.append(16 * embeddings[token], state))
        c = u / np.sqrt((u**2).mean() + 1e-6) * norm[0]
        return head @ c, post @ c

    with Engine(LoadOptions(target, path, **F32_CONTEXT)) as engine:
        text = engine.model.tokenize(PROMPT)[:7]
        state_logits = engine.reader.read(text[:-1], 1)[0].copy()
        state = engine.context.recorders[0].rows[len(text) - 2]
        assert 30 * np.tanh(output @ state / 30) == pytest.approx(state_logits, abs=1e-3)  # Gemma caps its logits
        wanted, state = step(text[-1], state)
        assert engine.drafter.reading.begin(text)[0] == pytest.approx(wanted, abs=1e-3)
        token = int(wanted.argmax())
        assert engine.drafter.reading.follow(token)[0] == pytest.approx(step(token, state)[0], abs=1e-3)
    assert Assistant.of(file).width == WIDTH


@pytest.mark.parametrize("what", KINDS)
def test_a_draft_does_not_depend_on_what_was_drafted_before(engines, what: str) -> None:
    """After rounds of any outcome and other conversations, the logits are those of a fresh reading."""
    engine, rng = engines(what), np.random.default_rng(5)
    text, reading = engine.model.tokenize(PROMPT), engine.drafter.reading
    for _ in range(12):
        read(engine, text)
        drafts = engine.drafter.draft(text, int(rng.integers(1, 5)), GREEDY, Noise(0))
        going_on = reading.begin(text)[0].copy()
        engine.reader.read([text[-1], *drafts], len(drafts) + 1)
        assert reading.room(text) == 0  # the target has read more
        engine.reader.keep([], 0)
        assert reading.room(text) == 0  # and less
        read(engine, text)
        assert (reading.room(text), reading.unread(text)) == (256 - len(text) + 1, 1)
        assert going_on == pytest.approx(reading.begin(text)[0], abs=0.02)
        text = [*text, *drafts[: int(rng.integers(0, len(drafts) + 1))], int(rng.integers(97, 122))]
        if rng.random() < 0.3:
            text = text[: len(text) // 2]  # another conversation


@pytest.mark.parametrize("what", ["whole", "trim"])
@pytest.mark.parametrize("cache", [Cache(), F32, Cache("q8_0", "q8_0"), Cache("f16", "f16", False)])
def test_drafting_leaves_the_targets_cache_as_it_was(files, what: str, cache: Cache) -> None:
    """To the bit, in every type of cache, and also where it is full but for one cell."""
    name, vocab = KINDS[what]
    text, after = np.random.default_rng(4).integers(3, 500, 64).tolist(), []
    options = LoadOptions(files["target"], files[name], 64, 1, vocab=vocab, cache=cache)
    for drafts in (False, True):
        with Engine(options) as engine:
            for n in (5, 40, 64):
                read(engine, text[:n])
                if drafts:
                    assert len(engine.drafter.draft(text[:n], 5, GREEDY, Noise(0))) == min(5, 64 - n + 1)
                assert engine.context._held() == engine.context.recount() == n - 1
            after.append(engine.reader.read(text[-1:], 1).copy())
    assert (after[0] == after[1]).all()


def test_it_is_where_its_target_is(files) -> None:
    with pytest.raises(EngineError, match=r"whole\.gguf: attends to its target's cache, so it must be on the"):
        Engine(LoadOptions(files["target"], files["whole"], 64, 1, device_draft="none"))
    same = {"device": "none", "device_draft": "none", "n_gpu_layers_draft": 0}
    Engine(LoadOptions(files["target"], files["whole"], 64, 1, **same)).close()


def test_drafting_ends_where_the_context_does(files) -> None:
    with (
        Engine(LoadOptions(files["target"], files["cut"], 128, 1, vocab="trim", cache=F32, n_batch=32)) as engine,
        Engine(LoadOptions(files["target"], None, 128, 1, cache=F32, n_batch=32)) as other,
    ):
        prompt = "the sea and the tea " * 11
        n = 128 - len(engine.model.tokenize(prompt)) + 1
        assert 10 < n < 60
        found = text_of(engine, GREEDY, n + 50, prompt, draft_max=3)
        assert len(found) == n
        assert found == text_of(other, GREEDY, n + 50, prompt, draft_max=0, drafter=NoDrafter())


@pytest.mark.parametrize("what", ["whole", "spec"])
def test_interruptions_anywhere_leave_it_usable(engines, monkeypatch, what: str) -> None:
    engine = engines(what)
    plain = text_of(engines(None), SAMPLED, draft_max=0, seed=1)
    reading = engine.drafter.reading
    places = {
        (engine.context, "_decode"): 3,
        (engine.context.recorders[0], "take"): 2,
        (engine.context, "rewind"): 3,
        (reading.context, "_process"): 5,
        (reading, "begin"): 2,
        (reading, "follow"): 2,
    }
    interrupt_at(monkeypatch, engine, SAMPLED, places, plain)


def test_another_assistant_may_open_at_any_time(engines, files) -> None:
    """llama.cpp then forgets what the target's cache holds, so that is read again."""
    with Engine(LoadOptions(files["target"], files["whole"], **F32_CONTEXT)) as engine:
        plain = text_of(engine, SAMPLED, draft_max=3, seed=1)
        options = engine.weights.options.of_drafter(files["cut"], 256)
        other = open_drafter(options, engine.weights.vocabulary, engine.context)
        assert engine.context.n_past == engine.context._held() == 0
        for drafter in (other, engine.drafter, other):
            assert text_of(engine, SAMPLED, draft_max=3, seed=1, drafter=drafter) == plain
        other.close()
        with engine.share_weights() as sharing:
            assert sharing.drafter.reading.context.model is engine.drafter.reading.context.model
            assert text_of(sharing, SAMPLED, draft_max=3, seed=1) == plain
        assert text_of(engine, SAMPLED, draft_max=3, seed=1) == plain
    assert plain == text_of(engines(None), SAMPLED, draft_max=0, seed=1)


def test_exact_finds_nothing(engines) -> None:
    engine = engines("spec")
    with Context(engine.model, 256, ContextParams(1, cache=F32), n_outputs=32) as context:
        for law in (Law(), Law(SAMPLED, 3)):
            found = check_prompt(engine, context, "p", engine.model.tokenize(PROMPT), 24, 3, law)
            assert (found.replay_faults, found.parts_at) == (0, None)


def test_memory_stays_over_a_hundred_turns(engines) -> None:
    from runner.bench.machine import resident

    engine, rng = engines("spec"), np.random.default_rng(1)
    for turn in range(100):
        prompt = " ".join(rng.choice(["tea", "the", "and", "sea", "in"], int(rng.integers(1, 20))))
        assert len(text_of(engine, SAMPLED, 8, prompt, draft_max=3, seed=turn)) == 8
        assert engine.context._held() == engine.context.recount() == len(engine.reader.held)
        if turn == 30:
            before = resident()
    assert resident() - before < 4 << 20


BAD_ASSISTANTS: dict[str, tuple[dict[str, object], str]] = {
    "no projection": ({"without": (PRE,)}, f"it has no {PRE} of 512 x 128"),
    "no other projection": ({"without": (POST,)}, f"it has no {POST} of 128 x 256"),
    "no head": ({"without": ("token_embd.weight",)}, "it has no token_embd.weight of 128 x 0"),
    "another projection": ({"keys": {"embedding_length_out": 320}}, f"it has no {PRE} of 640 x 128"),
    "no width": ({"keys": {"embedding_length_out": None}}, "states of 0 numbers are not wider than its own of 128"),
    "states as wide as its own": ({"keys": {"embedding_length_out": 128}}, "not wider than its own of 128"),
    "clusters": (
        {"more": {"masked_embd_centroids.weight": np.zeros((8, 128), np.float32)}}, "llama.cpp does not load its clus",
    ),
    "no windows": ({"keys": {"attention.sliding_window_pattern": None}}, "does not say which of its 2 layers"),
    "windows only": ({"keys": {"attention.sliding_window_pattern": [True] * 2}}, "does not say which of its 2 layers"),
    "heads that share badly": (
        {"keys": {"attention.head_count": 3}}, "in its layer 0, 3 heads cannot attend to 2",
    ),
    "other layers": ({"keys": {"nextn_predict_layers": 1}}, "only 1 of its 2 layers draft"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ASSISTANTS)
def test_a_bad_assistant_is_refused_by_name(files, tmp_path: Path, name: str) -> None:
    how, said = BAD_ASSISTANTS[name]
    path = write_assistant(tmp_path / "bad.gguf", **how)
    with pytest.raises(FileFormatError, match=said):
        Engine(LoadOptions(files["target"], path, n_ctx=64))
    with pytest.raises(FileFormatError, match=said):
        lay_out(path, some(16), files["target"])


WRONG_PAIRS: dict[str, tuple[Callable[[Path], Path], dict[str, object], type[Exception], str]] = {
    "another architecture": (write_model, {}, FileFormatError, "drafts for Gemma 4, and this target is llama"),
    "another width": (write_gemma4, {"width": 320}, FileFormatError, "reads states of 320 numbers, and this .* 256"),
    "other heads": (
        write_gemma4, {"keys": {"attention.head_count_kv": 1}}, FileFormatError, "layer 0 attends to 1 heads of 32",
    ),
    "longer keys": (
        write_gemma4, {"keys": {"attention.key_length": 128}}, FileFormatError,
        r"layer 1 attends to 2 heads of 128 \(64 rotated\) and 64 numbers without a window, and the target has 2 heads",
    ),
    "longer values": (
        write_gemma4, {"keys": {"attention.value_length_swa": 64}}, FileFormatError,
        r"layer 0 attends to 2 heads of 32 \(32 rotated\) and 64 numbers with a window",
    ),
    "another rotation": (
        write_gemma4, {"keys": {"rope.dimension_count": 128}}, FileFormatError, r"of 64 \(128 rotated\) and 64 numbers",
    ),
    "no rotation": (
        write_gemma4, {"keys": {"rope.dimension_count_swa": 0}}, FileFormatError, r"of 32 \(0 rotated\) and 32 numbers",
    ),
    "layers in another order": (
        lambda path: write_gemma4(path, keys={"attention.sliding_window_pattern": [False, True] * 2}), {},
        FileFormatError, "and the target has 2 heads of 64 .* without a window there",
    ),
    "fewer tokens": (write_gemma4, {"n_tokens": 560}, VocabularyMismatch, "it drafts 560 tokens, and this target"),
    "other tokens": (write_gemma4, {"letters": "zqxjkvbpygfw"}, VocabularyMismatch, "have different vocabularies"),
    "a part of a target": (
        lambda path: write_gemma4(path, without=("token_embd.weight",)), {}, FileFormatError,
        "the target has no token_embd.weight; join its parts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_PAIRS)
def test_a_wrong_pair_is_refused_by_name(tmp_path: Path, name: str) -> None:
    make, how, error, said = WRONG_PAIRS[name]
    target, path = make(tmp_path / "target.gguf"), write_assistant(tmp_path / "a.gguf", **how)
    with pytest.raises(error, match=said):
        lay_out(path, some(16), target)
    if make in (write_model, write_gemma4):  # the others do not load
        with pytest.raises(error, match=said):
            Engine(LoadOptions(target, path, n_ctx=64))


def test_what_reads_its_targets_states_is_not_a_target(files, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head.gguf", tokens=True)
    for path in (files["whole"], head):
        with pytest.raises(EngineError, match=rf"{path.name}: is a drafter .* give it as the drafter"):
            Engine(LoadOptions(path))


def test_a_cut_for_another_vocabulary_is_refused(files, tmp_path: Path) -> None:
    cut, source = tmp_path / "cut.gguf", write_assistant(tmp_path / "a.gguf", letters="zqxjkvbpygfw")
    write(lay_out(source, some(16)), cut)
    with pytest.raises(VocabularyMismatch, match="it was trimmed for another vocabulary"):
        Engine(LoadOptions(files["target"], cut, n_ctx=64))


def test_the_fit_counts_what_the_drafter_gets_right(engines, files) -> None:
    """Answers are read from their end; each first draft is the one that the runner makes there."""
    rng, text = np.random.default_rng(3), engines("trim").model.tokenize(PROMPT)
    engine = engines("trim")
    for n in range(20):  # every other token is what the cut drafts
        read(engine, text)
        text += engine.drafter.draft(text, 1, GREEDY, Noise(0)) if n % 2 else [int(rng.integers(600))]
    answer = TargetAnswer("a", "x", text[:9], text[9:])
    cut, right, states = Trimmed.open(files["cut"]), [], []
    for n in range(9, len(text)):
        read(engine, text[:n])
        logits, hidden = engine.drafter.reading.begin(text[:n])
        right.append(int(cut.d2t[logits.argmax()]) == text[n])
        states.append(hidden.copy())
    made = TeacherForced.of(files["cut"], [answer], cut, 1, target=files["target"])
    assert made.rights[0].tolist() == right
    assert 5 < sum(right) < 20
    positions = read_assistant(files["cut"], files["target"], [answer], lambda _: None, 1, cut)
    found = {at.token: at.hidden.copy() for at in positions}
    assert sorted(found) == list(range(2 - 9, len(text) - 9 + 1))
    for i, state in enumerate(states):
        assert found[i] == pytest.approx(state, abs=0.05)


def run(command: object, *arguments: str, code: int = 0) -> Result:
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == code, done.output
    return done


def test_commands_cut_prove_fit_and_run_one(files, tmp_path: Path) -> None:
    whole, cut, ids = str(files["whole"]), str(tmp_path / "cut.gguf"), tmp_path / "ids.txt"
    ids.write_text("\n".join(map(str, range(90, 130))))
    target = ["--target", str(files["target"])]
    said = json.loads(run(gguf_trim, "inspect", whole, "--json").stdout)
    assert (said["kind"], said["trimmable"], said["head"]["rows"]) == ("Gemma 4 assistant", True, 600)
    assert "mtp" not in said
    run(gguf_trim, "trim", whole, "-o", cut, "--keep", str(ids), *target)
    assert "difference 0 over 24" in run(gguf_trim, "verify", cut, "--source", whole, *target).stdout
    assert "give that as --target" in run(gguf_trim, "verify", cut, "--source", whole, code=1).stderr
    said = json.loads(run(gguf_trim, "inspect", cut, "--json").stdout)
    assert (said["kind"], said["k"] % 16, said["head"]["rows"]) == ("trimmed", 0, said["k"])
    assert "already trimmed" in run(gguf_trim, "trim", cut, "-o", str(tmp_path / "twice.gguf"), *target, code=1).stderr
    assert "cannot be planned for" in run(gguf_trim, "plan", *target, "--draft", whole, code=1).stderr
    answers = str(answers_file(tmp_path))
    assert "as --target" in run(gguf_trim, "speculator", cut, "--calibration", answers, code=1).stderr
    run(gguf_trim, "speculator", cut, "--calibration", answers, *target)
    for draft in (whole, cut):
        done = run(chat, *target, "--draft", draft, "-c", "256", "--prompt", "x", "-n", "8", "--temp", "0")
        assert "8 tokens" in done.stderr


def test_the_bench_measures_one(files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.bench.machine.COPIED", 16 << 20)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the sea"}\n')
    pair = ["--target", str(files["target"]), "--draft", str(files["spec"]), "-c", "256", "-t", "1"]
    full = ["--full", str(files["whole"])]
    steps = json.loads(run(bench, "steps", *pair, *full, "--repeat", "1").stdout.splitlines()[-1])
    assert steps["seconds"].keys() >= {"full", "trim", "context", "spec", "verify 8"}
    file = Trimmed.open(files["spec"])
    projections = sum(file.companion.tensors[name].n_bytes for name in KEPT)
    assert steps["bytes"]["trim"] == sum(t.n_bytes for t in file.file.tensors.values()) + projections
    assert draft_weights(files["spec"], files["target"]).fixed_params == (
        draft_weights(files["whole"], files["target"]).fixed_params
    )
    limited = ["--prompts", str(prompts), "-n", "6"]
    modes = "plain,full:2,trim:2,spec:2,auto"
    record = run(bench, "run", *pair, *full, *limited, "--modes", modes).stdout.splitlines()[-1]
    assert json.loads(record)["modes"]["trim:2"]["step"]["bytes"] == steps["bytes"]["trim"]
    assert json.loads(run(exact, *pair, *limited).stdout.splitlines()[-1])["replay_faults"] == 0


@pytest.mark.parametrize("requant", [(), ("--requant", "Q4_0")])
def test_make_trim_prepares_one(
    files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requant: tuple[str, ...]
) -> None:
    """Cut, proven and with its speculator; the second time nothing is left to do."""
    monkeypatch.setenv("GGUF_TRIM_CACHE", str(tmp_path))
    monkeypatch.setattr("gguf_trim.fit.calibrate.CONVERSATIONS", 4)
    pair = ["--target", str(files["target"]), "--draft", str(files["whole"]), "--k", "100"]
    for _ in range(2):
        done = run(gguf_trim, "prepare", *pair, *requant)
    assert "verifying" not in done.stderr
    made = Path(done.stdout.splitlines()[1])
    assert (len(Trimmed.open(made).d2t), Speculator.of(Trimmed.open(made)) is None) == (112, False)
    with Engine(LoadOptions(files["target"], made, vocab="spec", **F32_CONTEXT)) as engine:
        assert text_of(engine, GREEDY, 8, draft_max=2) == text_of(engine, GREEDY, 8, draft_max=0)


def test_only_this_runner_feeds_one(files) -> None:
    from runner import TrimmedDraft

    with pytest.raises(EngineError, match="is fed its target's states, which only this runner gives it"):
        TrimmedDraft(files["cut"], target=files["target"])
    with Model(files["whole"]) as model, pytest.raises(EngineError, match="requires ctx_other"):
        Context(model, 64)


def test_the_docs_say_what_a_step_reads(tmp_path: Path) -> None:
    """docs/gemma4.md: of an assistant of E2B's sizes, in a file whose tensors are holes."""
    n, width, n_ff, n_vocab = 256, 1536, 2048, 262144
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (n, n_vocab), PRE: (2 * width, n), POST: (n, width)}
    for layer, head in enumerate((256, 256, 256, 512)):
        block = {"attn_q": (n, 4 * head), "attn_output": (4 * head, n)}
        block |= {"ffn_gate": (n, n_ff), "ffn_up": (n, n_ff), "ffn_down": (n_ff, n)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    numbers: dict[str, int | np.ndarray] = {
        "embedding_length": n, "embedding_length_out": width, "block_count": 4, "nextn_predict_layers": 4,
        "attention.head_count": 4, "attention.head_count_kv": 1,
        "attention.sliding_window_pattern": np.array([1, 1, 1, 0]),
    }  # fmt: skip
    fields = [field("general.architecture", "gemma4-assistant"), field("tokenizer.ggml.model", "gpt2")]
    fields += [field(f"gemma4-assistant.{key}", value) for key, value in numbers.items()]
    fields.append(field("tokenizer.ggml.tokens", [f"t{i}" for i in range(n_vocab)]))
    found = {}
    for type_ in (Quant.Q8_0, Quant.Q4_0):
        pieces = [Piece(Tensor(k, v, type_, 0, bytes_of(type_, math.prod(v)))) for k, v in shapes.items()]
        output, path = Output(fields, pieces, 32), tmp_path / "holes.gguf"
        path.write_bytes(output.header)
        os.truncate(path, output.n_bytes)
        for k in (4096, 16384, 32768):
            cut = lay_out(path, lambda *_, k=k: Keep(np.arange(k, dtype=np.int32), 0, 0, None))
            found[k, type_] = cut.step_bytes / step_bytes(cut.source)
        head = cut.source.tensors["token_embd.weight"]
        rank = n // 8
        scores = bytes_of(Quant.Q4_0, n_vocab * rank) * (1 - 16384 / n_vocab) + 4 * n * rank
        found["added", type_] = (scores + CANDIDATES * head.row_bytes) / step_bytes(cut.source)
        found["head", type_] = head.n_bytes / step_bytes(cut.source)
    text = (Path(__file__).parent.parent / "docs" / "gemma4.md").read_text("utf-8")
    for k in (4096, 16384, 32768):
        assert f"| {k:,} rows | {found[k, Quant.Q8_0]:.2f} | {found[k, Quant.Q4_0]:.2f} |" in text
    assert f"rows: {found['head', Quant.Q8_0]:.2f} of what a draft step" in text
    assert f"add {found['added', Quant.Q8_0]:.2f} (Q8_0) and {found['added', Quant.Q4_0]:.2f} (Q4_0)" in text
