"""EAGLE-3 heads: the text is the target's whatever they draft, and no file ends the process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGMLQuantizationType as Quant

from corpus.answers import TargetAnswer
from corpus.counts import Counts
from gguf_trim.__main__ import main as gguf_trim
from gguf_trim.cut import lay_out, write
from gguf_trim.fit.calibrate import TeacherForced
from gguf_trim.format.companion import Trimmed, companion_path
from gguf_trim.format.memory_bound import draft_weights, step_bytes
from gguf_trim.format.speculator import Speculator
from gguf_trim.format.state_fed import Eagle3Head, row_by_id
from gguf_trim.keep import ChooseRows, Keep, choose_rows, keep_order
from gguf_trim.plan.planner import matches_of
from gguf_trim.prove import prove
from llamabase.errors import EngineError, FileFormatError, VocabularyMismatch
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import head_tensor
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama import states
from llamabase.llama.context import F32, Context, ContextParams
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import Sampling
from runner.bench.__main__ import main as bench
from runner.chat.__main__ import main as chat
from runner.draft.contracts import NoDrafter
from runner.exact import Law, check_prompt, replay
from runner.exact import main as exact
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .toy import write_head, write_model

PROMPT = "tea and tea and the sea and tea and the"
FEW = dict.fromkeys((97, 101, 116, 104, 32), 60.0)  # likely tokens, so that some drafts stand by chance
SAMPLINGS = {
    "greedy": Sampling(temp=0),
    "few": Sampling(temp=3.0, top_k=4, top_p=1, min_p=0, logit_bias=FEW),
    "penalties": Sampling(temp=2.0, top_k=5, repeat_penalty=1.3, presence_penalty=0.5, logit_bias=FEW),
    "XTC, DRY": Sampling(
        temp=2.0, top_k=6, xtc_probability=0.5, xtc_threshold=0.05, dry_multiplier=1.0, logit_bias=FEW
    ),
    "grammar": Sampling(temp=1.5, top_k=8, grammar="root ::= ([a-e] [ ,.] [0-9])+"),
}


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("heads")
    shuffled = np.random.default_rng(3).permutation(600)[:300]
    shuffled[:5] = list(FEW)
    return {
        "target": write_model(folder / "target.gguf", seed=1, n_layer=4),
        "whole": write_head(folder / "whole.gguf"),
        "mapped": write_head(folder / "mapped.gguf", ids=np.unique(shuffled)[::-1].copy()),
        "one row": write_head(folder / "one.gguf", ids=np.array([101])),
        "own embeddings": write_head(folder / "own.gguf", own_embeddings=True, tokens=True),
        "no head": write_head(folder / "none.gguf", without=("output.weight",)),
    }


@pytest.fixture(scope="module")
def engines(heads: dict[str, Path]) -> Iterator[Callable[[str | None], Engine]]:
    opened: dict[str | None, Engine] = {}

    def get(name: str | None) -> Engine:
        if name not in opened:
            opened[name] = Engine(LoadOptions(heads["target"], heads[name] if name else None, cache=F32, n_ctx=256))
        return opened[name]

    yield get
    for engine in opened.values():
        engine.close()


def text_of(engine: Engine, sampling: Sampling, n: int = 30, prompt: str = PROMPT, **settings: object) -> list[int]:
    rounds = engine.rounds(engine.model.tokenize(prompt), sampling, max_tokens=n, **settings)
    return [token for round_ in rounds for token in round_.tokens]


NAMES = ("whole", "mapped", "one row", "own embeddings", "no head")


@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_the_plain_one(engines, eager, name: str, kind: str) -> None:
    engine, sampling = engines(name), SAMPLINGS[kind]
    engine.measure()
    for seed in (3, 4):
        plain = text_of(engines(None), sampling, draft_max=0, seed=seed)
        for draft_max in (1, 3, 8, None):
            assert text_of(engine, sampling, draft_max=draft_max, seed=seed) == plain


@pytest.mark.parametrize("name", ["whole", "mapped"])
def test_some_drafts_stand_and_some_do_not(engines, name: str) -> None:
    """So the tests above have seen both: rewinds, and pairs that stay."""
    engine, sampling = engines(name), SAMPLINGS["few"]
    rounds = [
        round_
        for seed in range(8)
        for round_ in engine.rounds(engine.model.tokenize(PROMPT), sampling, max_tokens=30, draft_max=3, seed=seed)
    ]
    assert {round_.accepted for round_ in rounds} >= {0, 1, 2}


@pytest.mark.parametrize("name", ["whole", "mapped", "own embeddings"])
def test_a_draft_does_not_depend_on_how_the_text_was_read(engines, name: str) -> None:
    draft_after_any_reading(engines(name))


def read(engine: Engine, text: list[int]) -> None:
    """Have the target read all of a text but its last token."""
    engine.reader.keep(text, len(text) - 1)
    if rest := text[len(engine.reader.held) : -1]:
        engine.reader.read(rest, 0)


def draft_after_any_reading(engine: Engine) -> None:
    """After rounds of any outcome the drafter has the logits that a fresh reading of the text gives."""
    rng = np.random.default_rng(5)
    text = engine.model.tokenize(PROMPT)
    reading = engine.drafter.reading
    for _ in range(12):
        read(engine, text)
        drafts = engine.drafter.draft(text, int(rng.integers(1, 5)), SAMPLINGS["greedy"], Noise(0))
        engine.reader.read([text[-1], *drafts], len(drafts) + 1)
        going_on = reading.begin(text)[0].copy()
        reading.prepare(text[:1])
        assert reading.unread(text) == len(text) - 1
        assert going_on == pytest.approx(reading.begin(text)[0], abs=0.02)
        kept = int(rng.integers(0, len(drafts) + 1))
        text = [*text, *drafts[:kept], int(rng.integers(97, 122))]
        if rng.random() < 0.3:
            text = text[: len(text) // 2]  # another conversation


def table_of(path: Path, name: str) -> np.ndarray:
    file = GGUFFile(path)
    tensor = file.tensors[name]
    return np.frombuffer(file.read(tensor), np.float32).reshape(tensor.n_rows, -1)


def normed(values: np.ndarray, epsilon: float) -> np.ndarray:
    return values / np.sqrt((values**2).mean() + epsilon)


@pytest.mark.parametrize("length", [2, 3, 9])
def test_a_pair_is_the_last_token_and_the_state_before_it(heads, tmp_path: Path, length: int) -> None:
    """Two heads of which one sees nothing but states, the other nothing but tokens, reckoned by hand."""
    states_only = write_head(tmp_path / "s.gguf", zeros=("blk.0.attn_output.weight", "blk.0.ffn_down.weight"))
    tokens_only = write_head(tmp_path / "t.gguf", zeros=("fc.weight", "blk.0.ffn_down.weight"))
    for path in (states_only, tokens_only):
        with Engine(LoadOptions(heads["target"], path, cache=F32, n_ctx=64)) as engine:
            text = engine.model.tokenize(PROMPT)[:length]
            engine.reader.read(text[:-1], 0)
            found = engine.drafter.reading.begin(text)[0]
            row = engine.context.recorders[0].rows[length - 2]
            head = Eagle3Head.of(GGUFFile(path))
            state = table_of(path, "fc.weight") @ row
            if path is tokens_only and length > 2:
                continue  # attention mixes them
            if path is tokens_only:
                embedding = table_of(heads["target"], "token_embd.weight")[text[-1]]
                pair = np.append(normed(embedding, head.epsilon), np.zeros(256))
                state = table_of(path, "blk.0.attn_output.weight") @ (table_of(path, "blk.0.attn_v.weight") @ pair)
            wanted = table_of(path, "output.weight") @ head.hidden(state)
            assert found == pytest.approx(wanted, abs=0.05)


@pytest.mark.parametrize("batches", [{"n_batch": 64}, {"n_batch": 100, "n_ubatch": 33}])
def test_a_prompt_in_pieces_and_a_full_context(heads, batches: dict[str, int]) -> None:
    """Longer than a batch, which is computed whole or in pieces; drafting ends where the context does."""
    with (
        Engine(LoadOptions(heads["target"], heads["whole"], cache=F32, n_ctx=512, **batches)) as engine,
        Engine(LoadOptions(heads["target"], cache=F32, n_ctx=512, **batches)) as other,
    ):
        prompt = "the sea and the tea " * 47
        n = 512 - len(engine.model.tokenize(prompt)) + 1
        assert 20 < n < 60
        found = text_of(engine, SAMPLINGS["greedy"], n + 50, prompt, draft_max=3)
        assert len(found) == n
        assert found == text_of(other, SAMPLINGS["greedy"], n + 50, prompt, draft_max=0, drafter=NoDrafter())


def interrupt_at(
    monkeypatch: pytest.MonkeyPatch,
    engine: Engine,
    sampling: Sampling,
    places: dict[tuple[object, str], int],
    plain: list[int],
) -> None:
    """Ctrl-C in some of the first calls of each place, before and after it: the next text is `plain` all the same."""
    for (owner, name), often in places.items():
        honest = getattr(owner, name)
        for when in range(often * 2):
            calls = 0

            def interrupted(*arguments: object, honest=honest, when=when) -> object:
                nonlocal calls
                calls += 1
                if calls == when // 2 + 1:
                    if when % 2:
                        honest(*arguments)
                    raise KeyboardInterrupt
                return honest(*arguments)

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(owner, name, interrupted)
                text_of(engine, sampling, draft_max=3, seed=1)
                raise KeyboardInterrupt  # where it was called less often
            assert text_of(engine, sampling, draft_max=3, seed=1) == plain, (name, when)


def test_interruptions_anywhere_leave_it_usable(engines, monkeypatch) -> None:
    """Ctrl-C in the target's step, before and after what goes into its layers is recorded, and in the head's."""
    engine, sampling = engines("whole"), SAMPLINGS["few"]
    plain = text_of(engines(None), sampling, draft_max=0, seed=1)
    pairs = engine.drafter.reading.context
    places = {
        (engine.context, "_decode"): 3,
        (engine.context.recorders[0], "take"): 2,
        (pairs, "_process"): 5,
        (pairs, "encode"): 2,
        (pairs, "truncate"): 2,
    }
    interrupt_at(monkeypatch, engine, sampling, places, plain)


def test_exact_finds_nothing(engines) -> None:
    engine = engines("whole")
    with Context(engine.model, 256, ContextParams(cache=F32), n_outputs=32) as context:
        for law in (Law(), Law(SAMPLINGS["few"], 3)):
            found = check_prompt(engine, context, "p", engine.model.tokenize(PROMPT), 24, 3, law)
            assert (found.replay_faults, found.parts_at) == (0, None)


def test_chat_takes_one(heads) -> None:
    pair = ["--target", str(heads["target"]), "--draft", str(heads["whole"]), "-c", "256"]
    done = CliRunner().invoke(chat, [*pair, "--prompt", "x", "-n", "8", "--temp", "0", "--draft-max", "2"])
    assert done.exit_code == 0, done.output
    assert "8 tokens" in done.stderr


def test_memory_stays_over_many_answers(engines) -> None:
    from runner.bench.machine import resident

    engine = engines("mapped")
    for turn in range(60):
        text_of(engine, SAMPLINGS["few"], 12, draft_max=3, seed=turn)
        if turn == 20:
            before = resident()
    assert resident() - before < 4 << 20


@pytest.mark.slow
def test_five_hundred_turns_with_interruptions_and_openings(heads, engines, monkeypatch) -> None:
    """Each another conversation, one in five interrupted, one in ten with a head that is opened for it.

    So many draws meet near-ties, so they are compared in the loop's own batches.
    """
    from runner.bench.machine import resident

    engine, rng = engines("whole"), np.random.default_rng(0)
    pairs, honest = engine.drafter.reading.context, engine.drafter.reading.context._process
    before = descriptors = 0

    def faults(engine: Engine, prompt: list[int], sampling: Sampling, seed: int) -> int:
        engine.reader.keep([], 0)  # so that the loop reads the prompt as the replay will
        rounds = list(engine.rounds(prompt, sampling, max_tokens=12, draft_max=3, seed=seed))
        assert sum(len(round_.tokens) for round_ in rounds) == 12
        return replay(judge, prompt, rounds, Law(sampling, seed))

    with Context(engine.model, 128, ContextParams(cache=F32), n_outputs=8) as judge:
        for turn in range(500):
            text = " ".join(rng.choice(["tea", "the", "and", "sea", "in"], int(rng.integers(3, 20))))
            prompt, sampling = engine.model.tokenize(text), list(SAMPLINGS.values())[turn % 4]
            if turn % 5 == 4:

                def interrupted(*arguments: object) -> None:
                    honest(*arguments)
                    raise KeyboardInterrupt

                with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    patch.setattr(pairs, "_process", interrupted)
                    text_of(engine, sampling, 12, text, draft_max=3, seed=turn)
            assert faults(engine, prompt, sampling, turn) == 0
            if turn % 10 == 9:
                with Engine(
                    LoadOptions(heads["target"], heads[NAMES[turn // 10 % len(NAMES)]], cache=F32, n_ctx=128)
                ) as other:
                    assert faults(other, prompt, sampling, turn) == 0
            if turn == 100:
                before, descriptors = resident(), len(list(Path("/proc/self/fd").iterdir()))
    assert resident() - before < 8 << 20
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors


BAD_HEADS: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "ids out of range": ({"ids": np.array([5, 600])}, FileFormatError, "d2t names token 600, and its target has 600"),
    "a negative id": ({"ids": np.array([5, -1])}, FileFormatError, "d2t names token -1"),
    "ids twice": ({"ids": np.array([5, 7, 5])}, FileFormatError, "d2t names a token twice"),
    "ids without a head": (
        {"ids": np.array([5, 7]), "without": ("output.weight",)}, FileFormatError, "has a d2t and no output.weight",
    ),
    "more ids than rows": (
        {"ids": np.arange(20), "head_rows": 10}, FileFormatError, "not one I64 for each of the 10 rows",
    ),
    "fewer rows than tokens": ({"head_rows": 300}, FileFormatError, "its head has 300 rows for 600 tokens and no d2t"),
    "no layers": ({"without": ("target_layers",)}, FileFormatError, "does not name three layers"),
    "two layers": ({"layers": (0, 1)}, FileFormatError, "does not name three layers"),
    "a layer that the target lacks": ({"layers": (0, 1, 4)}, FileFormatError, "layers 0, 1, 4, and this target"),
    "another width": ({"width": 128}, FileFormatError, "reads states of 128 numbers"),
    "no width": ({"without": ("target_hidden_size",)}, FileFormatError, "no fc.weight of 0 x 256"),
    "no fc": ({"without": ("fc.weight",)}, FileFormatError, "no fc.weight of 768 x 256"),
    "no norm": ({"without": ("output_norm.weight",)}, FileFormatError, "no output_norm.weight"),
    "no vocabulary size": ({"without": ("vocab_size",)}, FileFormatError, "does not say how many tokens"),
    "another vocabulary size": ({"n_tokens": 560}, VocabularyMismatch, "made for 560 tokens, and this target has 600"),
    "a missing layer tensor": ({"without": ("blk.0.ffn_up.weight",)}, EngineError, "llama.cpp cannot load it"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_HEADS)
def test_a_wrong_head_is_refused_before_llama_cpp_sees_it(heads, tmp_path: Path, name: str) -> None:
    changes, kind, said = BAD_HEADS[name]
    path = write_head(tmp_path / "head.gguf", **changes)
    with pytest.raises(kind, match=said), Engine(LoadOptions(heads["target"], path, cache=F32, n_ctx=64)):
        pass


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_a_target_that_records_nothing_is_refused(heads, tmp_path: Path, architecture: str) -> None:
    target = write_model(tmp_path / "t.gguf", architecture, n_layer=4)
    with (
        pytest.raises(FileFormatError, match=f"records no inputs of layers for {architecture}"),
        Engine(LoadOptions(target, heads["whole"], n_ctx=64)),
    ):
        pass


def test_a_head_is_no_target_and_hangs_on_no_other_program(heads) -> None:
    from runner import TrimmedDraft

    with pytest.raises(EngineError, match="states and cannot be the target; give it as the drafter"):
        Engine(LoadOptions(heads["whole"]))
    with pytest.raises((FileFormatError, EngineError), match="is fed its target's states"):
        TrimmedDraft(heads["own embeddings"], target=heads["target"])


def test_a_build_without_the_functions_is_told_what_to_install(heads, monkeypatch) -> None:
    monkeypatch.setattr(states, "_EXPERIMENTAL", {"llama_of_tomorrow": (None, [], "", "")})
    states._experimental.cache_clear()
    with (
        pytest.raises(EngineError, match=r"pip install llama-cpp-python==0\.3\.36"),
        Engine(LoadOptions(heads["target"], heads["whole"])),
    ):
        pass
    monkeypatch.undo()
    states._experimental.cache_clear()


def test_a_head_says_what_it_is(heads) -> None:
    head = Eagle3Head.of(GGUFFile(heads["mapped"]))
    assert (head.layers, head.width, head.n_embd, head.n_vocab) == ((0, 1, 2), 256, 256, 600)
    assert (np.diff(head.ids) < 0).all()


def rows(k: int, first: int = 0) -> ChooseRows:
    """Every third id from `first` on, of those that the head has."""

    def choose(vocabulary: Vocabulary, has_row: np.ndarray, multiple: int) -> Keep:
        order = np.flatnonzero(has_row)
        order = np.append(order[first::3], np.delete(order, np.arange(first, len(order), 3)))
        return Keep(np.sort(order[: -(-k // multiple) * multiple]).astype(np.int32), 0, 0, None)

    return choose


@pytest.mark.parametrize("type_", [Quant.F32, Quant.F16, Quant.Q8_0, Quant.Q4_0, Quant.Q4_K])
@pytest.mark.parametrize("k", [16, 100, 288])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_cut_is_its_source_bit_for_bit(heads, tmp_path: Path, type_: Quant, k: int, mapped: bool) -> None:
    """Through stock llama.cpp, at k that are rounded up to a multiple of 16."""
    ids = np.random.default_rng(4).permutation(600)[:320] if mapped else None
    source = write_head(tmp_path / "source.gguf", type_, ids=ids, tokens=True)
    write(lay_out(source, rows(k)), tmp_path / "cut.gguf")
    found = prove(tmp_path / "cut.gguf", source, target=heads["target"])
    assert found.ok, found.differences
    assert (found.max_logit_difference, found.kept, found.positions) == (0.0, -(-k // 16) * 16, 24)
    head = Eagle3Head.of(GGUFFile(tmp_path / "cut.gguf"))
    assert ids is None or set(head.ids.tolist()) <= set(ids.tolist())
    assert "tokenizer.ggml.tokens" in head.file.fields


@pytest.mark.parametrize("name", ["no head", "mapped", "own embeddings"])
def test_a_cut_drafts_what_its_source_does_where_that_was_kept(heads, tmp_path: Path, name: str) -> None:
    cut = tmp_path / "cut.gguf"
    write(lay_out(heads[name], rows(160), heads["target"]), cut)
    assert prove(cut, heads[name], target=heads["target"]).ok
    kept = set(Eagle3Head.of(GGUFFile(cut)).ids.tolist())
    sampling = Sampling(temp=0)
    with (
        Engine(LoadOptions(heads["target"], heads[name], cache=F32, n_ctx=128)) as whole,
        Engine(LoadOptions(heads["target"], cut, cache=F32, n_ctx=128)) as part,
    ):
        for n in range(4, 20):
            text = whole.model.tokenize(PROMPT)[:n]
            for engine in (whole, part):
                engine.reader.keep(text, n - 1)
                engine.reader.read(text[len(engine.reader.held) : -1], 0)
            one, other = (engine.drafter.draft(text, 1, sampling, Noise(0))[0] for engine in (whole, part))
            assert other in kept
            assert one not in kept or one == other
        assert text_of(part, SAMPLINGS["few"], draft_max=3, seed=2) == text_of(
            whole, SAMPLINGS["few"], draft_max=0, seed=2
        )


def test_a_cut_needs_no_companion_to_be_run(heads, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    write(lay_out(heads["whole"], rows(64), heads["target"]), cut)
    companion_path(cut).unlink()
    with Engine(LoadOptions(heads["target"], cut, cache=F32, n_ctx=128, vocab="trim")) as engine:
        assert len(text_of(engine, SAMPLINGS["greedy"], 8, draft_max=2)) == 8


def test_what_was_changed_is_seen(heads, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    write(lay_out(heads["whole"], rows(64), heads["target"]), cut)
    tensor = GGUFFile(cut).tensors["d2t"]
    data = bytearray(cut.read_bytes())
    ids = np.frombuffer(data, "<i8", tensor.n_elements, tensor.offset)
    ids[[3, 4]] = ids[[4, 3]]
    cut.write_bytes(data)
    assert "is not row" in prove(cut, heads["whole"], target=heads["target"]).differences[0]
    ids[4] = 599
    cut.write_bytes(data)
    assert "its d2t is not that of the kept rows" in prove(cut, heads["whole"], target=heads["target"]).differences[0]


def test_a_cut_of_a_head_for_more_tokens_is_not_one_of_this_head(heads, tmp_path: Path) -> None:
    other, cut = write_head(tmp_path / "other.gguf", n_tokens=500), tmp_path / "cut.gguf"
    last = Keep(np.arange(536, 600, dtype=np.int32), 0, 0, None)
    write(lay_out(heads["whole"], lambda *_: last, heads["target"]), cut)
    assert "its d2t is not that of the kept rows" in prove(cut, other, target=heads["target"]).differences[0]


@pytest.mark.parametrize("name", ["whole", "no head"])
def test_a_step_reads_the_rows_of_its_own_head_or_of_its_targets(heads, name: str) -> None:
    weights, n_bytes = draft_weights(heads[name], heads["target"]), step_bytes(GGUFFile(heads[name]))
    head = head_tensor(GGUFFile(heads["target" if name == "no head" else name]))
    assert (weights.n_rows, weights.row_bytes) == (head.n_rows, head.row_bytes)
    assert weights.fixed_bytes == n_bytes - (head.n_bytes if name == "whole" else 0)


@pytest.mark.parametrize(("multiple", "k"), [(1, 301), (16, 304)])
def test_k_is_exact_if_that_is_asked_for(heads, multiple: int, k: int) -> None:
    choose = partial(choose_rows, k=301)
    assert lay_out(heads["own embeddings"], choose, heads["target"], multiple).keep.k == k


def test_commands_trim_verify_and_describe_one(heads, tmp_path: Path) -> None:
    head, cut, ids = str(heads["whole"]), str(tmp_path / "cut.gguf"), tmp_path / "ids.txt"
    ids.write_text("\n".join(map(str, range(90, 130))))
    target = ["--target", str(heads["target"])]

    def run(*arguments: str, code: int = 0) -> Result:
        done = CliRunner().invoke(gguf_trim, arguments)
        assert done.exit_code == code, done.output
        return done

    assert (
        "has no tokenizer; give the model it was made for as --target"
        in run("trim", head, "-o", cut, "--keep", str(ids), code=1).stderr
    )
    run("trim", head, "-o", cut, "--keep", str(ids), *target)
    assert "difference 0 over" in run("verify", cut, "--source", head, *target).stdout
    ids.write_text("\n".join(map(str, range(600))))  # of which this head lacks half
    mapped, had = ["trim", str(heads["mapped"]), *target], Eagle3Head.of(GGUFFile(heads["mapped"])).ids
    run(*mapped, "-o", str(tmp_path / "few.gguf"), "--keep", str(ids), "-k", "160")
    kept = Eagle3Head.of(GGUFFile(tmp_path / "few.gguf")).ids
    order = [i for i in dict.fromkeys([*Vocabulary(GGUFFile(heads["target"])).forced, *range(600)]) if i in had]
    assert sorted(kept.tolist()) == sorted(order[:160])
    ids.write_text("\n".join(str(i) for i in range(600) if i not in had))
    none = run(*mapped, "-o", str(tmp_path / "none.gguf"), "--keep", str(ids), code=1)
    assert "ids.txt: the head to be cut has a row for none of these ids" in none.stderr
    said = json.loads(run("inspect", cut, "--json").stdout)
    assert (said["kind"], said["k"] % 16, said["head"]["rows"]) == ("trimmed", 0, said["k"])
    said = json.loads(run("inspect", head, "--json").stdout)
    assert (said["trimmable"], said["target_layers"], said["vocabulary"]) == (True, [0, 1, 2], 600)
    assert "already trimmed" in run("trim", cut, "-o", str(tmp_path / "twice.gguf"), *target, code=1).stderr


def answers_file(folder: Path) -> Path:
    path, rng = folder / "answers.json", np.random.default_rng(2)
    lines = {str(n): [rng.integers(3, 500, 9).tolist(), rng.integers(3, 500, 40).tolist()] for n in range(6)}
    path.write_text(json.dumps(lines))
    return path


def fitted(cut: Path, answers: Path, target: Path) -> Speculator:
    arguments = ["speculator", str(cut), "--calibration", str(answers), "--target", str(target)]
    done = CliRunner().invoke(gguf_trim, arguments)
    assert done.exit_code == 0, done.output
    found = Speculator.of(Trimmed.open(cut))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def dynamic(heads: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Heads cut to next to nothing, with a speculator: of a whole head, and of one with a d2t."""
    folder, found = tmp_path_factory.mktemp("dynamic"), {}
    for name in ("whole", "mapped"):
        found[name] = folder / f"{name}.gguf"
        write(lay_out(heads[name], rows(16), heads["target"]), found[name])
        fitted(found[name], answers_file(folder), heads["target"])
    return found


@pytest.mark.parametrize("vocab", ["auto", "spec", "context", "trim"])
@pytest.mark.parametrize("name", ["whole", "mapped"])
def test_rows_are_added_at_every_step(heads, dynamic, name: str, vocab: str) -> None:
    """With all candidates the drafts are those of the whole head, with those of the text what they can be."""
    few = SAMPLINGS["few"]
    with (
        Engine(LoadOptions(heads["target"], heads[name], cache=F32, n_ctx=128)) as whole,
        Engine(LoadOptions(heads["target"], dynamic[name], cache=F32, n_ctx=128, vocab=vocab)) as part,
    ):
        assert (part.drafter.dynamic is None) == (vocab == "trim")
        text = whole.model.tokenize(PROMPT)
        wanted, found = [], []
        for n in range(3, len(text)):
            for engine, drafts in ((whole, wanted), (part, found)):
                engine.reader.keep(text[:n], n - 1)
                engine.reader.read(text[len(engine.reader.held) : n - 1], 0)
                drafts.append(engine.drafter.draft(text[:n], 3, SAMPLINGS["greedy"], Noise(0)))
        assert (found == wanted) == (vocab in ("auto", "spec"))  # 512 candidates are nearly all
        has_row = np.arange(600) if name == "whole" else Eagle3Head.of(GGUFFile(heads[name])).ids
        assert set(np.ravel(found).tolist()) <= set(has_row.tolist())
        plain = text_of(whole, few, draft_max=0, seed=2)
        assert text_of(part, few, draft_max=3, seed=2) == plain


def test_the_fit_knows_how_often_the_head_is_right(heads, dynamic, tmp_path: Path) -> None:
    """And needs the target, whose states the head reads."""
    done = CliRunner().invoke(gguf_trim, ["speculator", str(dynamic["whole"])])
    assert (done.exit_code, "give the model it was made for as --target" in done.stderr) == (1, True)
    cut = tmp_path / "cut.gguf"
    write(lay_out(heads["whole"], rows(64), heads["target"]), cut)
    ids, answers = answers_file(tmp_path), [[97, 101, 116] * 5]
    (tmp_path / "own.json").write_text(json.dumps({"a": [answers[0][:5], answers[0][5:]]}))
    made = fitted(cut, tmp_path / "own.json", heads["target"])
    with Engine(LoadOptions(heads["target"], cut, cache=F32, n_ctx=64)) as engine:
        right = []
        for n in range(5, 15):
            engine.reader.keep(answers[0], n - 1)
            engine.reader.read(answers[0][len(engine.reader.held) : n - 1], 0)
            row = engine.drafter.reading.begin(answers[0][:n])[0]
            right.append(int(engine.drafter._ids[row.argmax()]) == answers[0][n])
    assert made.acceptance["trim"] == pytest.approx(np.mean(right))
    assert ids.exists()


def test_a_head_does_not_agree_with_rows_of_another(heads, dynamic, tmp_path: Path) -> None:
    """What is read of the companion are the head's own rows: their products are llama.cpp's logits."""
    with Engine(LoadOptions(heads["target"], dynamic["mapped"], cache=F32, n_ctx=64)) as engine:
        text = engine.model.tokenize(PROMPT)[:9]
        engine.reader.read(text[:-1], 0)
        logits, hidden = engine.drafter.reading.begin(text)
        assert engine.drafter.dynamic.agrees(logits, hidden)
        assert not engine.drafter.dynamic.agrees(logits, hidden[::-1].copy())


def test_make_trim_prepares_a_head(heads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut, proven and with its speculator, in the type it has; the second time nothing is left to do."""
    monkeypatch.setenv("GGUF_TRIM_CACHE", str(tmp_path))
    monkeypatch.setattr("gguf_trim.fit.calibrate.CONVERSATIONS", 4)
    pair = ["--target", str(heads["target"]), "--draft", str(heads["whole"]), "--k", "100"]
    for _ in range(2):
        done = CliRunner().invoke(gguf_trim, ["prepare", *pair])
        assert done.exit_code == 0, done.output
    assert "verifying" not in done.stderr
    made = Path(done.stdout.splitlines()[1])
    assert (Eagle3Head.of(GGUFFile(made)).ids.size, Speculator.of(Trimmed.open(made)) is None) == (112, False)


def test_the_bench_measures_them(heads, dynamic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several at once hang on one target; steps are timed, and exact finds nothing."""
    monkeypatch.setattr("runner.bench.machine.COPIED", 16 << 20)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the sea"}\n{"prompt": "tea and the tea"}\n')
    pair = ["--target", str(heads["target"]), "--draft", str(dynamic["whole"]), "-c", "256"]
    full = ["--full", str(heads["whole"])]
    modes = "plain,full:2,trim:2,spec:2,auto"
    for arguments in (
        ["run", *pair, *full, "--prompts", str(prompts), "-n", "12", "--modes", modes],
        ["steps", *pair, *full, "--repeat", "1"],
    ):
        done = CliRunner().invoke(bench, arguments)
        assert done.exit_code == 0, done.output
        record = json.loads(done.stdout.splitlines()[-1])
    steps = record["bytes"]
    assert steps["trim"] < steps["full"]
    done = CliRunner().invoke(exact, [*pair, "--prompts", str(prompts), "-n", "12", "--draft-max", "2"])
    assert (done.exit_code, json.loads(done.stdout.splitlines()[-1])["replay_faults"]) == (0, 0)


@pytest.mark.parametrize("name", ["whole", "mapped", "no head"])
def test_a_plan_says_which_first_drafts_a_cut_gets_right(heads, engines, tmp_path: Path, name: str) -> None:
    engine, rng = engines(name), np.random.default_rng(8)
    prompt, found = engine.model.tokenize(PROMPT), []
    for _ in range(3):  # every other token is what the whole head drafts
        text = list(prompt)
        for n in range(40):
            engine.reader.keep(text, len(text) - 1)
            if rest := text[len(engine.reader.held) : -1]:
                engine.reader.read(rest, 0)
            text += engine.drafter.draft(text, 1, SAMPLINGS["greedy"], Noise(0)) if n % 2 else [int(rng.integers(600))]
        found.append(text[len(prompt) :])
    answers = [TargetAnswer(f"{i}", "x", prompt, tokens) for i, tokens in enumerate(found)]
    head = Eagle3Head.of(GGUFFile(heads[name]))
    vocabulary = Vocabulary(GGUFFile(heads["target"]))
    counts = Counts.of(np.bincount(found[0], minlength=600), vocabulary, "an answer")
    order = keep_order(vocabulary, row_by_id(head.ids, 600) >= 0, counts)
    matches = matches_of(heads[name], answers, order, target=heads["target"])
    for k in (32, 96, 288):
        cut, ids = tmp_path / f"{k}.gguf", np.sort(order[:k]).astype(np.int32)
        write(lay_out(heads[name], lambda *_, ids=ids: Keep(ids, 0, 0, None), heads["target"]), cut)
        rights = TeacherForced.of(cut, answers, Trimmed.open(cut), target=heads["target"]).rights
        for one, other in zip(rights, matches.right(k), strict=True):
            assert one.tolist() == other.tolist()
    assert len({sum(map(sum, matches.right(k))) for k in (32, 96, 288)}) > 1


def test_the_plan_command_takes_one(heads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf_trim.plan.costs.CUT", 64)
    monkeypatch.setattr("gguf_trim.fit.calibrate.CONVERSATIONS", 2)
    monkeypatch.setattr("gguf_trim.plan.added.CORES", (64,))
    pair = ["--target", str(heads["target"]), "--draft", str(heads["mapped"])]
    arguments = ["plan", *pair, "--answers", str(answers_file(tmp_path)), "-t", "1"]
    done = CliRunner().invoke(gguf_trim, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert {choice["vocab"] for choice in json.loads(done.stdout)} == {"full", "trim", "context", "spec"} - {"trim"}
    assert all(choice["tokens_per_second"] > 0 for choice in json.loads(done.stdout))
    assert "judged by first drafts" in CliRunner().invoke(gguf_trim, [*arguments, "--no-measure"]).stdout
    assert CliRunner().invoke(gguf_trim, [*arguments, "--temp", "1"]).exit_code == 2
