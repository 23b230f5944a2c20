"""EAGLE-3 heads: the text is the target's whatever they draft, and no file ends the process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gguf_trim.hanging import HangingHead
from llamabase import states
from llamabase.errors import EngineError, FileFormatError, VocabularyMismatch
from llamabase.gguf_file import GGUFFile
from llamabase.llama import Model
from llamabase.noise import Noise
from llamabase.sampling import Sampling
from runner.chat import main as chat
from runner.drafter import NoDrafter
from runner.engine import Engine
from runner.exact import Law, check_prompt

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
            opened[name] = Engine(heads["target"], heads[name] if name else None, n_ctx=256)
        return opened[name]

    yield get
    for engine in opened.values():
        engine.close()


@pytest.fixture(autouse=True)
def never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "is_end", lambda self, token: False)


def text_of(engine: Engine, sampling: Sampling, n: int = 30, prompt: str = PROMPT, **settings: object) -> list[int]:
    rounds = engine.rounds(engine.model.tokenize(prompt), sampling, max_tokens=n, **settings)
    return [token for round_ in rounds for token in round_.tokens]


NAMES = ("whole", "mapped", "one row", "own embeddings", "no head")


@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_the_plain_one(engines, eager, name: str, kind: str) -> None:
    engine, sampling = engines(name), SAMPLINGS[kind]
    engine._auto = None
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
    """After rounds of any outcome the head has the logits that a fresh reading of the text gives."""
    engine, rng = engines(name), np.random.default_rng(5)
    text = engine.model.tokenize(PROMPT)
    reading = engine.drafter.reading
    for _ in range(12):
        engine.reader.keep(text, len(text) - 1)
        if rest := text[len(engine.reader.held) : -1]:
            engine.reader.read(rest, 0)
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
        with Engine(heads["target"], path, n_ctx=64) as engine:
            text = engine.model.tokenize(PROMPT)[:length]
            engine.reader.read(text[:-1], 0)
            found = engine.drafter.reading.begin(text)[0]
            row = engine.context.recorders[0].rows[length - 2]
            head = HangingHead.of(GGUFFile(path))
            state = table_of(path, "fc.weight") @ row
            if path is tokens_only and length > 2:
                continue  # attention mixes them
            if path is tokens_only:
                embedding = table_of(heads["target"], "token_embd.weight")[text[-1]]
                pair = np.append(normed(embedding, head.epsilon), np.zeros(256))
                state = table_of(path, "blk.0.attn_output.weight") @ (table_of(path, "blk.0.attn_v.weight") @ pair)
            wanted = table_of(path, "output.weight") @ (normed(state, head.epsilon) * head.norm)
            assert found == pytest.approx(wanted, abs=0.05)


def test_a_prompt_in_pieces_and_a_full_context(heads) -> None:
    """Longer than a batch; drafting ends where the context does."""
    with Engine(heads["target"], heads["whole"], n_ctx=512) as engine, Engine(heads["target"], n_ctx=512) as other:
        engine.context.n_batch = engine.drafter.reading.context.n_batch = 64
        prompt = "the sea and the tea " * 20
        n = 512 - len(engine.model.tokenize(prompt)) + 1
        found = text_of(engine, SAMPLINGS["greedy"], n + 50, prompt, draft_max=3)
        assert len(found) == n
        assert found == text_of(other, SAMPLINGS["greedy"], n + 50, prompt, draft_max=0, drafter=NoDrafter())


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


def test_exact_finds_nothing(engines) -> None:
    engine = engines("whole")
    from llamabase.llama import Context

    with Context(engine.model, 256, n_outputs=32) as context:
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
    with pytest.raises(kind, match=said), Engine(heads["target"], path, n_ctx=64):
        pass


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_a_target_that_records_nothing_is_refused(heads, tmp_path: Path, architecture: str) -> None:
    target = write_model(tmp_path / "t.gguf", architecture, n_layer=4)
    with (
        pytest.raises(FileFormatError, match=f"records no inputs of layers for {architecture}"),
        Engine(target, heads["whole"], n_ctx=64),
    ):
        pass


def test_a_head_is_no_target_and_hangs_on_no_other_program(heads) -> None:
    from runner import TrimmedDraft

    with pytest.raises(FileFormatError, match="holds no tokenizer"):
        Engine(heads["whole"])
    with pytest.raises((FileFormatError, EngineError), match="hangs on its target's states"):
        TrimmedDraft(heads["own embeddings"], target=heads["target"])


def test_a_build_without_the_functions_is_told_what_to_install(heads, monkeypatch) -> None:
    monkeypatch.setattr(states, "_EXPERIMENTAL", {"llama_of_tomorrow": (None, [], "", "")})
    states._experimental.cache_clear()
    with (
        pytest.raises(EngineError, match=r"pip install llama-cpp-python==0\.3\.36"),
        Engine(heads["target"], heads["whole"]),
    ):
        pass
    monkeypatch.undo()
    states._experimental.cache_clear()


def test_a_head_says_what_it_is(heads) -> None:
    head = HangingHead.of(GGUFFile(heads["mapped"]))
    assert (head.layers, head.width, head.n_embd, head.n_vocab) == ((0, 1, 2), 256, 256, 600)
    assert (np.diff(head.ids) < 0).all()
