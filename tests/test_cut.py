"""The cut: kept rows are the source's bytes, everything else is untouched, and llama.cpp gives the same logits."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGMLQuantizationType as Quant

from corpus.counts import Counts
from gguf_trim.__main__ import main
from gguf_trim.cut import lay_out, write
from gguf_trim.format.companion import Trimmed, companion_path
from gguf_trim.format.memory_bound import step_bytes
from gguf_trim.keep import MULTIPLE, keep_listed
from gguf_trim.prove import prove
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary

from .conftest import keep_first
from .toy import ARCHITECTURES, HEAD_TYPES, N_EMBD, write_model

OUR_KEYS = {
    f"gguf_trim.{name}"
    for name in ("version", "source", "source_id", "vocab_size", "vocab_fingerprint", "embedding_scale")
}


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def keep_exactly(k: int):
    """A choice of rows: every forced token, then every third id, k in all."""
    return lambda vocabulary, has_row, _: keep_listed(
        vocabulary, has_row, [*range(0, len(has_row), 3), *range(len(has_row))], k
    )


def rows_of(file: GGUFFile, name: str, ids: Sequence[int] | None = None) -> bytes:
    """A tensor's bytes, or those of some rows; the one number of a bias is a row too."""
    tensor = file.tensors[name]
    table = np.frombuffer(file.read(tensor), np.uint8).reshape(tensor.shape[-1], -1)
    return (table if ids is None else table[np.array(ids)]).tobytes()


def check_structure(source: Path, trimmed: Path, ids: list[int], head_names: set[str]) -> None:
    """The law of a cut, read with GGUFFile alone and compared byte by byte."""
    before, after, beside = GGUFFile(source), GGUFFile(trimmed), GGUFFile(companion_path(trimmed))
    assert list(after.tensors) == list(before.tensors)
    for name in before.tensors:
        assert after.tensors[name].type == before.tensors[name].type
        assert rows_of(after, name) == rows_of(before, name, ids if name in head_names else None), name
        if name in head_names:
            assert after.tensors[name].shape[-1] == len(ids)
            assert beside.tensors[name].shape == before.tensors[name].shape
            assert beside.read(beside.tensors[name]) == before.read(before.tensors[name])
        else:
            assert after.tensors[name].shape == before.tensors[name].shape
    assert set(beside.tensors) == head_names
    size_key = f"{before.architecture}.vocab_size"
    untouched = {key for key in before.fields if not key.startswith("tokenizer.") and key != size_key}
    assert {key: after.raw(key) for key in untouched} == {key: before.raw(key) for key in untouched}
    added = {size_key, "tokenizer.ggml.model", "gguf_trim.k", "gguf_trim.forced", "gguf_trim.d2t"} | OUR_KEYS
    assert set(after.fields) - {"gguf_trim.coverage"} == untouched | added
    assert (after.get(size_key), after.get("tokenizer.ggml.model")) == (len(ids), "none")
    assert after.get("gguf_trim.d2t").tolist() == ids
    words = {key for key in before.fields if key.startswith(("tokenizer.", "general."))}
    assert {key: beside.raw(key) for key in words} == {key: before.raw(key) for key in words}
    assert set(beside.fields) == words | OUR_KEYS | {"gguf_trim.companion"}
    assert all(after.raw(key) == beside.raw(key) for key in OUR_KEYS)


@pytest.mark.parametrize("head_type", HEAD_TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cut_is_exact(tmp_path: Path, architecture: str, head_type: Quant) -> None:
    """Byte for byte and, at a k of whole repacking groups, logit for logit."""
    source, out = write_model(tmp_path / "m.gguf", architecture, head_type), tmp_path / "out" / "t.gguf"
    cut = lay_out(source, keep_exactly(352))
    write(cut, out)
    names = {"token_embd.weight"} if cut.tied else {"token_embd.weight", "output.weight"}
    assert cut.tied == (architecture in ("llama-tied", "gemma3"))
    ids = cut.keep.ids.tolist()
    assert len(ids) == 352
    check_structure(source, out, ids, names)
    assert out.stat().st_size == cut.trimmed.n_bytes and companion_path(out).stat().st_size == cut.companion.n_bytes
    result = prove(out, source)
    assert result.ok and result.max_logit_difference == 0, result.differences
    assert result.positions > 100 and result.logit_range is not None and result.logit_range > 1
    scale = GGUFFile(out).get("gguf_trim.embedding_scale")
    assert scale == (np.float32(N_EMBD**0.5) if architecture == "gemma3" else 1)


@pytest.mark.parametrize("k", [261, 288, 300, 333, 544, 599])
@pytest.mark.parametrize("head_type", HEAD_TYPES, ids=lambda kind: kind.name)
def test_any_k_gives_the_same_logits(tmp_path: Path, k: int, head_type: Quant) -> None:
    """llama.cpp multiplies whole groups of rows; a last group that is not whole may be summed in another order."""
    if k % MULTIPLE and head_type == Quant.F16 and platform.machine() in ("aarch64", "arm64"):
        pytest.skip("half-precision arithmetic sums the last group by another kernel, in fewer bits")
    source, out = write_model(tmp_path / "m.gguf", "llama", head_type), tmp_path / "t.gguf"
    write(lay_out(source, keep_exactly(k)), out)
    result = prove(out, source)
    assert result.ok and result.kept == k, result.differences
    assert result.max_logit_difference is not None and result.logit_range is not None
    assert result.max_logit_difference <= (1e-5 * result.logit_range if k % 32 else 0)


def test_keeping_every_row_changes_no_tensor_byte(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "m.gguf", "qwen2", Quant.Q8_0), tmp_path / "t.gguf"
    write(lay_out(source, keep_first(600)), out)
    before, after = GGUFFile(source), GGUFFile(out)
    assert {n: after.read(t) for n, t in after.tensors.items()} == {
        n: before.read(t) for n, t in before.tensors.items()
    }


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_reader_of_the_gguf_package_reads_both_outputs(tmp_path: Path, architecture: str) -> None:
    source, out = write_model(tmp_path / "m.gguf", architecture, Quant.Q6_K), tmp_path / "t.gguf"
    write(lay_out(source, keep_first(320)), out)
    for path in (out, companion_path(out)):
        ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
        assert {t.name: t.data.tobytes() for t in theirs.tensors} == {n: ours.read(t) for n, t in ours.tensors.items()}
        assert theirs.fields["gguf_trim.source"].contents() == "m.gguf"
        assert theirs.fields["gguf_trim.vocab_size"].contents() == 600
    assert theirs.fields["gguf_trim.companion"].contents() is True


def test_a_bias_of_the_head_is_cut_with_it(tmp_path: Path) -> None:
    """Of the toys, llama.cpp knows output.bias in qwen2 only."""
    source, out = write_model(tmp_path / "m.gguf", "qwen2", head_bias=True), tmp_path / "t.gguf"
    cut = lay_out(source, keep_exactly(352))
    write(cut, out)
    check_structure(source, out, cut.keep.ids.tolist(), {"token_embd.weight", "output.weight", "output.bias"})
    result = prove(out, source)
    assert result.ok and result.max_logit_difference == 0


@pytest.mark.parametrize("alignment", [64, 4096])
def test_another_alignment_is_kept(tmp_path: Path, alignment: int) -> None:
    source, out = write_model(tmp_path / "m.gguf", "llama", Quant.Q6_K, alignment=alignment), tmp_path / "t.gguf"
    write(lay_out(source, keep_exactly(352)), out)
    for path in (out, companion_path(out)):
        file = GGUFFile(path)
        assert file.alignment == alignment
        assert not any(tensor.offset % alignment for tensor in file.tensors.values())
    assert prove(out, source).max_logit_difference == 0


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m.gguf")
    for name in ("a", "b"):
        write(lay_out(source, keep_first(320)), tmp_path / name / "t.gguf")
    for name in ("t.gguf", "t.vocab.gguf"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_embedding_table_gives_what_llama_cpp_reads(tmp_path: Path) -> None:
    """Rows of the companion, dequantised and scaled; an id beyond the table reads as its last row."""
    source, out = write_model(tmp_path / "m.gguf", "gemma3", Quant.F32), tmp_path / "t.gguf"
    write(lay_out(source, keep_first(320)), out)
    table = np.frombuffer(GGUFFile(source).read(GGUFFile(source).tensors["token_embd.weight"]), np.float32)
    table = table.reshape(600, N_EMBD)
    ids = [0, 599, 7, 7, 650]
    expected = table[[0, 599, 7, 7, 599]] * np.float32(N_EMBD**0.5)
    assert np.array_equal(Trimmed.open(out).embeddings().rows(ids), expected)


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "m.gguf"), tmp_path / "new" / "t.gguf"
    result = run("trim", source, "-o", out, "-k", 320, "--dry-run")
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    cut = lay_out(
        source, lambda vocabulary, has_row, _: keep_listed(vocabulary, has_row, list(range(len(has_row))), 320)
    )
    said = " ".join(result.stdout.split())
    assert "rows kept 320 of 600, " in said and "% of what was counted" in said
    assert "forced tokens 261" in said
    assert f"read per draft step {step_bytes(GGUFFile(source)) / 1e6:.1f} MB -> {cut.step_bytes / 1e6:.1f} MB" in said
    assert f"{source.stat().st_size / 1e6:.1f} MB -> {cut.trimmed.n_bytes / 1e6:.1f} MB" in said
    for path in (source, out, companion_path(out)):
        assert str(path) in result.stdout, "a path is data: it may not be wrapped or shortened"


def test_the_step_bytes_of_a_plan_are_those_of_the_file(tmp_path: Path) -> None:
    for architecture in ("llama", "llama-tied"):
        source = write_model(tmp_path / f"{architecture}.gguf", architecture, Quant.Q8_0)
        cut = lay_out(source, keep_first(320))
        write(cut, tmp_path / "t.gguf")
        assert cut.step_bytes == step_bytes(GGUFFile(tmp_path / "t.gguf")) < step_bytes(GGUFFile(source))


def test_trim_prints_the_path_and_tells_the_plan_on_stderr(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "m.gguf"), tmp_path / "t.gguf"
    result = run("trim", source, "-o", out, "-k", 320)
    assert (result.exit_code, result.stdout) == (0, f"{out}\n"), result.output
    assert "320 of 600" in result.stderr
    assert run("verify", out, "--source", source).stdout.startswith("ok: 320 rows equal as bytes")
    assert 0 < GGUFFile(out).get("gguf_trim.coverage") < 1
    assert GGUFFile(out).get("gguf_trim.forced") == 261


def test_trim_without_k_keeps_all_rows_of_a_small_head(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "m.gguf"), tmp_path / "t.gguf"
    assert run("trim", source, "-o", out).exit_code == 0
    assert Trimmed.open(out).d2t.tolist() == list(range(600)) and prove(out, source).ok


def test_trim_warns_where_k_leaves_forced_tokens_out(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "m.gguf"), tmp_path / "t.gguf"
    result = run("trim", source, "-o", out, "-k", 32)
    assert result.exit_code == 0 and "leaves out 229" in result.stderr and "k = 261 holds them all" in result.stderr
    assert prove(out, source).ok


def test_trim_by_counts_and_by_a_keep_list(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "m.gguf"), tmp_path / "t.gguf"
    dense = np.zeros(600, np.int64)
    dense[[300, 400, 410]] = 3, 1, 2
    Counts.of(dense, Vocabulary(GGUFFile(source)), "x").save(tmp_path / "c.npz")
    by_counts = ["trim", source, "-o", out, "-k", 263, "--counts", tmp_path / "c.npz"]
    assert run(*by_counts, "--exact-k").exit_code == 0
    kept = Trimmed.open(out).d2t.tolist()
    assert {300, 410} <= set(kept) and 400 not in kept and len(kept) == 263
    (tmp_path / "keep.txt").write_text("400\n")
    by_list = ["trim", source, "-o", out, "--keep", tmp_path / "keep.txt"]
    assert run(*by_list, "--exact-k").exit_code == 0
    listed = set(Trimmed.open(out).d2t.tolist())
    assert listed == {*kept} - {300, 410} | {400}
    # Unless told not to, both are filled up to a multiple of 16 rows, in the order in which tokens are kept.
    for words, first, more in ((by_counts, {*kept}, {400}), (by_list, listed, set())):
        assert run(*words).exit_code == 0
        filled = set(Trimmed.open(out).d2t.tolist())
        assert len(filled) == 272 and filled > first | more
        left = [i for i in range(600) if i not in first | more]
        assert words is by_list or filled - first - more == set(left[: 272 - len(first | more)])
        assert prove(out, source).max_logit_difference == 0.0
    both = run("trim", source, "-o", out, "--keep", tmp_path / "keep.txt", "--counts", tmp_path / "c.npz")
    assert both.exit_code == 2 and "not both" in both.stderr


def test_if_needed_writes_only_what_is_not_there(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "m.gguf"), tmp_path / "t.gguf"

    def trim(k: int, drafter: Path = source) -> bool:
        """Whether a file was written."""
        before = out.stat().st_mtime_ns if out.exists() else 0
        result = run("trim", drafter, "-o", out, "-k", k, "--if-needed")
        assert result.exit_code == 0, result.output
        return out.stat().st_mtime_ns != before

    assert trim(320) and not trim(320)
    assert trim(328) and not trim(328)
    assert trim(328, write_model(tmp_path / "other.gguf", seed=5)), "another drafter"
    companion_path(out).unlink()
    assert trim(328), "no companion"
    out.write_bytes(out.read_bytes()[:-64])
    assert trim(328) and not trim(328), "truncated"
    assert prove(out, source).ok


def test_paths_with_brackets_are_no_markup(tmp_path: Path) -> None:
    folder = tmp_path / "a[" / "b] [bold]"
    folder.mkdir(parents=True)
    source, out = write_model(folder / "m.gguf"), folder / "t.gguf"
    for more in ([], ["--if-needed"], ["--dry-run"]):
        result = run("trim", source, "-o", out, "-k", 320, *more)
        assert result.exit_code == 0 and str(out) in result.output, result.output


def test_the_source_is_only_read(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m.gguf")
    before = hashlib.sha256(source.read_bytes()).digest(), source.stat().st_mtime_ns
    write(lay_out(source, keep_first(320)), tmp_path / "t.gguf")
    assert (hashlib.sha256(source.read_bytes()).digest(), source.stat().st_mtime_ns) == before
