"""Documents from every kind of source, and messages about bad ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from corpus.__main__ import main
from corpus.count import HELD_OUT, count, held_out, script_of
from corpus.counts import Counts, merge
from corpus.sources import SourceReader
from llamabase.errors import FileFormatError, TrimError, VocabularyMismatch
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.model import Model
from llamabase.llama.template import ChatTemplate

TEXTS = ["the king and the sea", "naïve 猫 12345", "it's\n\n  indented"]


def texts(source: Path | str, **settings) -> list[str]:
    return [document.text for document in SourceReader(**settings).documents(str(source))]


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS) + "\n\n")
    parquet.write_table(pyarrow.table({"text": TEXTS, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("n", "text"), *enumerate(TEXTS)])
    for name in ("a.jsonl", "a.parquet", "a.csv"):
        assert texts(tmp_path / name) == TEXTS


def test_a_folder_as_a_dataset(tmp_path: Path) -> None:
    """hf: goes through `datasets`, which streams local folders as it streams the Hub."""
    pytest.importorskip("datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    assert texts(f"hf:{folder}") == TEXTS
    assert texts(f"hf:{folder}::train") == TEXTS
    with pytest.raises(TrimError, match="cannot be loaded"):
        texts(f"hf:{folder}::nonsense")


def test_of_a_chat_only_the_assistant_counts_as_the_template_writes_it(tmp_path: Path, toys) -> None:
    file = GGUFFile(toys["target"])
    template = ChatTemplate(file, Vocabulary(file))
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "who?"},
        {"role": "assistant", "content": "the king"},
        {"role": "user", "content": "where?"},
        {"role": "assistant", "content": "the sea"},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages, "language": "en"}) + "\n")
    assert texts(path, template=template) == ["the king<|im_end|>", "the sea<|im_end|>"]
    assert texts(path) == ["the king", "the sea"]
    counts = count([str(path)], toys["target"])
    with Model(toys["target"], vocab_only=True) as model:
        end = model.tokenize("<|im_end|>")
        wanted = sum(len(model.tokenize(text)) for text in ("the king", "the sea")) + 2
    held = sum(int(part.counts.sum()) for part in counts.parts if part.group.held_out)
    assert counts.total + held == wanted
    assert counts.counts[counts.ids == end[0]].tolist() == [2] or held


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', "line 2: is not a JSON object"),
        ("a.jsonl", b'{"text": "ok"}\n[1]\n', "line 2: is not a JSON object"),
        ("a.jsonl", b'{"body": "ok"}\n', "line 1: has no field 'text'"),
        ("a.jsonl", b'{"messages": [{"content": "x"}]}\n', "line 1: its messages cannot be rendered"),
        ("a.csv", b"n,body\n1,x\n", "has no field 'text'; it has n, body"),
        ("a.parquet", b"PAR1 not really", "is not a Parquet file"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_bad_sources_are_named(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(FileFormatError) as caught:
        texts(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


def test_skip_bad_counts_what_it_leaves_out(tmp_path: Path, toys) -> None:
    path, out = tmp_path / "a.jsonl", tmp_path / "c.npz"
    path.write_text('{"text": "the king"}\n{"text": \n{"body": 1}\n{"text": "the sea"}\n')
    done = CliRunner().invoke(main, ["count", str(path), "--tokenizer", str(toys["target"]), "-o", str(out)])
    assert done.exit_code == 1
    assert "line 2" in done.stderr
    assert not out.exists()
    arguments = ["count", str(path), "--tokenizer", str(toys["target"]), "-o", str(out), "--skip-bad"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "2 rows were left out" in done.stderr.replace("\n", " ")


def test_binary_files_in_a_folder_are_passed_over(tmp_path: Path, toys) -> None:
    (tmp_path / "a.txt").write_text("the king and the sea\n" * 3)
    (tmp_path / "b.bin").write_bytes(bytes(range(256)))
    assert count([str(tmp_path)], toys["target"]).total > 0


def test_held_out_is_decided_by_the_text_alone_and_never_counted(tmp_path: Path, toys) -> None:
    lines = [f"the king number {i}" for i in range(20 * HELD_OUT)]
    assert 10 < sum(held_out(line) for line in lines) < 32
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    counts = count([str(path)], toys["target"])
    with Model(toys["target"], vocab_only=True) as model:
        kept = sum(len(model.tokenize(line, special=False)) for line in lines if not held_out(line))
        out = sum(len(model.tokenize(line, special=False)) for line in lines if held_out(line))
    assert counts.total == kept
    assert sum(int(part.counts.sum()) for part in counts.parts if part.group.held_out) == out


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("hello wörld", "latin"),
        ("Привет, мир", "cyrillic"),
        ("这是一个测试", "cjk"),
        ("これは日本語の文章です", "hiragana"),
        ("안녕하세요", "hangul"),
        ("مرحبا", "arabic"),
        ("123 !?", "other"),
    ],
)
def test_scripts(text: str, script: str) -> None:
    assert script_of(text) == script


def test_merging_in_any_order_and_grouping_gives_the_same_bytes(tmp_path: Path, toys) -> None:
    tables = []
    for i, text in enumerate(("the king and the sea ", "naïve 猫 tea ", "sea sea the ")):
        path = tmp_path / f"{i}.txt"
        path.write_text(text * 40)
        tables.append(count([str(path)], toys["target"]))
    a, b, c = tables
    merged = [merge([a, b, c]), merge([c, a, b]), merge([merge([a, b]), c]), merge([a, merge([c, b])])]
    files = []
    for i, table in enumerate(merged):
        table.save(tmp_path / f"m{i}.npz")
        files.append((tmp_path / f"m{i}.npz").read_bytes())
    assert len(set(files)) == 1
    whole = count([str(tmp_path / f"{i}.txt") for i in range(3)], toys["target"])
    assert (merged[0].ids == whole.ids).all()
    assert (merged[0].counts == whole.counts).all()
    loaded = Counts.load(tmp_path / "m0.npz")
    assert [part.group for part in loaded.parts] == [part.group for part in whole.parts]
    doubled = merge([a, b], [2, 0.5])
    assert doubled.total == pytest.approx(2 * a.total + 0.5 * b.total, abs=len(b.ids))
    with pytest.raises(VocabularyMismatch):
        merge([a, count([str(tmp_path / "0.txt")], toys["foreign"])])


def test_show(tmp_path: Path, toys) -> None:
    (tmp_path / "a.txt").write_text("the king and the sea " * 40)
    (tmp_path / "b.txt").write_text("Привет мир " * 40)
    out = tmp_path / "c.npz"
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    done = CliRunner().invoke(main, ["count", *files, "--tokenizer", str(toys["target"]), "-o", str(out)])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(main, ["show", str(out), "--tokenizer", str(toys["target"])])
    assert done.exit_code == 0, done.output
    for part in ("everything", "a.txt", "b.txt", "latin", "cyrillic", "always kept"):
        assert part in done.stdout


def test_plot_is_a_picture(tmp_path: Path, toys) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "a.txt").write_text("the king and the sea " * 40)
    out, picture = tmp_path / "c.npz", tmp_path / "c.png"
    count([str(tmp_path / "a.txt")], toys["target"]).save(out)
    done = CliRunner().invoke(main, ["show", str(out), "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_max_tokens_stops_early(tmp_path: Path, toys) -> None:
    path = tmp_path / "a.jsonl"
    rng = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(3000):
            file.write(json.dumps({"text": " ".join(map(str, rng.integers(0, 99999, 300)))}) + "\n")
    whole = count([str(path)], toys["target"])
    part = count([str(path)], toys["target"], max_tokens=whole.total // 3)
    assert whole.total // 4 < part.total < whole.total
