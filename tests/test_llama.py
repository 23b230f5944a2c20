"""The seam: decode, rewind, close. What it refuses, and that it leaks nothing."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gguf_trim.format.companion import EmbeddingTable
from llamabase.errors import EngineError, TrimError
from llamabase.gguf.reader import GGUFFile
from llamabase.llama.context import Context, ContextParams, Part, read_parts
from llamabase.llama.ggml import dequantizer
from llamabase.llama.library import physical_cores
from llamabase.llama.model import Model
from llamabase.llama.quantize import quantize
from llamabase.llama.states import Recorded
from runner.bench.machine import resident
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .toy import ARCHITECTURES, HEAD_TYPES, write_model


def test_rewinding_gives_the_same_logits_again(toys) -> None:
    with Model(toys["target"]) as model, Context(model, 64) as context:
        ids = model.tokenize("the king and the sea")
        context.decode(ids[:-1], 0)
        first = context.decode(ids[-1:])[0].copy()
        context.decode([40, 41, 42], 3)
        context.truncate(len(ids) - 1)
        assert context.n_past == context.recount() == len(ids) - 1
        assert (context.decode(ids[-1:])[0] == first).all()


def test_long_prompts_go_in_batches_with_the_same_result(toys) -> None:
    """Rows asked for come from the end, however the prompt was cut into batches."""
    with Model(toys["target"]) as model:
        ids = (model.tokenize("the king and the sea ") * 20)[:100]
        large, small = (ContextParams(n_batch=n) for n in (128, 16))
        with Context(model, 128, large) as whole, Context(model, 128, small) as pieces:
            for outputs in (1, 5, 16):
                whole.truncate(0), pieces.truncate(0)
                a, b = whole.decode(ids, outputs), pieces.decode(ids, outputs)
                assert a.shape == b.shape == (outputs, model.n_vocab)
                assert np.allclose(a, b, atol=0.05)  # the cache is F16
            assert pieces.decode([5], 0).shape == (0, model.n_vocab)


@pytest.mark.parametrize("unified", [True, False])
def test_sequences_that_share_batches_have_the_logits_and_states_of_their_own(tmp_path, unified: bool) -> None:
    texts = ([10, 20, 30, 40], [50, 60, 70, 80])
    path = write_model(tmp_path / "m.gguf", n_layer=2)
    with Model(path) as model, Context(model, 512, n_parallel=2, unified=unified) as first:
        both = [first, first.beside(1)]
        records = [Recorded(each, "llama", [1]) for each in both]
        read_parts([Part(each, [1], 0, False) for each in both])
        for each in both:
            each.rewind(0)
        for i in range(4):
            logits = [
                rows[0]
                for rows in read_parts(
                    [Part(each, [text[i]], 1, False) for each, text in zip(both, texts, strict=True)]
                )
            ]
            assert [record.n for record in records] == [i + 1, i + 1]
        for i, text in enumerate(texts):
            with Context(model, 64) as alone:
                own = Recorded.of(alone, "llama", [1])
                assert np.allclose(alone.decode(text)[0], logits[i], atol=0.05)  # the cache is F16
                assert np.allclose(own.rows[:4], records[i].rows[:4], atol=0.05)
                assert Recorded.of(alone, "llama", [1]) is own
            assert not np.allclose(logits[0], logits[1], atol=0.5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("type_", HEAD_TYPES, ids=lambda t: t.name)
def test_embeddings_are_the_ids_bit_for_bit(tmp_path, architecture, type_) -> None:
    """Feeding the looked-up row gives the very logits that feeding the id gives (gemma3: with its scale)."""
    path = write_model(tmp_path / "m.gguf", architecture, type_)
    scale = float(np.float32(np.sqrt(256))) if architecture == "gemma3" else 1.0
    table = EmbeddingTable(GGUFFile(path), scale)
    with Model(path) as model, Context(model, 32) as context:
        ids = model.tokenize("the sea and 1 tea")
        by_id = context.decode(ids, len(ids)).copy()
        context.truncate(0)
        assert (context.decode(table.rows(ids), len(ids)) == by_id).all()
        if scale != 1:
            context.truncate(0)
            assert np.abs(context.decode(table.rows(ids) / scale, len(ids)) - by_id).max() > 1


def test_dequantizer_agrees_with_the_gguf_package(tmp_path) -> None:
    from gguf import quants

    for type_ in HEAD_TYPES:
        file = GGUFFile(write_model(tmp_path / f"{type_.name}.gguf", "llama-tied", type_))
        tensor = file.tensors["token_embd.weight"]
        data = np.frombuffer(file.read(tensor), np.uint8).reshape(tensor.n_rows, -1)
        out = np.empty((tensor.n_rows, tensor.shape[0]), np.float32)
        dequantizer(type_)(data, out)
        assert np.allclose(out, quants.dequantize(data, type_).reshape(out.shape), rtol=1e-5, atol=1e-6)


def test_what_it_refuses(toys, tmp_path) -> None:
    with pytest.raises(EngineError, match="no such file"):
        Model(tmp_path / "absent.gguf")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(toys["target"].read_bytes()[:-5000])
    with pytest.raises(EngineError, match=r"damaged\.gguf: llama\.cpp cannot load it: .+"):
        Model(damaged)
    with Model(toys["target"]) as model, Context(model, 256, n_outputs=4) as context:
        with pytest.raises(EngineError, match="context of 256 tokens is full"):
            context.decode([1] * 257)
        with pytest.raises(EngineError, match="rows of logits"):
            context.decode([1] * 8, 5)
        with pytest.raises(EngineError, match="could not decode"):
            context.decode([10**6])
        assert context.recount() == 0
        assert context.decode([1, 2, 3]).shape == (1, 600)
    with pytest.raises(EngineError, match="closed"):
        context.decode([1])
    with pytest.raises(EngineError, match="closed"):
        Context(model, 64)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_fifty_cycles_leak_nothing(toys) -> None:
    """Neither memory nor file handles grow over 50 openings of a target with a trimmed drafter."""

    def cycle() -> None:
        with Engine(LoadOptions(toys["target"], toys["good-trimmed"], n_ctx=64)) as engine:
            engine.context.decode([1, 2, 3])

    for _ in range(5):
        cycle()
    gc.collect()
    memory, handles = resident(), len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        cycle()
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == handles
    assert resident() - memory < 8 << 20


def test_threads_default_to_physical_cores() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


def test_pieces_and_tokens(toys) -> None:
    with Model(toys["target"], vocab_only=True) as model:
        text = "the tea — ünï <|im_end|>"
        ids = model.tokenize(text)
        assert b"".join(model.piece(i, special=True) for i in ids).decode() == text
        assert model.piece(ids[-1]) == b""
        assert model.is_end(ids[-1])
        assert not model.is_end(ids[0])
        assert b"<|im_end|>" not in [model.piece(i, special=True) for i in model.tokenize(text, special=False)]


def test_a_disk_without_room_is_refused_before_it_is_requantised(toys, tmp_path, monkeypatch) -> None:
    """The size reckoned for the check is nearly what llama.cpp writes, so that what fits is not refused."""
    out = tmp_path / "q.gguf"
    quantize(toys["target"], out, "Q8_0")
    size = out.stat().st_size
    for free, fits in ((size, True), (0.9 * size, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        out.unlink(missing_ok=True)
        if fits:
            quantize(toys["target"], out, "Q8_0")
        else:
            with pytest.raises(TrimError, match=r"q\.gguf: needs \d+ MB and the disk has \d+ MB free"):
                quantize(toys["target"], out, "Q8_0")
        assert [path.name for path in tmp_path.iterdir()] == ["q.gguf"] * fits
