"""The planner against what it predicts: real cuts replayed, and the live loop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from corpus.answers import TargetAnswer
from corpus.counts import Counts
from gguf_trim.__main__ import main
from gguf_trim.cut import lay_out, write
from gguf_trim.fit.calibrate import TeacherForced, share
from gguf_trim.fit.closed_form import attach, fit
from gguf_trim.format.companion import Trimmed
from gguf_trim.format.memory_bound import StepWeights, step_bytes
from gguf_trim.format.speculator import Speculator
from gguf_trim.keep import keep_listed, keep_order
from gguf_trim.plan.added import AddedRows
from gguf_trim.plan.matches import tau_of
from gguf_trim.plan.planner import matches_of, sampled_acceptance
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.context import Context
from llamabase.llama.model import Model
from llamabase.llama.quantize import requantized
from llamabase.sampling.settings import Sampling
from runner.exact import plain_tokens
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .toy import write_model

N_TOKENS = 40


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target, and a drafter that agrees with it only sometimes: the same weights under Q4_K."""
    folder = tmp_path_factory.mktemp("pair")
    target = write_model(folder / "target.gguf", seed=1, sharpness=2.0)
    return target, requantized(target, "Q4_0", folder)


@pytest.fixture(scope="module")
def answers(pair) -> list[TargetAnswer]:
    """The target's own greedy text, one token at a time."""
    found = []
    with Model(pair[0]) as model, Context(model, 256) as context:
        for i, text in enumerate(("the king and the sea", "a", "of tea", "once more")):
            prompt = model.tokenize(text)
            tokens = plain_tokens(context, prompt, N_TOKENS, lambda token: False)
            found.append(TargetAnswer(f"p{i}", "xy"[i % 2], prompt, tokens))
    return found


@pytest.fixture(scope="module")
def counts(pair, answers) -> Counts:
    vocabulary = Vocabulary(GGUFFile(pair[1]))
    dense = np.bincount(answers[0].answer + answers[1].answer, minlength=len(vocabulary))
    return Counts.of(dense, vocabulary, "two answers")


def cut_to(drafter: Path, order: np.ndarray, k: int, out: Path) -> Path:
    write(lay_out(drafter, lambda vocabulary, has_row, _: keep_listed(vocabulary, has_row, order.tolist(), k)), out)
    return out


def test_acceptance_is_a_replay_of_real_cuts(pair, answers, counts, tmp_path) -> None:
    """For every k tried: cut the drafter, read the same answers with it, take the argmax at each position."""
    vocabulary = Vocabulary(GGUFFile(pair[1]))
    order = keep_order(vocabulary, np.ones(600, bool), counts)
    found = matches_of(pair[1], answers, order)
    assert 0.2 < share(found.right(600)) < 1  # a drafter that is always or never right would prove little
    for k in (64, 288, 320, 352, 384, 512):
        trimmed = cut_to(pair[1], order, k, tmp_path / f"k{k}.gguf")
        opened = Trimmed.open(trimmed)
        with Model(trimmed) as model, Context(model, 256, n_outputs=64) as context:
            for answer, predicted in zip(answers, found.right(k), strict=True):
                context.truncate(0)
                vectors = opened.embeddings().rows([*answer.prompt, *answer.answer[:-1]])
                rows = context.decode(vectors, len(answer.answer))
                assert (opened.d2t[rows.argmax(axis=1)] == answer.answer).tolist() == predicted.tolist()


@pytest.mark.parametrize("vocab", ["trim", "context", "spec"])
def test_tau_is_what_the_live_loop_measures(pair, answers, counts, tmp_path, monkeypatch, vocab) -> None:
    """Position by position, also where rows are added at every step; few candidates, or all rows would be added."""
    for module in ("runner.draft.rows", "gguf_trim.plan.added"):
        monkeypatch.setattr(f"{module}.CANDIDATES", 20)
    monkeypatch.setattr("gguf_trim.plan.added.CORES", (296,))
    vocabulary = Vocabulary(GGUFFile(pair[1]))
    order = keep_order(vocabulary, np.ones(600, bool), counts)
    trimmed = cut_to(pair[1], order, 296, tmp_path / "k296.gguf")
    opened = Trimmed.open(trimmed)
    attach(opened, fit(opened.companion, TeacherForced.of(trimmed, answers, opened).states))
    added = AddedRows(np.argsort(order), Speculator.of(Trimmed.open(trimmed)))
    found = matches_of(pair[1], answers, order, added=added)
    rights = found.right(296) if vocab == "trim" else added.by_core[vocab, 296].rights
    with Engine(LoadOptions(pair[0], trimmed, n_ctx=256, vocab=vocab)) as engine:
        rounds = [
            round_
            for answer in answers
            for round_ in engine.rounds(answer.prompt, Sampling(temp=0), max_tokens=N_TOKENS, draft_max=3)
        ]
    tokens = [token for round_ in rounds for token in round_.tokens]
    assert tokens == [token for answer in answers for token in answer.answer]
    assert len(tokens) / len(rounds) == pytest.approx(tau_of(rights, 3), rel=0.02)
    taus = [tau_of(found.right(296), 3), *(rows.rights and tau_of(rows.rights, 3) for rows in added.by_core.values())]
    assert taus == sorted(taus)
    assert taus[0] < taus[-1]


def test_weights_are_what_a_cut_reads(pair, counts, tmp_path) -> None:
    weights = StepWeights.of(GGUFFile(pair[1]))
    order = keep_order(Vocabulary(GGUFFile(pair[1])), np.ones(600, bool), counts)
    for k in (320, 512):
        trimmed = cut_to(pair[1], order, k, tmp_path / f"w{k}.gguf")
        assert weights.bytes_at(k) == step_bytes(GGUFFile(trimmed))
    assert weights.bytes_at(600) == step_bytes(GGUFFile(pair[1]))


def test_sampled_acceptance_by_hand(pair, answers, counts) -> None:
    """The mean of the agreement, by its formula, from full rows of logits of both models, here in the plainest way."""
    vocabulary = Vocabulary(GGUFFile(pair[1]))
    order = keep_order(vocabulary, np.ones(600, bool), counts)
    law = Sampling(temp=1.0, top_k=0, top_p=1, min_p=0)
    found = sampled_acceptance(*pair, answers[:1], order, [300, 600], law)
    rows = {}
    for path in pair:
        with Model(path) as model, Context(model, 256, n_outputs=64) as context:
            context.decode(answers[0].prompt[:-1], 0)
            rows[path] = context.decode([answers[0].prompt[-1], *answers[0].answer[:-1]], N_TOKENS).copy()
    for k in (300, 600):
        q = np.full_like(rows[pair[1]], -np.inf)
        q[:, order[:k]] = rows[pair[1]][:, order[:k]]
        p, q = (np.exp(x - x.max(axis=1, keepdims=True)) for x in (rows[pair[0]], q))
        p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
        chances = []
        for a, b in zip(p, q, strict=True):
            a, b = a.astype(np.float64), b.astype(np.float64)
            chances.append(sum(1 / np.maximum(a / a[x], b / b[x]).sum() for x in np.flatnonzero(b)))
        assert found[k] == pytest.approx(np.mean(chances), abs=1e-5)


def test_command(pair, answers, counts, tmp_path) -> None:
    target, drafter = map(str, pair)
    counts.save(tmp_path / "c.npz")
    (tmp_path / "answers.json").write_text(json.dumps({a.id: [a.prompt, a.answer] for a in answers}))
    common = ["plan", "--target", target, "--draft", drafter, "--counts", str(tmp_path / "c.npz")]
    done = CliRunner().invoke(main, [*common, "--answers", str(tmp_path / "answers.json"), "--json", "--no-measure"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    wanted = {"vocab", "k", "draft_max", "acceptance_rate", "tau", "mbsu_params", "mbsu_bytes", "tokens_per_second"}
    assert all(wanted <= row.keys() for row in rows)
    assert {row["k"] for row in rows} == {512, 600}
    done = CliRunner().invoke(main, [*common, "--answers", str(tmp_path / "answers.json"), "--types", "Q8_0"])
    assert done.exit_code == 0, done.output
    for part in ("best: vocabulary ", "plain decoding", "drafter Q8_0", "The target's type decides, too."):
        assert part in done.stdout
    picture = tmp_path / "plan.png"
    arguments = [*common, "--answers", str(tmp_path / "answers.json"), "--no-measure", "--plot", str(picture)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bad_answers_are_named(pair, counts, tmp_path) -> None:
    counts.save(tmp_path / "c.npz")
    arguments = ["plan", "--target", str(pair[0]), "--draft", str(pair[1]), "--counts", str(tmp_path / "c.npz")]
    for text in ("", "[]", '{"a": [1]}', '{"a": [[1], ["x"]]}', "{}"):
        (tmp_path / "a.json").write_text(text)
        done = CliRunner().invoke(main, [*arguments, "--answers", str(tmp_path / "a.json")])
        assert done.exit_code == 1
        assert "a.json" in done.stderr


def test_requantised_trim_runs(pair, counts, tmp_path) -> None:
    counts.save(tmp_path / "c.npz")
    out = tmp_path / "q.gguf"
    arguments = ["trim", str(pair[0]), "--counts", str(tmp_path / "c.npz"), "--k", "320", "-o", str(out)]
    done = CliRunner().invoke(main, [*arguments, "--requant", "q8_0"])
    assert done.exit_code == 0, done.output
    assert len(Trimmed.open(out).d2t) == 320
    assert {tensor.type.name for tensor in GGUFFile(out).tensors.values()} == {"F32", "Q8_0"}
    with Engine(LoadOptions(pair[0], out, n_ctx=128)) as engine:
        assert list(engine.rounds([65], Sampling(temp=0), max_tokens=5))
    done = CliRunner().invoke(main, [*arguments, "--requant", "nonsense"])
    assert done.exit_code == 2
    assert "is not a llama.cpp quantisation" in done.stderr
    assert len(Trimmed.open(out).d2t) == 320  # what was there stays


@pytest.mark.parametrize(
    ("rule", "said"),
    [(["--top-p", "0.9"], "rows kept"), (["--min-count", "2"], "rows kept"), (["--k", "x"], "neither")],
)
def test_other_rules(pair, counts, tmp_path, rule, said) -> None:
    counts.save(tmp_path / "c.npz")
    arguments = ["trim", str(pair[0]), "--counts", str(tmp_path / "c.npz"), "-o", str(tmp_path / "o.gguf"), "--dry-run"]
    done = CliRunner().invoke(main, [*arguments, *rule])
    assert said in done.output
    assert done.exit_code == (2 if said == "neither" else 0)
