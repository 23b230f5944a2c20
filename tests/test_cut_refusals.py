"""What cannot be cut is refused: one sentence that says why, exit code 1, nothing written, the source untouched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from gguf import GGUFValueType as Kind

from gguf_trim.__main__ import main
from gguf_trim.cut import lay_out, write
from gguf_trim.format.companion import companion_path
from llamabase.errors import TrimError
from llamabase.files import sha256_of

from .conftest import keep_first
from .encode import Table, field, gguf
from .toy import write_model

EMBEDDING = Table("token_embd.weight", (32, 4))


def small_file(path: Path, *tables: Table, architecture: str = "llama", **numbers: int) -> Path:
    """Four tokens and whatever tables; `numbers` are keys with _ for a dot."""
    fields = [
        field("general.architecture", Kind.STRING, architecture),
        field("tokenizer.ggml.tokens", Kind.ARRAY, ["aa", "bb", "cc", "dd"], Kind.STRING),
        *(field(key.replace("_", "."), Kind.UINT16, value) for key, value in numbers.items()),
    ]
    path.write_bytes(gguf(fields, tables))
    return path


def refused(source: Path, out: Path, *more: str) -> str:
    """Run the command; check the laws of a refusal; the one sentence."""
    before = {path: sha256_of(path) for path in source.parent.rglob("*") if path.is_file()}
    keep = source.parent.parent / "keep.txt"
    keep.write_text("0\n1\n")
    result = CliRunner().invoke(main, ["trim", str(source), "-o", str(out), "--keep", str(keep), *more])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    sentences = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(sentences) == 1 and result.stderr.rstrip().endswith(sentences[0]), result.stderr
    assert {path: sha256_of(path) for path in source.parent.rglob("*") if path.is_file()} == before
    return sentences[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


WRONG_SOURCES = {
    "split": ((EMBEDDING,), {"split_count": 2}, "it is one part of a split GGUF"),
    "no embedding": ((Table("output.weight", (32, 4)),), {}, "it has no token_embd.weight: not a language model"),
    "gemma3n": ((EMBEDDING,), {"architecture": "gemma3n"}, "gemma3n cannot be trimmed: it looks up per-layer"),
    "cogvlm": ((EMBEDDING,), {"architecture": "cogvlm"}, "cogvlm cannot be trimmed: it reads embeddings with the"),
    "deepseek4": ((EMBEDDING,), {"architecture": "deepseek4"}, "it chooses experts by token id"),
    "gemma4-assistant": ((EMBEDDING,), {"architecture": "gemma4-assistant"}, "a usable Gemma 4 assistant"),
    "graniteswitch": ((EMBEDDING,), {"architecture": "graniteswitch"}, "it chooses adapters by token id"),
    "per-layer embeddings": (
        (EMBEDDING, Table("per_layer_token_embd.weight", (32, 4))),
        {},
        "tensor per_layer_token_embd.weight has one row per token",
    ),
    "a scale per row": (
        (EMBEDDING, Table("output.weight", (32, 4)), Table("output.scale", (4,))),
        {},
        "tensor output.scale has one row per token",
    ),
    "unequal head": ((EMBEDDING, Table("output.weight", (32, 3))), {}, "its head has 3 rows and its embedding 4"),
    "encoder": ((EMBEDDING,), {"architecture": "t5encoder"}, "it is an encoder"),
    "eagle3": ((EMBEDDING,), {"architecture": "eagle3"}, "EAGLE-3"),
}


@pytest.mark.parametrize("name", WRONG_SOURCES)
def test_a_source_that_cannot_be_cut(folder: Path, name: str) -> None:
    tables, more, reason = WRONG_SOURCES[name]
    source = small_file(folder / "m.gguf", *tables, **more)  # type: ignore[arg-type]
    message = refused(source, folder / "t.gguf")
    assert reason in message and str(source) in message


def test_one_part_of_one_is_no_split(folder: Path) -> None:
    source = small_file(folder / "m.gguf", EMBEDDING, split_count=1)
    assert lay_out(source, keep_first(2)).keep.k == 2


def test_no_tokenizer(folder: Path) -> None:
    source = folder / "m.gguf"
    source.write_bytes(gguf([field("general.architecture", Kind.STRING, "llama")], [EMBEDDING]))
    assert "holds no tokenizer" in refused(source, folder / "t.gguf")


def test_no_gguf_and_no_file(folder: Path) -> None:
    (folder / "m.gguf").write_text("something else, and longer than a header")
    assert "does not begin with the letters GGUF" in refused(folder / "m.gguf", folder / "t.gguf")
    assert "cannot be read" in refused(folder / "missing.gguf", folder / "t.gguf")
    assert "not a regular file" in refused(folder, folder / "t.gguf")


def test_a_trimmed_file_and_a_companion(folder: Path) -> None:
    write(lay_out(write_model(folder / "m.gguf"), keep_first(320)), folder / "t.gguf")
    assert "it is already trimmed; trim the original" in refused(folder / "t.gguf", folder / "u.gguf")
    assert "it is the companion of a trimmed drafter" in refused(folder / "t.vocab.gguf", folder / "u.gguf")


def test_output_over_the_source(folder: Path) -> None:
    """By its own name, by another spelling, by a symlink, by a hard link, and by the companion's name."""
    source = write_model(folder / "m.vocab.gguf")
    (folder / "link.gguf").symlink_to(source)
    os.link(source, folder / "hard.gguf")
    (folder / "linked").symlink_to(folder)
    for out in ("link.gguf", "hard.gguf", "linked/link.gguf", "../files/link.gguf", "m.gguf"):
        assert "is the drafter itself" in refused(source, folder / out), out
    plain = write_model(folder / "plain.gguf")
    assert "is the drafter itself" in refused(plain, plain)
    assert "is the drafter itself" in refused(folder / "link.gguf", folder / "m.gguf")


@pytest.mark.parametrize("name", ["t", "t.bin", "t.gguf.bak", "t.vocab.gguf", ".GGUF"])
def test_output_names_that_have_no_companion(folder: Path, name: str) -> None:
    assert "must end in .gguf" in refused(write_model(folder / "m.gguf"), folder / name)


def test_outputs_that_cannot_be_written(folder: Path) -> None:
    source = write_model(folder / "m.gguf")
    (folder / "taken.gguf").mkdir()
    assert "taken.gguf: is a folder" in refused(source, folder / "taken.gguf")
    (folder / "half.vocab.gguf").mkdir()
    assert "half.vocab.gguf: is a folder" in refused(source, folder / "half.gguf")
    (folder / "file").write_text("x")
    assert "cannot be written" in refused(source, folder / "file" / "t.gguf")


def test_choices_of_rows_that_cannot_be(folder: Path) -> None:
    source = write_model(folder / "m.gguf")
    for k in ("0", "-5", "601"):
        assert "k must be between 1 and its 600 rows" in refused(source, folder / "t.gguf", "-k", k)


@pytest.mark.parametrize("more", [["--dry-run"], ["--if-needed"]])
def test_refusals_do_not_depend_on_the_mode(folder: Path, more: list[str]) -> None:
    source = small_file(folder / "m.gguf", EMBEDDING, split_count=2)
    assert "split GGUF" in refused(source, folder / "t.gguf", *more)


def test_a_source_that_changes_under_the_cut(folder: Path) -> None:
    """Truncated or removed between plan and write: an error, and nothing is left."""
    source = write_model(folder / "m.gguf")
    cut = lay_out(source, keep_first(320))
    os.truncate(source, source.stat().st_size // 2)
    with pytest.raises(TrimError, match="ended early; the file changed"):
        write(cut, folder / "t.gguf")
    source.unlink()
    with pytest.raises(TrimError, match="was deleted after it was read"):
        write(cut, folder / "t.gguf")
    assert not list(folder.iterdir())


def test_the_module_exits_with_one_and_a_sentence(folder: Path) -> None:
    """Once through a real process: python -m gguf_trim."""
    done = subprocess.run(
        [sys.executable, "-m", "gguf_trim", "trim", str(folder / "none.gguf"), "-o", str(folder / "t.gguf")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: {folder / 'none.gguf'}: cannot be read: No such file or directory\n"
    assert companion_path(folder / "t.gguf") == folder / "t.vocab.gguf"
    assert not list(folder.iterdir())
