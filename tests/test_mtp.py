"""A target's own MTP block: the text is the target's whatever it drafts, also where its cache is a running state."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGMLQuantizationType as Quant
from gguf import GGUFValueType as Kind

from gguf_trim.__main__ import main as gguf_trim
from gguf_trim.cut import lay_out, write
from gguf_trim.describe import describe
from gguf_trim.format.companion import Trimmed
from gguf_trim.format.memory_bound import draft_weights
from gguf_trim.format.mtp import OWN_BLOCK, MtpBlock
from gguf_trim.format.speculator import Speculator
from gguf_trim.keep import ChooseRows, Keep
from gguf_trim.pairs.shapes import SHAPES, write_shape
from gguf_trim.prove import prove
from llamabase.errors import EngineError, FileFormatError, TrimError, VocabularyMismatch
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import is_block_alone
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.context import Context, ContextParams
from llamabase.llama.model import Model
from llamabase.sampling.noise import Noise
from runner.bench.__main__ import main as bench
from runner.chat.__main__ import main as chat
from runner.draft_model import TrimmedDraft
from runner.exact import Law, check_prompt
from runner.exact import main as exact
from runner.loop import engine as engine_module
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .encode import Table, field, gguf
from .test_state_fed import (
    F32,
    FEW,
    PROMPT,
    SAMPLINGS,
    answers_file,
    draft_after_any_reading,
    fitted,
    interrupt_at,
    read,
    text_of,
)
from .toy import write_model, write_mtp

ARCHITECTURES = ("qwen35", "glm4moe")
MTP = OWN_BLOCK


def some(k: int) -> ChooseRows:
    """k ids, the likely ones of FEW among them."""
    others = np.random.default_rng(k).permutation(600)
    ids = list(dict.fromkeys([*FEW, *others.tolist()]))[:k]
    return lambda *_: Keep(np.sort(ids).astype(np.int32), 0, 0, None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Targets by architecture, rows for each, and rows with a speculator."""
    folder = tmp_path_factory.mktemp("mtp")
    found: dict[str, Path] = {}
    for name in ARCHITECTURES:
        found[name] = write_mtp(folder / f"{name}.gguf", name, seed=1)
        for what, k in (("cut", 304), ("spec", 16)):
            found[f"{name} {what}"] = folder / f"{name}-{what}.gguf"
            write(lay_out(OWN_BLOCK, some(k), found[name]), found[f"{name} {what}"])
        fitted(found[f"{name} spec"], answers_file(folder), found[name])
    return found


@pytest.fixture(scope="module")
def engines(files: dict[str, Path]) -> Iterator[Callable[[str, str | None], Engine]]:
    """By architecture, and what it drafts with: "mtp" for the whole head, "cut", "spec", or None."""
    opened: dict[tuple[str, str | None], Engine] = {}

    def get(name: str, what: str | None) -> Engine:
        if (name, what) not in opened:
            draft = None if what is None else MTP if what == "mtp" else files[f"{name} {what}"]
            opened[name, what] = Engine(LoadOptions(files[name], draft, cache=F32, cache_draft=F32, n_ctx=256))
        return opened[name, what]

    yield get
    for engine in opened.values():
        engine.close()


@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("what", ["mtp", "cut", "spec"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_text_is_the_plain_one(engines, eager, name: str, what: str, kind: str) -> None:
    engine, sampling = engines(name, what), SAMPLINGS[kind]
    engine.measure()
    for seed in (3, 4):
        plain = text_of(engines(name, None), sampling, draft_max=0, seed=seed)
        for draft_max in (1, 3, 8, None):
            assert text_of(engine, sampling, draft_max=draft_max, seed=seed) == plain


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_some_drafts_stand_and_some_do_not(engines, name: str) -> None:
    engine, sampling = engines(name, "cut"), SAMPLINGS["few"]
    rounds = [
        round_
        for seed in range(8)
        for round_ in engine.rounds(engine.model.tokenize(PROMPT), sampling, max_tokens=30, draft_max=3, seed=seed)
    ]
    assert {round_.accepted for round_ in rounds} >= {0, 1, 2}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_draft_what_the_whole_head_does_where_that_was_kept(engines, files, name: str) -> None:
    """And llama.cpp computes no head for them; with all candidates the drafts are those of the whole one."""
    kept = set(GGUFFile(files[f"{name} cut"]).integers("gguf_trim.d2t").tolist())
    whole, cut, spec = (engines(name, what) for what in ("mtp", "cut", "spec"))
    text, n_kept = whole.model.tokenize(PROMPT * 2), 0
    for n in range(3, len(text)):
        for engine in (whole, cut, spec):
            read(engine, text[:n])
        logits = whole.drafter.reading.begin(text[:n])[0].copy()
        rows, state = cut.drafter.reading.begin(text[:n])
        assert rows == pytest.approx(logits[sorted(kept)], abs=2e-5)
        assert state == pytest.approx(whole.drafter.reading.begin(text[:n])[1], abs=1e-5)
        one, other, every = (e.drafter.draft(text[:n], 3, SAMPLINGS["greedy"], Noise(0)) for e in (whole, cut, spec))
        assert other[0] in kept
        assert one[0] not in kept or other[0] == one[0]
        assert every == one
        n_kept += one[0] in kept
    assert n_kept > 3
    assert cut.drafter.reading.context.pairs([1], np.zeros((1, 256), np.float32), True)[0].size == 0
    cut.drafter.settle()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_whole_head_is_one_of_the_vocabularies(engines, name: str) -> None:
    """Rows and the whole head take turns over one cache, and the text stays the plain one."""
    whole, spec = engines(name, "mtp"), engines(name, "spec")
    assert spec.drafter.vocabs == ["auto", *spec.drafter.candidates] == ["auto", "trim", "context", "spec", "full"]
    text, found, wanted = whole.model.tokenize(PROMPT * 2), [], []
    plain = text_of(engines(name, None), SAMPLINGS["few"], draft_max=0, seed=5)
    try:
        for n in range(3, len(text), 2):
            for vocab in ("trim", "full"):
                spec.drafter.vocab = vocab
                read(spec, text[:n])
                drafts = spec.drafter.draft(text[:n], 3, SAMPLINGS["greedy"], Noise(0))
            read(whole, text[:n])
            found.append(drafts)
            wanted.append(whole.drafter.draft(text[:n], 3, SAMPLINGS["greedy"], Noise(0)))
        assert found == wanted
        for vocab in ("full", "trim", "full"):
            spec.drafter.vocab = vocab
            assert text_of(spec, SAMPLINGS["few"], draft_max=3, seed=5) == plain
        assert spec.drafter.reading.context.head
    finally:
        spec.drafter.vocab = "auto"


@pytest.mark.parametrize("what", ["mtp", "cut"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_draft_does_not_depend_on_how_the_text_was_read(engines, name: str, what: str) -> None:
    draft_after_any_reading(engines(name, what))


def test_a_running_state_is_taken_back_or_read_anew(files) -> None:
    """Random batches and rewinds of any depth: the logits are those of a fresh reading, whatever was forgotten."""
    rng = np.random.default_rng(6)
    with (
        Model(files["qwen35"]) as model,
        Context(model, 128, ContextParams(cache=F32), rewinds=4) as context,
        Context(model, 128, ContextParams(cache=F32)) as fresh,
    ):
        assert (context.recurrent, context.rewinds, fresh.rewinds) == (True, 4, 0)
        text: list[int] = []
        depths: list[bool] = []
        for _ in range(200):
            batch = rng.integers(97, 500, int(rng.integers(1, 9))).tolist()
            if len(text) + len(batch) > 100:
                text = text[: context.rewind(0)]
            text += batch
            found = context.decode(text[context.n_past :], 1)[0].copy()
            fresh.truncate(0)
            assert found == pytest.approx(fresh.decode(text, 1)[0], abs=0.02)
            for _ in range(int(rng.integers(0, 3))):  # a copy is of use once
                to = max(0, len(text) - int(rng.integers(0, 7)))
                depths.append(context.rewind(to) == to)
                text = text[: context.n_past]
        assert 20 < sum(depths) < len(depths) - 20
        with pytest.raises(EngineError, match="cannot be rewound to token 1"):
            context.truncate(0)
            context.decode(list(range(100, 120)), 0)
            context.truncate(1)


def test_an_interrupted_batch_is_not_gone_on_from(files, monkeypatch) -> None:
    """llama.cpp may have taken some of it in: its copies are of other tokens than is thought."""
    with Model(files["qwen35"]) as model, Context(model, 64, ContextParams(cache=F32), rewinds=4) as context:
        context.decode(list(range(100, 110)), 0)
        honest = context._decode

        def interrupted(batch: object) -> None:
            honest(batch)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(context, "_decode", interrupted)
            context.decode([5, 6], 1)
        assert (context.n_past, context.recount()) == (10, 12)
        assert context.rewind(10) == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_interruptions_anywhere_leave_it_usable(engines, monkeypatch, name: str) -> None:
    engine, sampling = engines(name, "cut"), SAMPLINGS["few"]
    plain = text_of(engines(name, None), sampling, draft_max=0, seed=1)
    pairs = engine.drafter.reading.context
    places = {
        (engine.context, "_decode"): 3,
        (engine.context.recorders[0], "take"): 2,
        (engine.context, "rewind"): 3,
        (pairs, "_process"): 5,
        (pairs, "rewind"): 2,
    }
    interrupt_at(monkeypatch, engine, sampling, places, plain)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_another_conversation_and_back(engines, name: str) -> None:
    """What a running state cannot take back is read anew."""
    engine, sampling = engines(name, "cut"), SAMPLINGS["few"]
    first = text_of(engine, sampling, draft_max=3, seed=1)
    for prompt in ("tea and tea and the", "the sea", PROMPT + " sea and"):
        plain = text_of(engines(name, None), sampling, prompt=prompt, draft_max=0, seed=1)
        assert text_of(engine, sampling, prompt=prompt, draft_max=3, seed=1) == plain
    assert text_of(engine, sampling, draft_max=3, seed=1) == first


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exact_finds_nothing(engines, name: str) -> None:
    engine = engines(name, "cut")
    with Context(engine.model, 256, ContextParams(cache=F32), n_outputs=32, rewinds=7) as context:
        for law in (Law(), Law(SAMPLINGS["few"], 3)):
            found = check_prompt(engine, context, "p", engine.model.tokenize(PROMPT), 24, 3, law)
            assert (found.replay_faults, found.parts_at) == (0, None)


@pytest.mark.parametrize("type_", [Quant.F32, Quant.F16, Quant.Q8_0, Quant.Q4_0, Quant.Q4_K])
@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_are_the_head_bit_for_bit(tmp_path: Path, name: str, own_head: bool, type_: Quant) -> None:
    """Against llama.cpp's own logits, where the block has the target's head, and where it has its own."""
    target = write_mtp(tmp_path / "t.gguf", name, type_, own_head=own_head)
    for k in (16, 304, 512):
        cut = tmp_path / f"{k}.gguf"
        write(lay_out(OWN_BLOCK, some(k), target), cut)
        found = prove(cut, target)
        assert found.ok, found.differences
        assert (found.max_logit_difference, found.kept, found.positions) == (0.0, k, 24)


def test_what_was_changed_is_seen(files, tmp_path: Path) -> None:
    """By verify, and before the first draft where it is the rows of another head."""
    target, cut = files["glm4moe"], tmp_path / "cut.gguf"
    write(lay_out(OWN_BLOCK, some(64), target), cut)
    tensor = GGUFFile(cut).tensors["output.weight"]
    data = bytearray(cut.read_bytes())
    data[tensor.offset + 5] ^= 1
    cut.write_bytes(data)
    assert "is not row" in prove(cut, target).differences[0]
    np.frombuffer(data, "<f4", tensor.n_elements, tensor.offset)[:] *= -1
    cut.write_bytes(data)
    with pytest.raises(EngineError, match="are not the head of"):
        Engine(LoadOptions(target, cut, n_ctx=64))


BAD_BLOCKS = {
    "none": (lambda path: write_model(path), "has no MTP block"),
    "taken out": (lambda path: write_mtp(path, without=("blk.2.nextn.eh_proj.weight",)), "has no MTP block"),
    "another architecture": (lambda path: write_mtp(path, "mimo2"), "returns no normed state for mimo2"),
    "a block for each draft": (lambda path: write_mtp(path, "step35"), "returns no normed state for step35"),
    "two blocks": (lambda path: write_mtp(path, "glm4moe", n_blocks=2), "cannot draft here: it has 2"),
}


@pytest.mark.parametrize("name", BAD_BLOCKS)
def test_what_cannot_draft_is_refused_by_name(tmp_path: Path, name: str) -> None:
    make, said = BAD_BLOCKS[name]
    path = make(tmp_path / "t.gguf")
    with pytest.raises(FileFormatError, match=said):
        MtpBlock.of(GGUFFile(path))
    with pytest.raises(FileFormatError, match=said):
        lay_out(OWN_BLOCK, some(16), path)
    if name in ("none", "two blocks"):  # llama.cpp loads it
        with pytest.raises(FileFormatError, match=said):
            Engine(LoadOptions(path, MTP, n_ctx=64))


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_block_in_its_own_file_drafts_what_it_drafts_inside_its_target(
    tmp_path: Path, name: str, own_head: bool
) -> None:
    """Also for a target that was converted without it, and in a second conversation over the same weights."""
    whole = write_mtp(tmp_path / "whole.gguf", name, seed=1, own_head=own_head)
    bare = write_mtp(tmp_path / "bare.gguf", name, seed=1, n_blocks=0)
    alone = write_mtp(tmp_path / "alone.gguf", name, seed=1, own_head=own_head, alone=True)
    how = {"cache": F32, "cache_draft": F32, "n_ctx": 128}
    with (
        Engine(LoadOptions(whole, MTP, **how)) as inside,
        Engine(LoadOptions(bare, alone, **how)) as beside,
        beside.share_weights() as second,
    ):
        text = inside.model.tokenize(PROMPT)
        for n in range(3, len(text)):
            for engine in (inside, beside, second):
                read(engine, text[:n])
            drafts, *others = (
                e.drafter.draft(text[:n], 3, SAMPLINGS["greedy"], Noise(0)) for e in (inside, beside, second)
            )
            assert others == [drafts, drafts]
        for kind in ("greedy", "few"):
            plain = text_of(inside, SAMPLINGS[kind], draft_max=0, seed=2)
            assert text_of(beside, SAMPLINGS[kind], draft_max=3, seed=2) == plain
    weights = draft_weights(alone, bare)
    assert weights.bytes_at(weights.n_rows) == draft_weights(MTP, whole).bytes_at(600)
    assert describe(alone)["kind"] == "MTP block without its model"


def test_a_block_of_another_model_is_refused(files, tmp_path: Path) -> None:
    alone = write_mtp(tmp_path / "alone.gguf", "qwen35", alone=True)
    with pytest.raises(FileFormatError, match=r"does not fit .*glm4moe\.gguf: it is the MTP block of a qwen35 model"):
        Engine(LoadOptions(files["glm4moe"], alone, n_ctx=64))
    few = write_mtp(tmp_path / "few.gguf", "qwen35", alone=True, n_tokens=560)
    with pytest.raises(VocabularyMismatch, match=r"few\.gguf"):
        Engine(LoadOptions(files["qwen35"], few, n_ctx=64))
    with pytest.raises(EngineError, match="is fed its target's states, which only this runner gives it"):
        TrimmedDraft(alone, target=files["qwen35"])


FAST = np.random.default_rng(8).permutation(600)[:320]
CIRCULATING: dict[str, dict[str, Any]] = {
    "block alone": {"alone": True},
    "reduced, alone": {"alone": True, "ids": FAST},
    "reduced, alone, its own head": {"alone": True, "ids": FAST, "own_head": True},
    "reduced inside its target": {"ids": FAST, "own_head": True},
}
ONLY_A_BLOCK, REDUCED = "only the block for multi-token prediction", "rows for 320 tokens only"
NO_ROWS, CUT_TARGET = "holds an MTP block without its model", r"trim TARGET --mtp --keep \S+x\.gguf"
HAS_ONE = "one row per token|without M-RoPE"  # the second of glm4moe, whose own refusal comes first
# What each command says of each file, in this order; "" if it does what it is asked.
COMMANDS = ("--target", "--draft", "trim", "trim --mtp", "verify", "plan", "prepare")
SAID = {
    "block alone": (ONLY_A_BLOCK, "", NO_ROWS, NO_ROWS, NO_ROWS, "a plan is for", NO_ROWS),
    "reduced, alone": (REDUCED, CUT_TARGET, CUT_TARGET, CUT_TARGET, CUT_TARGET, "a plan is for", CUT_TARGET),
    "reduced, alone, its own head": (REDUCED, *[CUT_TARGET] * 4, "a plan is for", CUT_TARGET),
    "reduced inside its target": (REDUCED, REDUCED, HAS_ONE, CUT_TARGET, CUT_TARGET, REDUCED, HAS_ONE),
}


@pytest.mark.parametrize("name", CIRCULATING)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_files_that_circulate_are_run_or_refused_in_one_sentence(
    files, tmp_path: Path, architecture: str, name: str
) -> None:
    """llama.cpp does not load a reduced head, and ends the process if it computes layers that are not there."""
    path = str(write_mtp(tmp_path / "x.gguf", architecture, **CIRCULATING[name]))
    target, out, cut = str(files[architecture]), str(tmp_path / "o.gguf"), str(files[f"{architecture} cut"])
    how = ("-c", "64", "--prompt", "tea", "-n", "4")
    runs: dict[str, tuple[Any, ...]] = {
        "--target": (chat, "--target", path, *how),
        "--draft": (chat, "--target", target, "--draft", path, *how),
        "trim": (gguf_trim, "trim", path, "-o", out, "-k", "64"),
        "trim --mtp": (gguf_trim, "trim", path, "--mtp", "-o", out, "-k", "64"),
        "verify": (gguf_trim, "verify", cut, "--source", path),
        "plan": (gguf_trim, "plan", "--target", target, "--draft", path, "--no-measure"),
        "prepare": (gguf_trim, "prepare", "--target", target, "--draft", path),
    }
    for what, said in zip(COMMANDS, SAID[name], strict=True):
        command, *arguments = runs[what]
        done = CliRunner().invoke(command, arguments)
        assert done.exit_code == (0 if not said else 2 if what == "plan" and "plan" in said else 1), (what, done.output)
        assert re.search(said, done.stderr), (what, done.stderr)
        assert not said or done.stderr.strip().splitlines()[-1].startswith("Error: "), done.stderr
    assert not Path(out).exists()
    told = CliRunner().invoke(gguf_trim, ["inspect", path])
    assert told.exit_code == 0
    assert ("MTP block without its model" in told.stdout) == ("alone" in name)
    if "reduced" in name:
        with pytest.raises(FileFormatError, match=REDUCED):
            Model(path)


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tokens_of_a_reduced_head_choose_rows_of_the_targets_own_block(
    files, tmp_path: Path, name: str, own_head: bool
) -> None:
    fast = write_mtp(tmp_path / "fast.gguf", name, alone=True, ids=FAST, own_head=own_head)
    cut, vocabulary = tmp_path / "cut.gguf", Vocabulary(GGUFFile(files[name]))
    done = CliRunner().invoke(
        gguf_trim, ["trim", str(files[name]), "--mtp", "--keep", str(fast), "-o", str(cut), "--exact-k"]
    )
    assert done.exit_code == 0, done.output
    found = prove(cut, files[name])
    assert (found.ok, found.max_logit_difference) == (True, 0.0), found.differences
    assert set(Trimmed.open(cut).d2t.tolist()) == {*FAST.tolist(), *vocabulary.forced}


def test_a_file_that_names_no_tokens_to_keep_is_refused(files, tmp_path: Path) -> None:
    other = write_mtp(tmp_path / "other.gguf", alone=True, ids=FAST)
    other.write_bytes(other.read_bytes().replace(b"<|im_end|>", b"<|im_fin|>"))
    outside = write_mtp(tmp_path / "outside.gguf", alone=True, ids=np.array([5, 599]))
    data = bytearray(outside.read_bytes())
    np.frombuffer(data, "<i8", 2, GGUFFile(outside).tensors["d2t"].offset)[1] = 600
    outside.write_bytes(data)
    for keep, said in ((files["glm4moe"], "has no reduced head"), (other, "other.gguf"), (outside, "names token 600")):
        arguments = ["trim", str(files["qwen35"]), "--mtp", "--keep", str(keep), "-o", str(tmp_path / "o.gguf")]
        done = CliRunner().invoke(gguf_trim, arguments)
        assert (done.exit_code, said in done.stderr) == (1, True), done.output


@pytest.mark.parametrize(("tensor", "n_layers", "n_parts", "alone"), [
    ("blk.0.attn_norm.weight", 3, 1, False),
    ("blk.2.attn_norm.weight", 3, 1, True),
    ("blk.0.nextn.eh_proj.weight", 1, 1, True),  # numbered from the block itself
    ("blk.2.attn_norm.weight", 3, 2, False),  # the layers are in another part
])  # fmt: skip
def test_a_file_is_a_block_alone_if_it_lacks_the_layers(
    tmp_path: Path, tensor: str, n_layers: int, n_parts: int, alone: bool
) -> None:
    numbers = {"qwen35.nextn_predict_layers": 1, "qwen35.block_count": n_layers, "split.count": n_parts}
    fields = [field("general.architecture", Kind.STRING, "qwen35")]
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf(fields + [field(key, Kind.UINT32, n) for key, n in numbers.items()], [Table(tensor, (32,))]))
    assert is_block_alone(GGUFFile(path)) is alone


def test_more_blocks_than_layers_are_refused(tmp_path: Path) -> None:
    """llama.cpp would end the process as it loads the file."""
    path = write_mtp(tmp_path / "t.gguf")
    data = bytearray(path.read_bytes())
    np.frombuffer(data, "<u4", 1, GGUFFile(path).fields["qwen35.nextn_predict_layers"].value)[0] = 4
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="says that 4 of its 3 layers are for multi-token prediction"):
        Model(path)


def test_rows_of_another_target_are_refused(files, tmp_path: Path) -> None:
    other = write_mtp(tmp_path / "other.gguf", "glm4moe", n_tokens=560)
    with pytest.raises(TrimError, match=r"was not cut for .*other\.gguf: it is of another vocabulary"):
        Engine(LoadOptions(other, files["glm4moe cut"], n_ctx=64))
    with pytest.raises(FileFormatError, match="has no MTP block"):
        Engine(LoadOptions(write_model(tmp_path / "plain.gguf"), files["glm4moe cut"], n_ctx=64))


@pytest.mark.parametrize("what", ["mtp", "cut"])
def test_a_block_is_where_its_target_is(files, what: str) -> None:
    draft = MTP if what == "mtp" else files[f"qwen35 {what}"]
    elsewhere: list[dict[str, Any]] = [
        *({"device_draft": "none"}, {"n_gpu_layers_draft": 0}, {"override_tensor_draft": "a=CPU"}),
        {"n_cpu_moe_draft": 1},
    ]
    for how in elsewhere:
        with pytest.raises(EngineError, match=r"qwen35\.gguf: its own block drafts, and is where the target is"):
            Engine(LoadOptions(files["qwen35"], draft, n_ctx=64, **how))
    same = {"device": "none", "device_draft": "none", "override_tensor": "a=CPU", "n_cpu_moe": 1, "n_gpu_layers": 0}
    Engine(LoadOptions(files["qwen35"], draft, n_ctx=64, **same)).close()


def test_what_cannot_be_rewound_drafts_nothing(files, monkeypatch) -> None:
    """If llama.cpp cannot copy a state: as a drafter, and as a target that keeps states of its last batch or none."""
    monkeypatch.setattr(llama_cpp, "llama_memory_seq_cp", lambda *_: None)
    with pytest.raises(EngineError, match="cannot copy the state of a qwen35 model, so its drafts cannot be"):
        Engine(LoadOptions(files["glm4moe"], files["qwen35"], n_ctx=64))
    for rewinds in (3, 0):
        monkeypatch.setattr(engine_module, "REWINDS", rewinds)
        with pytest.raises(EngineError, match="cannot rewind the cache of a qwen35 model, which drafting needs"):
            Engine(LoadOptions(files["qwen35"], MTP, n_ctx=64))
        with Engine(LoadOptions(files["qwen35"], n_ctx=128, cache=F32)) as engine:
            rounds = list(engine.rounds(engine.model.tokenize(PROMPT), SAMPLINGS["greedy"], max_tokens=8))
            assert [len(round_.drafted) for round_ in rounds] == [0] * 8


def test_commands_cut_prove_fit_and_run_one(files, tmp_path: Path) -> None:
    target, cut, ids = str(files["qwen35"]), str(tmp_path / "cut.gguf"), tmp_path / "ids.txt"
    ids.write_text("\n".join(map(str, range(90, 130))))

    def run(command: object, *arguments: str, code: int = 0) -> Result:
        done = CliRunner().invoke(command, arguments)
        assert done.exit_code == code, done.output
        return done

    planned = run(gguf_trim, "trim", target, "-o", cut, "--keep", str(ids), "--mtp", "--dry-run").stdout
    assert "read per draft step" in planned
    assert "--mtp takes no" in run(gguf_trim, "trim", target, "-o", cut, "--mtp", "--requant", "Q4_0", code=2).stderr
    run(gguf_trim, "trim", target, "-o", cut, "--keep", str(ids), "--mtp")
    assert "difference 0 over" in run(gguf_trim, "verify", cut, "--source", target).stdout
    said = json.loads(run(gguf_trim, "inspect", cut, "--json").stdout)
    assert (said["kind"], said["architecture"], said["head"]["rows"]) == ("trimmed", "mtp", said["k"])
    assert json.loads(run(gguf_trim, "inspect", target, "--json").stdout)["mtp"] == "its rows can be chosen: trim --mtp"
    answers = str(answers_file(tmp_path))
    assert "as --target" in run(gguf_trim, "speculator", cut, "--calibration", answers, code=1).stderr
    run(gguf_trim, "speculator", cut, "--calibration", answers, "--target", target)
    for draft in ("mtp", cut):
        pair = ["--target", target, "--draft", draft, "-c", "256"]
        done = run(chat, *pair, "--prompt", "x", "-n", "8", "--temp", "0", "--draft-max", "2")
        assert "8 tokens" in done.stderr
    steps = json.loads(run(bench, "steps", *pair, "--repeat", "1").stdout.splitlines()[-1])
    assert steps["seconds"].keys() >= {"full", "trim", "context", "spec", "verify 8"}
    assert steps["bytes"]["full"] > steps["bytes"]["trim"]
    modes = "plain,full:2,trim:2,spec:2,auto"
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"id": "a", "task": "t", "prompt": "the sea"}\n')
    assert run(exact, *pair, "--limit", "1", "-n", "8").exit_code == 0
    record = run(bench, "run", *pair, "--modes", modes, "--prompts", str(prompts), "-n", "6").stdout.splitlines()[-1]
    assert json.loads(record)["figures"].keys() >= {"all"}
    found = json.loads(record)["modes"]
    assert found["full:2"]["step"]["bytes"] > found["trim:2"]["step"]["bytes"]


def test_shapes_of_published_models_load_and_draft(tmp_path: Path) -> None:
    """A few layers of Qwen3.5's smallest, and its parameters without its eyes."""
    for name, n_params in (("qwen3.5-0.8b", 0.77e9), ("qwen3.5-4b", 4.3e9)):
        assert sum(map(math.prod, SHAPES[name].tensors.values())) == pytest.approx(n_params, rel=0.01)
    path = tmp_path / "few.gguf"
    write_shape(replace(SHAPES["qwen3.5-0.8b"], n_layer=4, n_vocab=1024), path, "Q4_K_M")
    with Engine(LoadOptions(path, MTP, n_ctx=64)) as engine:
        assert len(text_of(engine, SAMPLINGS["greedy"], 8, "tea", draft_max=2)) == 8


def test_make_trim_chooses_rows(files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen, proven and with a speculator; the second time nothing is left to do."""
    monkeypatch.setenv("GGUF_TRIM_CACHE", str(tmp_path))
    monkeypatch.setattr("gguf_trim.fit.calibrate.CONVERSATIONS", 4)
    for _ in range(2):
        arguments = ["prepare", "--target", str(files["qwen35"]), "--draft", "mtp", "--k", "100"]
        done = CliRunner().invoke(gguf_trim, arguments)
        assert done.exit_code == 0, done.output
    assert "verifying" not in done.stderr
    made = Trimmed.open(Path(done.stdout.splitlines()[1]))
    assert (len(made.d2t), Speculator.of(made) is None) == (112, False)
