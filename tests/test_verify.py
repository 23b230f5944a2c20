"""verify: says ok of a right cut, and names whatever is wrong with any other."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGMLQuantizationType as Quant

from gguf_trim import prove as proofs
from gguf_trim.__main__ import main
from gguf_trim.cut import lay_out, write
from gguf_trim.format.companion import Trimmed, companion_path
from llamabase.gguf.reader import GGUFFile
from llamabase.llama.ggml import gpus
from llamabase.llama.model import CPU_ONLY, ModelParams

from .conftest import keep_first
from .toy import write_model


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A drafter (untied; tied and scaled) and its cut to 400 rows."""
    folder = tmp_path_factory.mktemp("verify")
    source = write_model(folder / "m.gguf", request.param, Quant.Q8_0)
    write(lay_out(source, keep_first(400)), folder / "t.gguf")
    return source, folder / "t.gguf"


@pytest.fixture
def copy(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the cut that a test may spoil."""
    for path in (pair[1], companion_path(pair[1])):
        shutil.copy(path, tmp_path)
    return tmp_path / pair[1].name


def run(trimmed: Path, source: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["verify", str(trimmed), "--source", str(source), *more])


def flip(path: Path, offset: int) -> None:
    """Change one bit of one byte."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def put(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def fails(trimmed: Path, source: Path) -> str:
    """Check that the command fails in one sentence, also with --json, and return that sentence."""
    result = run(trimmed, source)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    (sentence,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    as_json = run(trimmed, source, "--json")
    assert as_json.exit_code == 1
    if as_json.stdout:
        said = json.loads(as_json.stdout)
        assert said["ok"] is False and sentence == f"Error: {said['differences'][0]}"
    return sentence


def test_a_right_cut_is_proven(pair: tuple[Path, Path]) -> None:
    result = run(pair[1], pair[0])
    assert result.exit_code == 0 and result.stdout.startswith("ok: 405 rows equal as bytes"), result.output
    said = json.loads(run(pair[1], pair[0], "--json").stdout)
    assert said["ok"] is True and said["kept"] == 405 and said["differences"] == []
    assert said["max_logit_difference"] <= 1e-5 * said["logit_range"] and said["positions"] > 100


@pytest.mark.parametrize("row", [0, 200, 404])
@pytest.mark.parametrize("column", [0, 100, -1])
def test_one_byte_of_a_kept_row(pair: tuple[Path, Path], copy: Path, row: int, column: int) -> None:
    tensors = GGUFFile(copy).tensors
    name = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    tensor = tensors[name]
    flip(copy, tensor.offset + row * tensor.row_bytes + column % tensor.row_bytes)
    d2t = GGUFFile(copy).get("gguf_trim.d2t")
    assert f"row {row} of {name} is not row {d2t[row]} of the source" in fails(copy, pair[0])


def test_one_byte_of_each_tensor(pair: tuple[Path, Path], copy: Path) -> None:
    """Of the trimmed file and of the companion, one after the other."""
    for path in (copy, companion_path(copy)):
        for tensor in GGUFFile(path).tensors.values():
            flip(path, tensor.offset + tensor.n_bytes // 2)
            assert f"of {tensor.name} is not row" in fails(copy, pair[0])
            flip(path, tensor.offset + tensor.n_bytes // 2)
    assert run(copy, pair[0]).exit_code == 0


@pytest.mark.parametrize("i", [0, 200, 404])
def test_one_entry_of_the_remap_table(pair: tuple[Path, Path], copy: Path, i: int) -> None:
    """Still ascending and in range where there is room for it, so that only the rows can tell; else refused."""
    file = GGUFFile(copy)
    field, d2t = file.fields["gguf_trim.d2t"], file.get("gguf_trim.d2t")
    put(copy, field.value + 4 * i, struct.pack("<i", d2t[i] + 1))
    message = fails(copy, pair[0])
    assert "is not row" in message if i == 404 else "its remap table is not 405 ascending ids" in message


def test_the_scale_of_the_embeddings(pair: tuple[Path, Path], copy: Path) -> None:
    """Bytes cannot show it; the logits do."""
    file = GGUFFile(copy)
    scale = file.get("gguf_trim.embedding_scale")
    assert scale == (1 if file.architecture == "llama" else 16)
    put(copy, file.fields["gguf_trim.embedding_scale"].value, struct.pack("<f", 17 - scale))
    assert "the logit of token" in fails(copy, pair[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number(pair: tuple[Path, Path], copy: Path, value: float) -> None:
    put(copy, GGUFFile(copy).fields["gguf_trim.embedding_scale"].value, struct.pack("<f", value))
    assert "its embedding scale is not a number" in fails(copy, pair[0])


def test_logits_that_are_no_numbers_are_no_proof(tmp_path: Path) -> None:
    """NaN differs from nothing by nothing: a comparison written the wrong way round would call it proven."""
    source = write_model(tmp_path / "m.gguf")
    put(source, GGUFFile(source).tensors["output_norm.weight"].offset, struct.pack("<f", float("nan")))
    write(lay_out(source, keep_first(400)), tmp_path / "t.gguf")
    assert "the logit of token" in fails(tmp_path / "t.gguf", source)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """What llama.cpp computes on beside the CPU. Without a GPU, what belongs there is computed on the CPU again."""
    names = gpus() or ["a GPU"]
    monkeypatch.setattr(proofs, "gpus", lambda: names)
    return ", ".join(names)


def test_a_gpu_is_asked_of_a_cut_that_is_proven_on_the_cpu(pair: tuple[Path, Path], copy: Path, a_gpu: str) -> None:
    said = run(pair[1], pair[0])
    assert said.exit_code == 0 and f"\non {a_gpu}: greatest logit difference " in said.stdout, said.output
    gpu = json.loads(run(pair[1], pair[0], "--json").stdout)["gpu"]
    assert ", ".join(gpu["names"]) == a_gpu and gpu["max_logit_difference"] <= gpu["allowed"]
    put(copy, GGUFFile(copy).fields["gguf_trim.embedding_scale"].value, struct.pack("<f", 3))
    assert a_gpu not in fails(copy, pair[0])


@pytest.mark.parametrize(
    ("rounding", "fault", "ok"),
    [(0.5, 0.4, True), (0.5, 0.6, False), (0.5, np.nan, False), (np.nan, 0, False), (0, 0, True), (0, 0.4, False)],
)
def test_on_a_gpu_a_cut_may_part_as_far_as_its_source_does(
    pair: tuple[Path, Path], a_gpu: str, monkeypatch: pytest.MonkeyPatch, rounding: float, fault: float, ok: bool
) -> None:
    """There all logits are `rounding` off those of the CPU, and one of the cut's is `fault` further off."""
    honest = proofs._decoded

    def decoded(path: Path, prompt: Sequence[int] | np.ndarray, where: ModelParams) -> np.ndarray:
        logits = honest(path, prompt, CPU_ONLY)
        if where != CPU_ONLY:
            logits += rounding
            logits[7, 11] += fault if path == pair[1] else 0
        return logits

    monkeypatch.setattr(proofs, "_decoded", decoded)
    found = proofs.prove(pair[1], pair[0])
    assert found.ok is ok
    token = int(Trimmed.open(pair[1]).d2t[11])
    if not ok and rounding == rounding:
        assert f"at position 7 the logit of token {token} is" in found.differences[0]
    if not ok:
        assert found.differences[0].endswith(f"both computed on {a_gpu}")


def test_a_hyperparameter(pair: tuple[Path, Path], copy: Path) -> None:
    file = GGUFFile(copy)
    key = f"{file.architecture}.rope.freq_base"
    put(copy, file.fields[key].value, struct.pack("<f", 500.0))
    assert f"metadata {key} differs from the source's" in fails(copy, pair[0])


def test_a_token_of_the_companion(pair: tuple[Path, Path], copy: Path) -> None:
    companion = GGUFFile(companion_path(copy))
    flip(companion.path, companion.fields["tokenizer.ggml.tokens"].value + 8)
    assert "have different vocabularies" in fails(copy, pair[0]) and companion.path.name in fails(copy, pair[0])


def test_other_files(pair: tuple[Path, Path], copy: Path, tmp_path: Path) -> None:
    """Another drafter, the drafter itself, no companion, another drafter's companion, another format version."""
    source = pair[0]
    architecture = GGUFFile(source).architecture
    other = write_model(tmp_path / "o.gguf", architecture, Quant.Q8_0, seed=9)
    assert "is not row" in fails(copy, other)
    assert "m.gguf: is not a trimmed drafter" in fails(source, source)
    assert "it is already trimmed" in fails(copy, copy)
    bigger = write_model(tmp_path / "bigger.gguf", architecture, Quant.F32)
    assert "not 405 rows of F32" in fails(copy, bigger)
    write(lay_out(other, keep_first(400)), tmp_path / "other.gguf")
    companion_path(copy).unlink()
    assert "t.vocab.gguf: is missing" in fails(copy, source)
    shutil.copy(tmp_path / "other.vocab.gguf", companion_path(copy))
    assert "t.vocab.gguf: was cut from another drafter" in fails(copy, source)
    put(copy, GGUFFile(copy).fields["gguf_trim.version"].value, struct.pack("<I", 2))
    assert "was trimmed by another version of this program (format 2, known: 1)" in fails(copy, source)


@pytest.mark.parametrize("key", ["k", "vocab_size", "d2t", "embedding_scale", "version", "source_id"])
@pytest.mark.parametrize("change", ["type", "name"])
def test_a_damaged_or_missing_entry_of_ours(
    pair: tuple[Path, Path], copy: Path, key: str, change: str, tmp_path: Path
) -> None:
    """A key renamed away, or another type in its place: refused, never a crash."""
    field = GGUFFile(copy).fields[f"gguf_trim.{key}"]
    name_end = field.start + 8 + len(field.key)
    same_size: dict[str, Callable[[], bytes]] = {
        "k": lambda: struct.pack("<If", 6, 1.0),
        "vocab_size": lambda: struct.pack("<If", 6, 1.0),
        "version": lambda: struct.pack("<If", 6, 1.0),
        "embedding_scale": lambda: struct.pack("<II", 4, 1),
        "d2t": lambda: struct.pack("<II", 9, 6),
        "source_id": lambda: struct.pack("<IIQ", 9, 0, field.end - field.value - 8 + 4 - 8),
    }
    put(copy, name_end if change == "type" else name_end - 1, same_size[key]() if change == "type" else b"~")
    fails(copy, pair[0])
