"""Hybrid and recurrent models (Qwen3.5, LFM2, Falcon-H1, Mamba and others): cut bit for bit, drafters that go back to
what stood, and targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant

from gguf_trim.cut import lay_out, write
from gguf_trim.prove import prove
from llamabase.llama.context import F32, Context
from llamabase.llama.model import Model

from .conftest import keep_spread
from .hybrid_toys import TOYS, write_hybrid

QUICK = ("qwen35", "lfm2", "falcon-h1", "mamba2")
KINDS = [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in TOYS]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each architecture."""
    folder = tmp_path_factory.mktemp("hybrids")
    return {kind: write_hybrid(folder / f"{kind}.gguf", kind, seed=1) for kind in TOYS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_toy_remembers_what_it_read_and_stays_in_range(files: dict[str, Path], kind: str) -> None:
    """Logits hang on the token before the last one, and are as large after 400 tokens as after 10."""
    text = np.random.default_rng(0).integers(0, 600, 400).tolist()
    with Model(files[kind]) as model, Context(model, 512, 1, n_outputs=400, cache=F32) as context:
        assert model.recurrent
        logits = context.decode(text, 400).copy()
        context.truncate(0)
        changed = context.decode([*text[:-2], (text[-2] + 17) % 600, text[-1]])
    spread = np.ptp(logits, axis=1)
    assert (0.5 * spread[10] < spread[10:]).all() and (spread[10:] < 2 * spread[10]).all()
    assert np.abs(changed[0] - logits[-1]).max() > 0.1 * spread[-1]
    assert len(set(logits.argmax(1))) > 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_is_its_source_bit_for_bit(tmp_path: Path, kind: str) -> None:
    for type_ in (Quant.F32, Quant.Q8_0, Quant.Q4_0):
        source = write_hybrid(tmp_path / "m.gguf", kind, type_)
        for k in (288, 352):
            write(lay_out(source, keep_spread(k)), tmp_path / "t.gguf")
            found = prove(tmp_path / "t.gguf", source)
            assert found.ok and found.max_logit_difference == 0 and found.kept == k, found.differences
            assert found.positions > 100 and found.logit_range is not None and found.logit_range > 1
