"""The vocabulary chosen at every step: the parts against plain references, then the whole loop on toys."""

from __future__ import annotations

import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Quant
from hypothesis import given
from hypothesis import strategies as st

from gguf_trim.__main__ import main as gguf_trim
from gguf_trim.cut import lay_out, write
from gguf_trim.fit.closed_form import attach, blocks, fit
from gguf_trim.format import speculator
from gguf_trim.format.companion import Trimmed, companion_path
from gguf_trim.format.selection import Chooser, Recent, chosen, scorer, top
from gguf_trim.format.speculator import Speculator
from llamabase.errors import EngineError, FileFormatError, TrimError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import head_tensor
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.context import Context
from llamabase.llama.ggml import Backend, Product, Table, aligned, dequantizer, quantize_rows
from llamabase.llama.model import Model
from llamabase.sampling.chain import Chain
from llamabase.sampling.noise import Distribution, Noise
from llamabase.sampling.settings import Sampling
from runner.draft import rows as dynamic
from runner.draft.drafters import ModelDrafter
from runner.draft.opening import DraftOptions, open_drafter
from runner.draft.rows import DynamicHead

from .conftest import TEXTS, copy_trimmed, keep_first, with_speculator
from .toy import ARCHITECTURES, HEAD_TYPES, write_model

GREEDY = Sampling(temp=0)


def head_of(file: GGUFFile) -> np.ndarray:
    return np.concatenate([block for _, block in blocks(file, head_tensor(file))])


def scores_of(made: Speculator, hidden: np.ndarray) -> np.ndarray:
    """The plain reference of what ggml computes at run time: float32 (V)."""
    up = np.empty((len(made.up), made.rank), np.float32)
    dequantizer(speculator.UP_TYPE)(np.ascontiguousarray(made.up), up)
    return up @ (made.down @ hidden)


@pytest.fixture
def spec(toys: dict[str, Path], tmp_path: Path) -> Path:
    """The good drafter cut to few rows, with a speculator."""
    return copy_trimmed(toys["spec-trimmed"], tmp_path / "spec.gguf")


@pytest.mark.parametrize("type_", [Quant.F32, Quant.F16, Quant.Q8_0, Quant.Q4_0, Quant.Q4_K, Quant.Q6_K])
def test_products_are_ggmls_own(type_: Quant) -> None:
    """A chain of two tables and the first rows of the last, against numpy on the expanded rows."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((300, 256)).astype(np.float32)
    data = quantize_rows(values, type_)
    rows = aligned(data.nbytes).reshape(data.shape)
    rows[:] = data
    expanded = np.empty_like(values)
    dequantizer(type_)(rows, expanded)
    first = rng.standard_normal((256, 64)).astype(np.float32)
    table = aligned(first.nbytes).reshape(256, -1)
    table[:] = first.view(np.uint8)
    x = rng.standard_normal(64).astype(np.float32)
    found = Product(Backend(2), Table(table, Quant.F32, 64), Table(rows, type_, 256), n_rows=200)(x)
    wanted = expanded[:200] @ (first @ x)
    tolerance = 1e-5 if type_ == Quant.F32 else 0.02  # for the others ggml quantises the vector, too: to eight bits
    assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max()


def test_tables_that_ggml_would_misread_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of Q8_0 block size"):
        Table(aligned(4 * 34).reshape(4, 34), Quant.Q8_0, 33)
    with pytest.raises(EngineError, match="do not look like"):
        Table(aligned(4 * 34).reshape(4, 34), Quant.Q8_0, 64)
    with pytest.raises(EngineError, match="multiple of 32"):
        Table(aligned(8 + 34)[8:].reshape(1, 34), Quant.Q8_0, 32)


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=400), st.integers(1, 450))
def test_top_is_the_greatest(values: list[int], m: int) -> None:
    scores = np.array(values, np.float32)
    found = top(scores, m)
    assert len(set(found.tolist())) == len(found) == min(m, len(values))
    assert sorted(scores[found]) == sorted(values)[-m:]


@pytest.mark.parametrize("type_", [Quant.Q8_0, Quant.Q6_K])  # ggml copies rows of 4 n bytes, as Q6_K's are not
@pytest.mark.parametrize(("n", "m"), [(300, 64), (203, 64), (70, 64), (64, 64), (203, 61)])
def test_the_best_of_each_group_are_chosen_and_copied(type_: Quant, n: int, m: int) -> None:
    rng = np.random.default_rng(n)
    values = quantize_rows(rng.standard_normal((320, 256)).astype(np.float32), type_)
    head = aligned(values.nbytes).reshape(values.shape)
    head[:] = values
    made = Speculator(
        rng.standard_normal((32, 256)).astype(np.float32),
        quantize_rows(rng.standard_normal((320, 32)).astype(np.float32), speculator.UP_TYPE),
        0,
    )
    row_of = rng.permutation(320).astype(np.int32)
    ids, target = np.sort(rng.permutation(320)[:n]).astype(np.int32), aligned(m * head.shape[1]).reshape(m, -1)
    choose = Chooser(Backend(2), made, Table(head, type_, 256), row_of, ids, target)
    hidden = rng.standard_normal(256).astype(np.float32)
    scores = np.append(scorer(Backend(2), made)(hidden)[row_of[ids]], np.zeros(-n % 16))
    places = chosen(scores, m)
    assert len(set(places) & set(top(scores, m))) > 0.6 * m
    wanted = set(ids.take(places, mode="clip").tolist())

    for _ in range(2):
        found = choose(hidden)
        assert set(found.tolist()) == wanted
        assert (target == head[row_of[found]]).all()


@given(st.lists(st.lists(st.integers(0, 30), max_size=30), min_size=1, max_size=6), st.integers(1, 8))
def test_recent_tokens_depend_on_the_text_alone(texts: list[list[int]], size: int) -> None:
    """Growing, rewinding, changing: what is held is always the last distinct wanted tokens of the text at hand."""
    wanted = np.arange(28) % 3 != 0
    recent, held = Recent(wanted, size), {}
    for text in texts:
        held.update(recent.follow(text))
        expected = list(dict.fromkeys(i for i in reversed(text) if i < 28 and wanted[i]))[:size]
        assert list(reversed(recent.slots)) == expected
        # Slots are numbered without gaps, and hold what they are said to hold.
        assert sorted(recent.slots.values()) == list(range(len(expected)))
        assert all(held[slot] == token for token, slot in recent.slots.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_added_rows_have_the_full_heads_logits(
    architecture: str, head_type: Quant, tmp_path: Path, monkeypatch
) -> None:
    source = write_model(tmp_path / "source.gguf", architecture, head_type, n_tokens=600)
    cut = tmp_path / "cut.gguf"
    write(lay_out(source, keep_first(40)), cut)
    trimmed = Trimmed.open(with_speculator(cut))
    text = TEXTS[0]
    with Model(source) as model, Context(model, 128) as context:
        full = context.decode(text, 1)[0].copy()
    with Model(cut) as model, Context(model, 128, n_outputs=64) as context:
        kept = context.decode(trimmed.embeddings().rows(text), len(text), hidden=True)[-1].copy()
        hidden = context.hidden_states(len(text))[-1].copy()
    monkeypatch.setattr(dynamic, "CANDIDATES", 64)
    head = DynamicHead(trimmed, Backend(1), Speculator.of(trimmed))
    assert head.agrees(kept, hidden)
    assert not head.agrees(kept[::-1], hidden)
    head.follow(text)
    ids, logits = head.logits(hidden)
    assert len(set(ids.tolist())) > 64
    logit_of = dict(zip(ids.tolist(), logits, strict=True))
    assert len(logit_of) < len(ids) and [logit_of[i] for i in ids.tolist()] == logits.tolist()
    assert not np.isin(ids, trimmed.d2t).any()
    assert set(text) <= {*ids.tolist(), *trimmed.d2t.tolist()}
    assert np.abs(logits - full[ids]).max() < (1e-4 if head_type == Quant.F32 else 0.02) * np.ptp(full)


def test_closed_form_is_exact_at_full_rank_and_best_below(toys: dict[str, Path]) -> None:
    """At full rank the scores are the logits, but for one number added to all; below, no other matrix comes nearer."""
    file = GGUFFile(toys["target"])
    w = head_of(file).astype(np.float64)
    rng = np.random.default_rng(0)
    states = rng.standard_normal((500, 256)) * np.linspace(0.1, 3, 256)
    moment = states.T @ states / len(states)
    made = fit(file, states.astype(np.float32), 256)
    assert made.rank == 256
    logits = w @ states[0]
    off = logits - scores_of(made, states[0].astype(np.float32))
    assert np.ptp(off) < 0.25 * np.ptp(logits)  # what Q4_0 leaves

    def error(low: np.ndarray) -> float:
        centred = (w - w.mean(axis=0)) - low
        return float(np.trace(centred @ moment @ centred.T))

    small = fit(file, states.astype(np.float32), 32)
    up = np.empty((len(w), 32), np.float32)
    dequantizer(speculator.UP_TYPE)(small.up, up)
    u, s, vt = np.linalg.svd(w - w.mean(axis=0), full_matrices=False)
    plain = (u[:, :32] * s[:32]) @ vt[:32]
    assert error(up @ small.down) < error(plain)


def test_training_lowers_the_cross_entropy(toys: dict[str, Path]) -> None:
    """On the states it is trained on, from the closed form down; PyTorch is an extra."""
    pytest.importorskip("torch")
    from gguf_trim.fit.train import distil

    file = GGUFFile(toys["target"])
    w = head_of(file)
    states = np.random.default_rng(0).standard_normal((200, 256)).astype(np.float32)
    start = fit(file, states, 32)
    found = distil(start, file, states, 60)

    def cross_entropy(made: Speculator) -> float:
        scores = np.stack([scores_of(made, state) for state in states])
        logits = states @ w.T
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        log_q = scores - scores.max(axis=1, keepdims=True)
        log_q -= np.log(np.exp(log_q).sum(axis=1, keepdims=True))
        return float(-(p / p.sum(axis=1, keepdims=True) * log_q).sum(axis=1).mean())

    assert cross_entropy(found) < cross_entropy(start)


def test_training_without_torch_says_what_to_install(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    done = CliRunner().invoke(gguf_trim, ["speculator", str(spec), "--train", "5"])
    assert done.exit_code == 1
    assert "gguf-trim[train]" in done.stderr


def test_command_fits_on_text_of_ones_own(toys: dict[str, Path], spec: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps({str(i): [text[:5], text[5:]] for i, text in enumerate(TEXTS)}))
    done = CliRunner().invoke(gguf_trim, ["speculator", str(spec), "--calibration", str(answers), "--rank", "40"])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{companion_path(spec)}\n"
    assert "rank 64, fitted on 360 positions" in done.stderr
    done = CliRunner().invoke(gguf_trim, ["speculator", str(toys["target"])])
    assert done.exit_code == 1
    assert "not a trimmed drafter" in done.stderr


def test_a_speculator_is_kept_in_the_companion(toys: dict[str, Path], spec: Path) -> None:
    """Everything else in the companion stays, byte by byte; a second one takes the first one's place."""
    before, after = GGUFFile(companion_path(toys["tiny-trimmed"])), GGUFFile(companion_path(spec))
    assert before.fields.keys() < after.fields.keys()
    for name, tensor in before.tensors.items():
        with open(before.path, "rb") as a, open(after.path, "rb") as b:
            a.seek(tensor.offset)
            b.seek(after.tensors[name].offset)
            assert a.read(tensor.n_bytes) == b.read(tensor.n_bytes)
    made = Speculator.of(Trimmed.open(spec))
    assert made is not None
    assert (made.rank, made.n_positions, len(made.up)) == (32, 480, 600)
    size = after.size
    with_speculator(spec, 64)
    again = Speculator.of(Trimmed.open(spec))
    assert again is not None
    assert again.rank == 64
    assert GGUFFile(companion_path(spec)).size > size
    with_speculator(spec)
    assert GGUFFile(companion_path(spec)).size == size


def test_a_full_disk_leaves_the_companion_as_it_was(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = Trimmed.open(spec)
    before = companion_path(spec).read_bytes()
    made = Speculator.of(trimmed)
    assert made is not None

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrimError, match="disk is full"):
        attach(trimmed, made)
    assert companion_path(spec).read_bytes() == before
    assert not list(spec.parent.glob(".*.part"))


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(weights / weights.sum())


def open_with(toys: dict[str, Path], path: Path, vocab: str) -> ModelDrafter:
    return open_drafter(DraftOptions(path, 256, vocab=vocab), Vocabulary(GGUFFile(toys["target"])))


def test_more_sources_draft_more_tokens_right(toys: dict[str, Path], spec: Path) -> None:
    """The full model's argmax after each text: out of reach of few rows, in reach of the speculator's candidates."""
    right = dict.fromkeys(("trim", "context", "spec"), 0)
    with Model(toys["target"]) as model, Context(model, 256) as context:
        wanted = []
        for text in TEXTS:
            context.truncate(0)
            wanted.append(int(context.decode(text, 1)[0].argmax()))
    for vocab in right:
        drafter = open_with(toys, spec, vocab)
        for text, token in zip(TEXTS, wanted, strict=True):
            drafted = drafter.draft(text, 1, GREEDY, Noise(0))
            right[vocab] += drafted == [token]
        drafter.close()
    assert right["trim"] <= right["context"] <= right["spec"] == len(TEXTS)


def test_a_speculator_of_another_head_is_refused(toys: dict[str, Path], spec: Path) -> None:
    trimmed = Trimmed.open(spec)
    made = Speculator.of(trimmed)
    assert made is not None
    attach(trimmed, Speculator(made.down, made.up[:-1], 1))
    with pytest.raises(FileFormatError, match="does not fit its head"):
        open_with(toys, spec, "auto")


def test_vocab_needs_what_it_names(toys: dict[str, Path], spec: Path) -> None:
    with pytest.raises(EngineError, match="holds no speculator"):
        open_with(toys, toys["tiny-trimmed"], "spec")
    for path, vocab in ((toys["tiny-trimmed"], "auto"), (spec, "auto"), (toys["target"], "spec")):
        open_with(toys, path, vocab).close()


def test_a_head_that_does_more_is_left_alone(toys: dict[str, Path], spec: Path, monkeypatch) -> None:
    """Where the logits are not head times hidden state, rows cannot be added: refused, or left out by auto."""
    monkeypatch.setattr(dynamic.DynamicHead, "agrees", lambda *_: False)
    closed: list[str] = []
    for kind in (Context, Model):

        def close(self: Context | Model, honest: Any = kind.close) -> None:
            closed.append(type(self).__name__)
            honest(self)

        monkeypatch.setattr(kind, "close", close)
    with pytest.raises(EngineError, match="are not the product of its head") as refused:
        open_with(toys, spec, "spec")
    assert closed[:2] == ["Context", "Model"] and refused.tb  # which keeps the context from the collector
    drafter = open_with(toys, spec, "auto")
    assert drafter.dynamic is None
    drafter.close()


@pytest.mark.parametrize("name", ["target", "tiny-trimmed", "spec"])
def test_greedy_drafts_are_those_of_the_whole_row(toys: dict[str, Path], spec: Path, name: str, monkeypatch) -> None:
    """Token and certainty of kept and added rows apart, as the distribution over all of them has it."""
    drafter = open_with(toys, toys.get(name, spec), "auto")
    honest, of_added, wanted = ModelDrafter._likeliest, [], []

    def compared(self: ModelDrafter, *step: np.ndarray) -> tuple[int, np.float32]:
        row, ids = self._merged(*step)
        (token,) = Chain(GREEDY, ()).distribution(row, ids).ids
        of_added.append(token in step[1])
        wanted.append((token, pytest.approx(softmax(row).max(), rel=1e-6)))
        return honest(self, *step)

    monkeypatch.setattr(ModelDrafter, "_likeliest", compared)
    for text in TEXTS:
        wanted.clear()
        proposals = list(islice(drafter.propose(text, GREEDY, Noise(0)), 4))
        assert [(proposal.token, proposal.certainty) for proposal in proposals] == wanted
    drafter.close()
    assert len(of_added) == 4 * len(TEXTS)
    assert any(of_added) == (name != "target")


def test_drafts_of_a_fixed_length_cost_no_certainty(toys: dict[str, Path], spec: Path, monkeypatch) -> None:
    drafter = open_with(toys, spec, "auto")
    wanted = [proposal.token for proposal in islice(drafter.propose(TEXTS[0], GREEDY, Noise(0)), 4)]
    monkeypatch.setattr("runner.draft.drafters._certainty", lambda *_: pytest.fail("was computed"))
    assert drafter.draft(TEXTS[0], 4, GREEDY, Noise(0)) == wanted
    drafter.close()


@given(st.lists(st.integers(-2, 2), min_size=40, max_size=40), st.permutations(range(40)), st.integers(0, 39))
def test_of_equal_logits_the_lowest_id_is_drafted(levels: list[int], order: list[int], n: int) -> None:
    """Few levels, so that most greatest logits are several, kept or added; added ones come in any order."""
    logits, more = np.array(levels, np.float32), np.array(order[:n], np.int32)
    drafter = object.__new__(ModelDrafter)
    drafter._ids = np.setdiff1d(np.arange(40, dtype=np.int32), more)
    step = logits[drafter._ids], more, logits[more]
    row, ids = drafter._merged(*step)
    assert (row == logits).all() and (ids == np.arange(40)).all()
    assert drafter._likeliest(*step) == (int(logits.argmax()), logits.max())


def test_greedy_drafts_heed_bias_and_penalties(toys: dict[str, Path], spec: Path) -> None:
    drafter = open_with(toys, spec, "spec")
    text, outside = TEXTS[0], TEXTS[0][-1]
    assert outside not in drafter._ids  # an added row
    assert drafter.draft(text, 3, Sampling(temp=0, logit_bias={outside: 1e6}), Noise(0)) == [outside] * 3
    drafts = drafter.draft(text, 8, Sampling(temp=0, presence_penalty=1e6, repeat_last_n=-1), Noise(0))
    assert len({*text, *drafts}) == len({*text}) + 8
    drafter.close()


def test_sampled_drafts_are_drawn_from_the_full_heads_softmax(toys: dict[str, Path], spec: Path, monkeypatch) -> None:
    """Over ascending ids, kept and added ones."""
    seen: list[Distribution] = []
    honest = Distribution.draw
    monkeypatch.setattr(Distribution, "draw", lambda self, *at: seen.append(self) or honest(self, *at))
    drafter = open_with(toys, spec, "spec")
    with Model(toys["target"]) as model, Context(model, 256) as context:
        full = context.decode(TEXTS[0], 1)[0].copy()
    drafter.draft(TEXTS[0], 1, Sampling(1.0, 0, 1.0, 0.0), Noise(0))
    drafter.close()
    (q,) = seen
    assert (np.diff(q.ids) > 0).all()
    assert len(q.ids) > 512
    weights = np.exp(full[q.ids] - full.max())
    assert q.probs == pytest.approx(weights / weights.sum(), abs=1e-4)
