"""inspect: what a file is, as JSON and for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Quant
from gguf import GGUFValueType as Kind

from gguf_trim.__main__ import main
from gguf_trim.cut import lay_out, write
from gguf_trim.format.companion import companion_path
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary

from .conftest import keep_first
from .encode import Table, field, gguf
from .toy import N_EMBD, write_model

ROW = N_EMBD // 32 * 34  # bytes of a row in Q8_0


def facts(path: Path) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    assert result.exit_code == 0 and result.stderr == "", result.output
    said: dict[str, Any] = json.loads(result.stdout)
    return said


def people(path: Path) -> dict[str, str]:
    result = CliRunner().invoke(main, ["inspect", str(path)])
    assert result.exit_code == 0, result.output
    return {line[:22].strip(): line[23:] for line in result.stdout.splitlines()}


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_a_model(tmp_path: Path, architecture: str) -> None:
    path = write_model(tmp_path / "m.gguf", architecture, Quant.Q8_0)
    file, tied = GGUFFile(path), architecture == "llama-tied"
    step = sum(t.n_bytes for t in file.tensors.values()) - (0 if tied else 600 * ROW)
    said = facts(path)
    assert said == {
        "file": str(path),
        "architecture": "llama",
        "name": f"toy {architecture}",
        "bytes": path.stat().st_size,
        "tensors": len(file.tensors),
        "tied": tied,
        "head": {
            "tensor": "token_embd.weight" if tied else "output.weight",
            "rows": 600,
            "n_embd": N_EMBD,
            "type": "Q8_0",
        },
        "embedding": {"rows": 600, "n_embd": N_EMBD, "type": "Q8_0"},
        "head_bias": False,
        "bytes_per_draft_step": step,
        "head_bytes": 600 * ROW,
        "head_share": 600 * ROW / step,
        "kind": "model",
        "trimmable": True,
        "why": None,
        "vocabulary": 600,
        "fingerprint": Vocabulary(file).fingerprint,
        "forced": 261,
    }
    text = people(path)
    assert text["head"] == f"tensor {said['head']['tensor']}, rows 600, n_embd {N_EMBD}, type Q8_0"
    assert text["head share"] == f"{600 * ROW / step:.4f}" and text["trimmable"] == "True"
    assert "why" not in text


def test_a_trimmed_drafter_and_its_companion(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "m.gguf", head_type=Quant.Q8_0), tmp_path / "t.gguf"
    fingerprint = Vocabulary(GGUFFile(source)).fingerprint
    write(lay_out(source, keep_first(400)), out)
    said, full = facts(out), facts(source)
    assert (said["kind"], said["k"], said["vocabulary"], said["forced"]) == ("trimmed", 405, 600, 261)
    assert (said["head"]["rows"], said["head_bytes"]) == (405, 405 * ROW)
    assert said["bytes_per_draft_step"] == full["bytes_per_draft_step"] - 195 * ROW
    assert (said["source"], said["fingerprint"]) == ("m.gguf", fingerprint)
    assert (said["companion"], said["coverage"]) == (str(companion_path(out)), None)
    assert said["trimmable"] is False and "already trimmed" in said["why"]
    assert people(out)["k"] == "405"
    said = facts(companion_path(out))
    assert (said["kind"], said["vocabulary"], said["tensors"]) == ("companion", 600, 2)
    assert (said["source"], said["fingerprint"]) == ("m.gguf", fingerprint)
    assert said["trimmable"] is False and "companion of a trimmed drafter" in said["why"]
    assert people(companion_path(out))["kind"] == "companion"


def test_a_share_of_what_was_counted_is_told(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "m.gguf"), tmp_path / "t.gguf"
    assert CliRunner().invoke(main, ["trim", str(source), "-o", str(out), "-k", "320"]).exit_code == 0
    assert 0 < facts(out)["coverage"] < 1
    assert people(out)["coverage"] == f"{facts(out)['coverage']:.4f}"


def test_a_model_without_a_head_says_why_it_cannot_be_trimmed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf([field("general.architecture", Kind.STRING, "bert")], [Table("x", (32,))]))
    said = facts(path)
    assert said["trimmable"] is False and "has no token_embd.weight" in said["why"] and "head" not in said
    assert "has no token_embd.weight" in people(path)["why"]


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bare.gguf").write_bytes(gguf())
    source, out = write_model(tmp_path / "m.gguf"), tmp_path / "t.gguf"
    write(lay_out(source, keep_first(320)), out)
    companion_path(out).unlink()
    for path in (tmp_path / "missing.gguf", tmp_path, tmp_path / "bare.gguf", out):
        for more in ([], ["--json"]):
            result = CliRunner().invoke(main, ["inspect", str(path), *more])
            assert result.exit_code == 1 and result.stdout == ""
            assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
