"""Counting tokens, and the counts file between `corpus` and `gguf_trim`."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.__main__ import main
from corpus.count import count
from corpus.counts import Counts
from corpus.ready import ready_counts
from llamabase.errors import FileFormatError, TrimError, VocabularyMismatch
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.model import Model

from .encode import vocabulary
from .toy import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("counts") / "m.gguf")


def some_counts() -> Counts:
    return Counts(np.array([1, 5, 9], np.int32), np.array([7, 1 << 40, 7]), 10, "f" * 64, "a test")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@given(
    st.dictionaries(st.integers(0, 999), st.integers(1, (1 << 62) - 1), max_size=20),
    st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20),
)
@settings(max_examples=30)
def test_what_was_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, table: dict[int, int], made_from: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "saved.npz"
    ids = sorted(table)
    saved = Counts(np.array(ids, np.int32), np.array([table[i] for i in ids], np.int64), 1000, "f" * 64, made_from)
    saved.save(path)
    loaded = Counts.load(path)
    assert loaded.ids.tolist() == ids and loaded.ids.dtype == np.int32
    assert loaded.counts.tolist() == saved.counts.tolist() and loaded.counts.dtype == np.int64
    assert (loaded.n_tokens, loaded.fingerprint, loaded.made_from) == (1000, saved.fingerprint, made_from)
    assert loaded.name == str(path)


def test_the_same_counts_give_the_same_bytes(tmp_path: Path) -> None:
    some_counts().save(tmp_path / "a.npz")
    os.utime(tmp_path / "a.npz", (0, 0))
    some_counts().save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def save_as(path: Path, **changes: Any) -> Path:
    """A counts file with some of its arrays changed, or left out if None."""
    c = some_counts()
    fields = {
        "ids": c.ids, "counts": c.counts, "n_tokens": np.int64(c.n_tokens),
        "fingerprint": np.array(c.fingerprint), "made_from": np.array(c.made_from),
    } | changes  # fmt: skip
    np.savez_compressed(path, **{key: value for key, value in fields.items() if value is not None})
    return path


BAD = {
    "no ids": {"ids": None},
    "no fingerprint": {"fingerprint": None},
    "unsorted": {"ids": np.array([5, 1, 9])},
    "unsorted and unsigned": {"ids": np.array([5, 1, 9], np.uint32)},
    "twice": {"ids": np.array([1, 1, 9])},
    "negative id": {"ids": np.array([-1, 5, 9])},
    "id out of range": {"ids": np.array([1, 5, 10])},
    "fractional ids": {"ids": np.array([1.0, 5.5, 9.0])},
    "negative count": {"counts": np.array([7, -1, 7])},
    "count of zero": {"counts": np.array([7, 0, 7])},
    "fractional counts": {"counts": np.array([7.5, 1.0, np.nan])},
    "counts of text": {"counts": np.array(["a", "b", "c"])},
    "one count missing": {"counts": np.array([7, 7])},
    "two dimensions": {"ids": np.array([[1, 5, 9]]), "counts": np.array([[7, 7, 7]])},
    "several lengths": {"n_tokens": np.array([10, 11])},
    "length of text": {"n_tokens": np.array("ten")},
    "objects": {"made_from": np.array([{}], object)},
}


@pytest.mark.parametrize("name", BAD)
def test_arrays_that_make_no_sense_are_refused(tmp_path: Path, name: str) -> None:
    path = save_as(tmp_path / "bad.npz", **BAD[name])
    with pytest.raises(FileFormatError) as caught:
        Counts.load(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("part_sizes", [1, 1]),
        ("part_sizes", [4, -1]),
        ("part_ids", [1, 5, 10]),
        ("part_ids", [5, 1, 9]),
        ("part_counts", [7, 0, 7]),
        ("part_counts", [7, 7]),
        ("part_keys", '[["a", "b", false]]'),
    ],
)
def test_parts_that_make_no_sense_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    parts = {"part_sizes": [2, 1], "part_ids": [1, 5, 9], "part_counts": [7, 1, 7],
             "part_keys": '[["a", "b", false], ["a", "c", true]]'}  # fmt: skip
    good = Counts.load(save_as(tmp_path / "good.npz", **{key: np.array(parts[key]) for key in parts}))
    assert [(part.group.label, part.ids.tolist()) for part in good.parts] == [("b", [1, 5]), ("c", [9])]
    with pytest.raises(FileFormatError, match="not a counts file"):
        Counts.load(save_as(tmp_path / "bad.npz", **{key: np.array((parts | {name: value})[key]) for key in parts}))


def test_other_files_are_refused(tmp_path: Path, model: Path) -> None:
    np.save(tmp_path / "one.npy", np.arange(3))
    (tmp_path / "text.txt").write_text("1\n2\n")
    (tmp_path / "empty.npz").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("ids.npy", "no array")
    for path in (*tmp_path.iterdir(), model, tmp_path, tmp_path / "missing.npz"):
        with pytest.raises(FileFormatError) as caught:
            Counts.load(path)
        message = str(caught.value)
        assert str(path) in message and "python -m corpus count" in message and "\n" not in message


def test_a_counts_file_cut_anywhere_or_damaged_is_refused_or_whole(tmp_path: Path) -> None:
    """Exhaustively: no cut and no changed byte makes anything but FileFormatError, or counts that make sense."""
    path = tmp_path / "c.npz"
    some_counts().save(path)
    data = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for position in range(len(data)):
            for byte in (data[position] ^ 0xFF, data[position] ^ (1 << position % 8)):
                os.pwrite(file.fileno(), bytes([byte]), position)
                try:
                    loaded = Counts.load(path)
                except FileFormatError as error:
                    assert str(error).startswith(str(path))
                else:
                    assert (loaded.counts > 0).all() and (np.diff(loaded.ids) > 0).all()
            os.pwrite(file.fileno(), data[position : position + 1], position)
    for end in reversed(range(len(data))):
        os.truncate(path, end)
        with pytest.raises(FileFormatError):
            Counts.load(path)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
@settings(max_examples=60)
def test_ranked_by_falling_count_then_by_id(dense: list[int]) -> None:
    ids = [i for i, n in enumerate(dense) if n]
    counts = Counts(np.array(ids, np.int32), np.array([dense[i] for i in ids], np.int64), len(dense), "", "")
    assert counts.ranked().tolist() == sorted(ids, key=lambda i: (-dense[i], i))
    assert counts.coverage(np.array(ids)) == (1.0 if ids else 0.0)
    assert counts.coverage(np.array([], np.int32)) == 0.0


def test_coverage_is_a_share_of_everything_counted() -> None:
    counts = Counts(np.array([0, 2]), np.array([1, 3]), 3, "", "")
    assert counts.coverage(np.array([1, 2])) == 0.75


def test_counts_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    a = vocabulary(tmp_path / "a.gguf", ["x", "y"], None)
    counts = Counts.of(np.array([1, 2]), a, "x")
    counts.require_vocabulary(a)
    counts.require_vocabulary(vocabulary(tmp_path / "longer.gguf", ["x", "y", "z"], None))
    counts.require_vocabulary(vocabulary(tmp_path / "padded.gguf", ["x", "y", "[PAD2]"], [1, 1, 5]))
    for tokens in (["x", "z"], ["x"]):
        with pytest.raises(VocabularyMismatch) as caught:
            counts.require_vocabulary(vocabulary(tmp_path / "other.gguf", tokens, None))
        assert "other.gguf" in str(caught.value) and "\n" not in str(caught.value)


def test_count_counts_as_llama_cpp_tokenizes(tmp_path: Path, model: Path) -> None:
    """Over a text, a folder and JSON lines; names of special tokens in a text are text."""
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    texts = ["the thing <|im_end|> and\n", "naïve 敏捷\n", "one the", "two and"]
    (tmp_path / "plain.txt").write_text(texts[0], "utf-8")
    (tmp_path / "folder" / "deep" / "a.md").write_text(texts[1], "utf-8")
    (tmp_path / "folder" / "picture.png").write_bytes(b"\x89PNG\xff\xfe\0")
    lines = [{"text": texts[2]}, {"text": None}, {"text": texts[3], "other": 1}]
    (tmp_path / "folder" / "b.jsonl").write_text("\n\n".join(map(json.dumps, lines)), "utf-8")
    out = tmp_path / "out.npz"
    result = run("count", tmp_path / "plain.txt", tmp_path / "folder", "--tokenizer", model, "-o", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    expected = np.zeros(600, np.int64)
    with Model(model, vocab_only=True) as llama:
        for text in texts:
            np.add.at(expected, llama.tokenize(text, special=False, add_bos=False), 1)
    counts = Counts.load(out)
    assert counts.ids.tolist() == np.flatnonzero(expected).tolist()
    assert counts.counts.tolist() == expected[expected > 0].tolist()
    assert counts.total == expected.sum() and f"{counts.total} tokens" in result.stderr
    assert counts.fingerprint == Vocabulary(GGUFFile(model)).fingerprint
    assert str(tmp_path / "plain.txt") in counts.made_from


def test_a_long_file_counts_as_a_whole(tmp_path: Path, model: Path) -> None:
    """Texts are read in pieces that end at a line's end, which no token of ours crosses."""
    (tmp_path / "long.txt").write_text("the end of it\n" * 20_000)
    counts = count([tmp_path / "long.txt"], model)
    (tmp_path / "short.txt").write_text("the end of it\n")
    once = count([tmp_path / "short.txt"], model)
    assert counts.counts.tolist() == (20_000 * once.counts).tolist()


def test_the_order_of_the_sources_changes_no_byte(tmp_path: Path, model: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"the {name}")
    count([tmp_path / "a.txt", tmp_path / "b.txt"], model).save(tmp_path / "1.npz")
    count([tmp_path / "b.txt", tmp_path / "a.txt"], model).save(tmp_path / "2.npz")
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()


GOOD = b'{"text": "the"}\n'


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("x.jsonl", GOOD + b"\n{broken\n", "x.jsonl, line 3: is not a JSON object"),
        ("x.jsonl", GOOD + b'{"other": "the"}\n', "x.jsonl, line 2: has no field 'text'"),
        ("x.jsonl", GOOD + b'["text"]\n', "x.jsonl, line 2: is not a JSON object"),
        ("x.jsonl", GOOD + b"[" * 100_000 + b"\n", "x.jsonl, line 2: is not a JSON object"),
        ("x.jsonl", GOOD + b'{"text": ' + b"1" * 10_000 + b"}\n", "x.jsonl, line 2: is not a JSON object"),
        ("x.jsonl", GOOD + b'{"text": "\xff"}\n', "x.jsonl: is not UTF-8 text"),
        ("x.bin", b"\x89PNG\xff", "x.bin: is not UTF-8 text (byte 0x89)"),
        ("x.txt", b"", "x.txt: no text to count"),
        ("x.jsonl", b'{"text": ""}\n', "x.jsonl: no text to count"),
    ],
)
def test_what_cannot_be_counted_is_named(tmp_path: Path, model: Path, name: str, data: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(data)
    out = tmp_path / "out.npz"
    result = run("count", tmp_path / name, "--tokenizer", model, "-o", out)
    assert result.exit_code == 1 and reason in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ") and result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_half_a_character_in_json_is_counted_as_a_replacement(tmp_path: Path, model: Path) -> None:
    """JSON can hold half of a surrogate pair and UTF-8 cannot; it must not stop a long count."""
    (tmp_path / "x.jsonl").write_text('{"text": "the \\ud800 end"}\n')
    assert count([tmp_path / "x.jsonl"], model).total > 0


def test_sources_and_tokenizers_that_are_not_there(tmp_path: Path, model: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(TrimError, match="folder: no text to count"):
        count([tmp_path / "folder"], model)
    with pytest.raises(TrimError, match="missing: there is no such file or folder"):
        count([tmp_path / "missing"], model)
    (tmp_path / "x.txt").write_text("the")
    with pytest.raises(FileFormatError, match="cannot be read"):
        count([tmp_path / "x.txt"], tmp_path / "missing.gguf")


def test_ready_counts_for_a_vocabulary_never_seen(model: Path) -> None:
    """The bundled text, tokenized by it: frequent English letters and merges lead, nothing special is counted."""
    known = Vocabulary(GGUFFile(model))
    counts = ready_counts(known)
    counts.require_vocabulary(known)
    assert counts.total > 100_000 and len(counts.ids) > 300
    best = {known.text(int(i)) for i in counts.ranked()[:60]}
    assert {b" t", b"e", b"in"} <= best
    assert not {known.tokens.index(name) for name in (b"<|im_end|>", b"<unk>", b"[PAD599]")} & set(counts.ids.tolist())
