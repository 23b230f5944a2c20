"""What the types of a target cost, by a part that stands for it."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from gguf_trim.pairs import target_types
from gguf_trim.pairs.shapes import Shape, outline, with_random_weights, write_shape
from gguf_trim.pairs.target_types import TYPES, TypeCosts, part_of, type_costs
from llamabase import store
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.writer import Output, field
from llamabase.llama.context import Context
from llamabase.llama.model import Model

SHAPE = Shape("whole", "llama", 2048, 256, 16, 8, 2, 64, 512, False)


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(store, "memory_file", lambda: tmp_path / "remembered.sqlite")
    write_shape(SHAPE, tmp_path / "whole.gguf", "Q4_K_M")
    return tmp_path / "whole.gguf"


def test_a_part_has_the_first_layers_and_the_same_share_of_the_head(whole: Path, tmp_path: Path) -> None:
    fields, shapes = part_of(GGUFFile(whole), 4, 4 / 16)
    tables = {name: shape for name, shape in shapes.items() if not name.startswith("blk.") and len(shape) > 1}
    assert tables == {"token_embd.weight": (256, 512), "output.weight": (256, 512)}
    assert {int(name.split(".")[1]) for name in shapes if name.startswith("blk.")} == {0, 1, 2, 3}
    with_random_weights(fields, shapes, tmp_path / "part.gguf", "Q4_K_M", "")
    part = GGUFFile(tmp_path / "part.gguf")
    of_whole = {name: shape for name, shape in SHAPE.tensors.items() if name in shapes and name not in tables}
    assert {name: tensor.shape for name, tensor in part.tensors.items() if name not in tables} == of_whole
    with Model(part.path) as model, Context(model, 64) as context:
        assert np.isfinite(context.decode([0, 255, 7], 3)).all()


def test_a_part_has_the_mix_of_the_whole(tmp_path: Path) -> None:
    """Bytes of a layer in Q4_K_M, on average: of two, four and eight as of 28 layers half have more bits."""
    shape = Shape("real", "llama", 1024, 512, 28, 12, 2, 64, 1536, True)
    layers = sum(p.n_bytes for p in outline(shape, "Q4_K_M").pieces if p.tensor.name.startswith("blk.")) / 28
    source = tmp_path / "head.gguf"  # the metadata and the table of tensors, without their bytes
    output = outline(shape, "F16")
    source.write_bytes(output.header)
    with open(source, "r+b") as file:
        file.truncate(output.n_bytes)
    for n in (2, 4, 8):
        fields, shapes = part_of(GGUFFile(source), n, n / 28)
        with_random_weights(fields, shapes, tmp_path / f"{n}.gguf", "Q4_K_M", "")
        tensors = GGUFFile(tmp_path / f"{n}.gguf").tensors.values()
        mean = sum(tensor.n_bytes for tensor in tensors if tensor.name.startswith("blk.")) / n
        assert mean == pytest.approx(layers, rel=0.02)


def test_numbers_by_layer_and_prediction_blocks_are_cut_too(whole: Path, tmp_path: Path) -> None:
    file = GGUFFile(whole)
    more = [field("llama.attention.head_count_kv", np.full(17, 2)), field("llama.nextn_predict_layers", 1)]
    own = [file.raw(key) for key in file.fields if key not in ("llama.block_count", "llama.attention.head_count_kv")]
    path = tmp_path / "blocks.gguf"
    path.write_bytes(Output([*own, *more, field("llama.block_count", 17)], [], file.alignment).header)
    bare = GGUFFile(path)
    bare.tensors = file.tensors
    fields, _ = part_of(bare, 2, 0.5)
    path.write_bytes(Output(fields, [], file.alignment).header)
    part = GGUFFile(path)
    assert part.get("llama.attention.head_count_kv").tolist() == [2, 2]
    assert (part.get("llama.block_count"), part.get("llama.nextn_predict_layers")) == (2, None)


def test_they_are_measured_once(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_types, "PART", 2_000_000)  # of 12 million
    costs = type_costs(whole)
    assert costs is not None and costs.seconds.keys() == set(TYPES)
    assert (costs.n_layers, costs.n_whole) == (4, 16)
    assert all(set(taken) == {1, 4} and min(taken.values()) > 0 for taken in costs.seconds.values())
    monkeypatch.setattr(target_types, "_measured", lambda *_: pytest.fail("it is remembered"))
    assert type_costs(whole) == costs
    with closing(sqlite3.connect(tmp_path / "remembered.sqlite")) as memory, memory:
        memory.execute("UPDATE types SET facts = ?", [json.dumps({"seconds": {"Q4_0": 3}})])
    monkeypatch.setattr(target_types, "_measured", lambda *_: costs.seconds)
    assert type_costs(whole) == costs


def test_a_target_of_which_no_part_can_be_run_is_left_out(whole: Path, tmp_path: Path, capfd) -> None:
    file = GGUFFile(whole)
    fields = [file.raw(key) for key in file.fields if key != "general.architecture"]
    fields += [file.raw(key).replace(b"llama.", b"other.") for key in file.fields if key.startswith("llama.")]
    other = tmp_path / "other.gguf"
    output = Output([field("general.architecture", "other"), *fields], [], file.alignment)
    other.write_bytes(output.header)
    opened = GGUFFile(other)
    assert opened.architecture == "other"
    whole.replace(tmp_path / "kept.gguf")
    body = Output(output.fields, outline(SHAPE, "Q4_K_M").pieces, file.alignment)
    with open(other, "wb") as out:
        out.write(body.header)
        out.truncate(body.n_bytes)
    assert type_costs(other) is None
    assert "what the target's types cost is not known: " in capfd.readouterr().err


def test_what_it_says() -> None:
    seconds = {kind: {1: 0.1 * scale, 4: 0.2 * scale} for kind, scale in zip(TYPES, (1, 0.9, 0.8, 1.3), strict=True)}
    assert str(TypeCosts(seconds, 4, 28)) == (
        "The target's type decides, too. One token and four take here, in units of Q4_K_M's one: Q4_K_M 1.00 and 2.00, "
        "Q4_0 0.90 and 1.80, IQ4_NL 0.80 and 1.60, Q8_0 1.30 and 2.60; IQ4_NL is quickest for four (measured on 4 of "
        "its 28 layers and as much of its head, random weights)."
    )
    assert "on all its 4 layers" in str(TypeCosts(seconds, 4, 4))
