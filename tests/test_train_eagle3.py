"""tools/train_eagle3.py, at toy size on the CPU: PyTorch computes what llama.cpp does, and an interruption changes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Quant

torch = pytest.importorskip("torch")

from corpus.answers import TargetAnswer  # noqa: E402
from llamabase.errors import FileFormatError, TrimError  # noqa: E402
from llamabase.gguf import reader, writer  # noqa: E402
from llamabase.gguf.reader import GGUFFile  # noqa: E402
from llamabase.llama.context import F32, Context, ContextParams  # noqa: E402
from llamabase.llama.model import Model  # noqa: E402
from llamabase.llama.states import Recorded  # noqa: E402
from tools.eagle3 import texts, training  # noqa: E402
from tools.eagle3.check import check  # noqa: E402
from tools.eagle3.head import Head, export  # noqa: E402
from tools.eagle3.target import ROPE_FREQS, Target  # noqa: E402
from tools.eagle3.texts import Beginning, Prompts, Texts, generate, make_texts  # noqa: E402
from tools.eagle3.training import Training, load, save  # noqa: E402
from tools.train_eagle3 import main  # noqa: E402

from .toy import N_EMBD, write_model  # noqa: E402

CPU = torch.device("cpu")
LAYERS = (2, 3, 4)
TOKENS = np.random.default_rng(4).integers(3, 500, (3, 40))


def never() -> bool:
    return False


def with_frequencies(path: Path) -> Path:
    """The same model, each frequency of whose RoPE is divided by another number."""
    file, out = GGUFFile(path), path.with_name(f"scaled-{path.name}")
    data = np.linspace(1, 8, N_EMBD // 4 // 2, dtype="<f4")
    tensor = reader.Tensor(ROPE_FREQS, data.shape, Quant.F32, 0, data.nbytes)
    pieces = [*map(writer.Piece, file.tensors.values()), writer.Piece(tensor, data=data.tobytes())]
    with open(path, "rb") as source, open(out, "wb") as made:
        writer.Output([file.raw(key) for key in file.fields], pieces, file.alignment).write(source, made)
    return out


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Texts of few tokens, batches of few texts, and pieces of few bytes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MOST_PROMPT": 40, "MOST_SHORT": 6, "MOST_LONG": 20, "MOST_ANSWER": 24}.items():
            patch.setattr(texts, name, value)
        patch.setattr(texts, "CELLS", {"cpu": 1000})
        patch.setattr(training, "BATCH", {"cpu": 768})
        patch.setattr(training, "PIECE", 4_000_000)
        # Muon multiplies in bfloat16, at a sixth of the speed on processors that do not know it.
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
        yield


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("targets")
    paths = {
        "plain": write_model(folder / "plain.gguf", n_layer=7),
        "tied": write_model(folder / "tied.gguf", "llama-tied", n_layer=7),
        "grouped": write_model(folder / "grouped.gguf", n_layer=7, keys={"attention.head_count_kv": 2}),
    }
    return paths | {"scaled": with_frequencies(paths["grouped"])}


@pytest.mark.parametrize("name", ["plain", "tied", "grouped", "scaled"])
def test_states_and_logits_are_llama_cpps(targets: dict[str, Path], name: str) -> None:
    path, n = targets[name], TOKENS.shape[1]
    target = Target(GGUFFile(path), CPU)
    states = target.states(torch.from_numpy(TOKENS), LAYERS)
    logits = target.logits(states[..., -N_EMBD:])
    with Model(path) as model, Context(model, n, ContextParams(1, F32), n) as context:
        recorded = Recorded.of(context, "llama", LAYERS)
        for row, tokens in enumerate(TOKENS.tolist()):
            context.rewind(0)
            theirs = context.decode(tokens, n, True).copy()
            final = context.hidden_states(n)
            for mine, other in (
                (states[row, :, : 3 * N_EMBD], recorded.rows[:n]),
                (states[row, :, 3 * N_EMBD :], final),
                (logits[row], theirs),
            ):
                assert np.abs(mine.numpy() - other).max() < 1e-4 * np.abs(other).max()


def greedy(path: Path, prompts: list[list[int]], n: int) -> Iterator[list[int]]:
    """llama.cpp's own answers."""
    with Model(path) as model, Context(model, 256, ContextParams(1, F32)) as context:
        for prompt in prompts:
            context.rewind(0)
            answer, logits = [], context.decode(prompt)
            while len(answer) < n:
                answer.append(int(logits[0].argmax()))
                logits = context.decode(answer[-1:])
            yield answer


@pytest.mark.parametrize("name", ["plain", "grouped"])
def test_a_text_made_among_others_is_llama_cpps(targets: dict[str, Path], name: str) -> None:
    target, end = Target(GGUFFile(targets[name]), CPU), 599
    prompts = Prompts([], [], [], [7, 8, 9], [end])
    asked = [Beginning(f"asked-{n}", TOKENS[0, :n].tolist(), 0) for n in (3, 9, 30)]
    drawn = [Beginning(f"short-{n}", TOKENS[1, :n].tolist(), n) for n in (1, 6)]
    made, begins = generate(target, prompts, [*asked, *drawn], seed=1)
    for text, tokens, begin in zip([*asked, *drawn], made, begins, strict=True):
        assert tokens[: len(text.ids)].tolist() == text.ids
        if text.n_drawn:
            assert begin <= len(text.ids) + text.n_drawn - 1 + 3
            assert tokens[begin - 3 : begin].tolist() == prompts.tail
        else:
            assert begin == len(text.ids)
    answers = greedy(targets[name], [tokens[:begin].tolist() for tokens, begin in zip(made, begins, strict=True)], 24)
    for tokens, begin, answer in zip(made, begins, answers, strict=True):
        assert tokens[begin:].tolist() == answer


def test_an_answer_ends(targets: dict[str, Path]) -> None:
    """At the first token that ends one; a user's turn ends there, too, and without it."""
    target, ids = Target(GGUFFile(targets["plain"]), CPU), TOKENS[0, :9].tolist()
    (answer,) = greedy(targets["plain"], [ids], 24)
    end = answer[5]
    prompts = Prompts([], [], [], [7, 8, 9], [end])
    (tokens,), _ = generate(target, prompts, [Beginning("asked-0", ids, 0)], 0)
    assert tokens[9:].tolist() == answer[: answer.index(end) + 1]
    every = Prompts([], [], [], [7, 8, 9], list(range(600)))
    (tokens,), (begins,) = generate(target, every, [Beginning("short-0", ids, 6)], 0)
    assert tokens[:begins].tolist() == [*ids, 7, 8, 9] and len(tokens) == begins + 1


@pytest.fixture(scope="module")
def prompts(targets: dict[str, Path]) -> Prompts:
    return Prompts.of(GGUFFile(targets["grouped"]))


def contents(folder: Path) -> dict[str, list[np.ndarray]]:
    return {path.name: list(np.load(path).values()) for path in sorted(folder.glob("texts-*.npz"))}


def test_interrupted_texts_are_the_same(targets: dict[str, Path], prompts: Prompts, tmp_path: Path) -> None:
    target = Target(GGUFFile(targets["grouped"]), CPU)
    for name in ("once", "again"):
        (tmp_path / name).mkdir()
    assert make_texts(tmp_path / "once", target, prompts, 24, never)
    runs, done = 0, False
    while not done:
        asked = iter([False, True])
        done = make_texts(tmp_path / "again", target, prompts, 24, lambda asked=asked: next(asked))
        runs += 1
    once, again = contents(tmp_path / "once"), contents(tmp_path / "again")
    assert runs == len(once) > 1
    assert once.keys() == again.keys()
    for name, arrays in once.items():
        for a, b in zip(arrays, again[name], strict=True):
            assert np.array_equal(a, b)


@pytest.fixture(scope="module")
def made(
    targets: dict[str, Path], prompts: Prompts, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Training]:
    """A training over a few texts, begun as often as it is called."""
    folder, file = tmp_path_factory.mktemp("made"), GGUFFile(targets["grouped"])
    target = Target(file, CPU)
    make_texts(folder, target, prompts, 48, never)
    return lambda: Training(Texts(folder, CPU), file, target, LAYERS)


def test_interrupted_training_is_the_same(made: Callable[[], Training], tmp_path: Path) -> None:
    for name in ("once", "again"):
        (tmp_path / name).mkdir()
    once, done = made().run(tmp_path / "once", never)
    assert done
    runs, done = 0, False
    while not done:
        asked = iter([False] * 2 + [True])
        again, done = made().run(tmp_path / "again", lambda asked=asked: next(asked))
        runs += 1
        assert all(path.stat().st_size <= training.PIECE for path in (tmp_path / "again").glob("head-*.pt"))
    assert runs > 2
    for name, values in once.state_dict().items():
        assert torch.equal(values, again.state_dict()[name]), name


def test_a_checkpoint_lacks_no_piece(targets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "PIECE", 400_000)
    head = Head(GGUFFile(targets["plain"]))
    assert load(tmp_path) is None
    save(tmp_path, head, [], 3, 9)
    pieces = sorted(tmp_path.glob("head-*.pt"))
    assert len(pieces) > 10
    stale = tmp_path / "head-000004-01of02.pt"  # as a kill leaves it
    stale.write_bytes(b"")
    state = load(tmp_path)
    assert state is not None and state["update"] == 3
    assert torch.equal(state["head"]["fc.weight"], head.fc.weight)
    save(tmp_path, head, [], 5, 9)
    assert {path.name[:11] for path in tmp_path.glob("head-*.pt")} == {"head-000005"}
    next(tmp_path.glob("head-*.pt")).unlink()
    with pytest.raises(TrimError, match="pieces of a checkpoint; bring the others"):
        load(tmp_path)


def test_a_trained_head_drafts_the_same_in_llama_cpp(made: Callable[[], Training], tmp_path: Path) -> None:
    run = made()
    head, _ = run.run(tmp_path, never)
    shares = run.acceptance(head, run.texts.held)
    assert shares[0] > 0.1  # by chance, 1 in 600
    answers = [TargetAnswer(name, "own", *both) for name, both in run.texts.answers(9).items()]
    for type_, rows, most in ((Quant.F32, run.target.head, 5e-3), (Quant.Q8_0, None, 0.2)):
        path = tmp_path / f"{type_.name}.gguf"
        export(path, head, run.file, LAYERS, type_, rows)
        found = check(path, head, run.target, run.file, answers, len(answers))
        assert max(found.gaps) < most * np.mean(found.spreads)
    (counts,) = (check(tmp_path / "F32.gguf", head, run.target, run.file, answers, 0)).counts.values()
    assert (counts[:, 0] / np.maximum(counts[:, 1], 1)).tolist() == pytest.approx(shares, abs=0.02)


def test_the_command_goes_on_to_the_end(targets: dict[str, Path], tmp_path: Path) -> None:
    arguments = [str(tmp_path / "w"), str(targets["grouped"]), "--texts", "48"]
    stopped = CliRunner().invoke(main, [*arguments, "--minutes", "0"])
    assert stopped.exit_code == 0 and "the same command goes on" in stopped.stderr
    said = []
    for _ in range(2):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        said.append(done.stdout)
        for path in (tmp_path / "w").glob("texts-*.npz"):  # a finished head is exported without them
            path.unlink()
    assert said[0] == said[1]
    assert "eagle3-f16.gguf, held.json: all: " in said[0] and "eagle3-q8_0.gguf, held.json: all: " in said[0]
    for path in (tmp_path / "w").iterdir():
        assert path.stat().st_size < 16_000_000


def test_a_folder_is_of_one_target(targets: dict[str, Path], tmp_path: Path) -> None:
    for name, code in (("plain", 0), ("tied", 1)):
        said = CliRunner().invoke(main, [str(tmp_path), str(targets[name]), "--minutes", "0"])
        assert said.exit_code == code, said.output
    assert (
        said.stderr
        == f"Error: {tmp_path}: holds the texts of another target than {targets['tied']}; choose another folder\n"
    )


def test_the_page_gives_commands_that_exist() -> None:
    text = (Path(__file__).parent.parent / "docs" / "eagle3.md").read_text("utf-8")
    commands = [line.split() for line in text.splitlines() if line.startswith("    python -m tools.train_eagle3 ")]
    assert commands
    for command in commands:
        main.make_context("train_eagle3", command[3:])  # raises for what there is not


def test_what_it_cannot_train_is_refused(tmp_path: Path) -> None:
    for path, reason in (
        (write_model(tmp_path / "qwen3.gguf", "qwen3"), "its architecture is qwen3"),
        (write_model(tmp_path / "biased.gguf", head_bias=True), "it has a tensor output.bias"),
        (write_model(tmp_path / "partial.gguf", keys={"rope.dimension_count": 32}), "it turns only a part"),
    ):
        with pytest.raises(FileFormatError, match=reason):
            Target(GGUFFile(path), CPU)
    said = CliRunner().invoke(main, [str(tmp_path / "w"), str(path)])
    assert said.exit_code == 1 and said.stderr.count("\n") == 1
