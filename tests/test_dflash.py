"""DFlash drafters and their kin (DSpark, DFlash2), which llama-server runs: cut, proven in stock llama.cpp, not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant

from corpus.answers import TargetAnswer
from gguf_trim.cut import lay_out, write
from gguf_trim.describe import describe
from gguf_trim.fit.calibrate import TeacherForced
from gguf_trim.format.memory_bound import step_bytes
from gguf_trim.format.state_fed import Eagle3Head
from gguf_trim.prove import _first_drafts, prove
from llamabase.errors import FileFormatError
from llamabase.gguf.reader import GGUFFile
from llamabase.llama.context import Context, ContextParams
from llamabase.llama.library import floats
from llamabase.llama.model import MODEL_DEFAULTS, Model
from llamabase.llama.states import _experimental
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .test_state_fed import rows
from .toy import write_head, write_model

KINDS = {"": "DFlash drafter", "markov": "DSpark drafter", "selector": "DFlash2 drafter"}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("dflash") / "target.gguf", seed=1, n_layer=4)


def write_dflash(path: Path, kind: str, **how: Any) -> Path:
    return write_head(path, architecture="dflash", kind=kind, **how)


@pytest.mark.parametrize("type_", [Quant.F32, Quant.Q8_0])
@pytest.mark.parametrize("has", ["its own", "some rows", "its own table", "nothing"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_dflash_drafter_is_its_source_bit_for_bit(
    target: Path, tmp_path: Path, kind: str, has: str, type_: Quant
) -> None:
    """Through stock llama.cpp: with a head and a d2t of its own, with its table as the head, with its target's head."""
    ids = np.random.default_rng(4).permutation(600)[:320] if has == "some rows" else None
    without = ("output.weight",) if has in ("its own table", "nothing") else ()
    how = {"head_type": type_, "ids": ids, "without": without, "own_embeddings": has != "nothing", "tokens": True}
    path, cut = write_dflash(tmp_path / "d.gguf", kind, **how), tmp_path / "cut.gguf"
    other = target if has == "nothing" else None
    for k in (16, 304):
        write(lay_out(path, rows(k), other), cut)
        found = prove(cut, path, other)
        assert found.ok, found.differences
        assert (found.max_logit_difference, found.kept, found.positions) == (0.0, k, 24)
        assert found.logit_range is not None and 0 < found.logit_range < np.inf


@pytest.mark.parametrize("anchor", [True, False])
def test_a_cut_dspark_block_goes_on_as_its_source_does_while_that_drafts_kept_tokens(
    tmp_path: Path, anchor: bool
) -> None:
    """llama.cpp draws the block's tokens inside its graph: from the first one that was not kept, the two may part."""
    path, cut = tmp_path / "d.gguf", tmp_path / "cut.gguf"
    write_dflash(path, "markov", own_embeddings=True, tokens=True, anchor=anchor)
    write(lay_out(path, rows(304)), cut)
    assert prove(cut, path).ok
    kept, blocks = Eagle3Head.of(GGUFFile(cut)).ids, []
    for file in (path, cut):
        with Model(file) as model, Context(model, 32, ContextParams(1), n_outputs=4) as context:
            made = []
            for token in range(40):
                context.truncate(0)
                made.append(context.decode([token] * 4, 4).copy())
            blocks.append(made)
    proven = _first_drafts(path, list(range(40)), None, MODEL_DEFAULTS)
    assert proven == pytest.approx(np.array([block[0 if anchor else 1] for block in blocks[0]]), abs=0.01)
    lengths = set()
    for whole, part in zip(*blocks, strict=True):
        first, last = 0 if anchor else 1, 1
        while first + last < 4 and whole[first + last - 1].argmax() in kept:
            last += 1
        assert np.array_equal(whole[first : first + last, kept], part[first : first + last, kept])
        assert np.isneginf(np.delete(part, kept, axis=1)).all()
        lengths.add(last)
    assert len(lengths) > 1


def test_a_cut_dflash2_chooses_among_kept_tokens(tmp_path: Path) -> None:
    """Its candidates, which llama.cpp returns in the place of the states, are the likeliest of the kept ones."""
    path, cut = tmp_path / "d.gguf", tmp_path / "cut.gguf"
    write_dflash(path, "selector", own_embeddings=True, tokens=True)
    write(lay_out(path, rows(64)), cut)
    kept, library = Eagle3Head.of(GGUFFile(cut)).ids, _experimental()
    with Model(path) as model, Context(model, 32, ContextParams(1), n_outputs=4) as context:
        whole = context.decode([7, 1, 1, 1], 4).copy()
    with Model(cut) as model, Context(model, 32, ContextParams(1), n_outputs=4) as context:
        library["llama_set_embeddings_nextn"](context.handle, True, False)
        context.decode([7, 1, 1, 1], 4)
        lattice = floats(library["llama_get_embeddings_nextn"](context.handle), 4, model.n_embd)
        for place in (1, 2, 3):
            best = kept[np.argsort(-whole[place, kept])[:8]]
            assert sorted(lattice[place, :8].astype(int)) == sorted(best.tolist())


def test_a_markov_head_that_was_changed_is_seen(tmp_path: Path) -> None:
    path, cut = tmp_path / "d.gguf", tmp_path / "cut.gguf"
    write_dflash(path, "markov", own_embeddings=True, tokens=True)
    write(lay_out(path, rows(64)), cut)
    tensor, data = GGUFFile(cut).tensors["markov_w2.weight"], bytearray(cut.read_bytes())
    data[tensor.offset + 5 * tensor.row_bytes] ^= 1
    cut.write_bytes(data)
    assert "row 5 of markov_w2.weight is not row" in prove(cut, path).differences[0]


@pytest.mark.parametrize(("how", "said"), [
    ({"more": {"markov_w2.weight": np.ones((90, 32), np.float32)}}, "markov_w2.weight has not 600 rows"),
    ({"kind": "markov", "without": ("block_size",)}, "how many tokens it drafts at once"),
    ({"numbers": {"hyper_connection.count": 4}}, "is a drafter for DeepSeek-V4, of which llama.cpp reads no d2t"),
])  # fmt: skip
def test_a_dflash_drafter_that_cannot_be_cut_is_refused(target: Path, tmp_path: Path, how: Any, said: str) -> None:
    path = write_head(tmp_path / "d.gguf", architecture="dflash", tokens=True, **how)
    with pytest.raises(FileFormatError, match=said):
        lay_out(path, rows(64), target)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dflash_head_is_cut_and_not_run(target: Path, tmp_path: Path, kind: str) -> None:
    path, cut = write_dflash(tmp_path / "d.gguf", kind, tokens=True), tmp_path / "cut.gguf"
    assert describe(path)["kind"] == KINDS[kind]
    write(lay_out(path, rows(64)), cut)
    assert prove(cut, path, target).ok
    with pytest.raises(FileFormatError, match="takes token embeddings from its target"):
        prove(cut, path)
    with pytest.raises(FileFormatError, match="is a DFlash drafter"):
        Engine(LoadOptions(target, cut))
    with pytest.raises(FileFormatError, match="is a DFlash drafter, which is cut but not run"):
        TeacherForced.of(cut, [TargetAnswer("a", "", [5, 6], [7, 8])], target=target)


def test_a_step_reads_single_rows_of_the_tables_of_tokens(tmp_path: Path) -> None:
    """And so their bytes are none of a draft's."""
    path = write_dflash(tmp_path / "d.gguf", "markov", own_embeddings=True)
    tensors = GGUFFile(path).tensors
    looked_up = tensors["token_embd.weight"].n_bytes + tensors["markov_w1.weight"].n_bytes
    assert step_bytes(GGUFFile(path)) == sum(tensor.n_bytes for tensor in tensors.values()) - looked_up
