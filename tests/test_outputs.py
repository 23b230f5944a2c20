"""No command replaces a file that is not of the kind it writes: it says so before its work, and touches nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from corpus import __main__ as corpus_command
from corpus.__main__ import main as corpus
from gguf_trim.__main__ import main as gguf_trim
from gguf_trim.format.companion import companion_path
from llamabase.errors import TrimError
from runner.bench.__main__ import main as bench
from runner.chat.conversation import save

from .conftest import copy_trimmed

pytest.importorskip("matplotlib")


@dataclass(frozen=True)
class Writer:
    """A command with OUT for the file it writes, the kind of that, and where its work begins."""

    group: click.Group
    words: str
    suffix: str
    kind: str
    work: str


PAIR = "--target TARGET --draft SPEC --full TARGET"
RUN = f"run {PAIR} --prompts PROMPTS -n 4 -c 256 --modes plain,trim"
WRITERS = {
    "count": Writer(corpus, "count TEXT --tokenizer TARGET -o OUT", ".npz", "counts", "corpus.__main__.count"),
    "merge": Writer(corpus, "merge COUNTS COUNTS -o OUT", ".npz", "counts", "corpus.__main__.merge"),
    "show": Writer(corpus, "show COUNTS --plot OUT", ".png", "plot", "corpus.__main__.coverage_table"),
    "generate": Writer(
        corpus, "generate --target TARGET --limit 2 -n 4 -o OUT", ".jsonl", "answers", "corpus.__main__.Model"
    ),
    "plan": Writer(
        gguf_trim,
        "plan --target TARGET --draft TARGET --answers IDS --no-measure --plot OUT",
        ".png",
        "plot",
        "gguf_trim.plan.command.ranking_counts",
    ),
    "trim": Writer(gguf_trim, "trim TARGET --k 320 -o OUT", ".gguf", "trimmed", "gguf_trim.__main__.lay_out"),
    "requant": Writer(
        gguf_trim, "trim TARGET --k 320 --requant q8_0 -o OUT", ".gguf", "trimmed", "gguf_trim.__main__.lay_out"
    ),
    "steps": Writer(bench, f"steps {PAIR} --repeat 1 -o OUT", ".json", "steps", "runner.bench.__main__.find_files"),
    "run": Writer(bench, f"{RUN} -o OUT", ".json", "record", "runner.bench.__main__.find_files"),
    "run --plot": Writer(bench, f"{RUN} --plot OUT", ".png", "plot", "runner.bench.__main__.find_files"),
    "report": Writer(bench, "report RECORD -o OUT", ".json", "report", "runner.bench.__main__.reports"),
    "compare": Writer(bench, "compare RECORD RECORD --plot OUT", ".png", "plot", "runner.bench.__main__.compare"),
}


@pytest.fixture(scope="module", autouse=True)
def small_work() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runner.bench.machine.COPIED", 16 << 20)
        patch.setattr("gguf_trim.fit.calibrate.CONVERSATIONS", 4)
        yield


@pytest.fixture(scope="module")
def inputs(toys: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the commands read, and a photo."""
    folder = tmp_path_factory.mktemp("inputs")
    files = {"TARGET": toys["target"], "SPEC": toys["spec-trimmed"]}
    files |= {name: folder / name for name in ("TEXT", "IDS", "PROMPTS", "COUNTS", "RECORD", "photo")}
    files["TEXT"].write_text("the king and the sea " * 40)
    files["IDS"].write_text(json.dumps({"a": [[5, 6, 7], [8, 9, 10, 11]]}))
    files["PROMPTS"].write_text(json.dumps({"id": "p", "prompt": "the sea"}))  # and no newline
    files["photo"].write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    assert run("count", files["COUNTS"], files).exit_code == 0
    assert run("run", files["RECORD"], files).exit_code == 0
    return files


def run(name: str, out: Path, inputs: dict[str, Path], *more: str) -> Result:
    words = [str({**inputs, "OUT": out}.get(word, word)) for word in WRITERS[name].words.split()]
    return CliRunner().invoke(WRITERS[name].group, [*words, *more])


@pytest.fixture(scope="module")
def made(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each command writes; an empty file of that name is no obstacle."""
    folder, found = tmp_path_factory.mktemp("made"), {}
    for name, writer in WRITERS.items():
        found[name] = folder / f"{name}{writer.suffix}"
        found[name].touch()
        done = run(name, found[name], inputs)
        assert done.exit_code == 0, done.output
        assert found[name].stat().st_size
    return found


def check_refused(done: Result, out: Path) -> None:
    """One sentence that names the file, and the way out."""
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
    assert done.stdout == ""
    assert done.stderr.startswith(f"Error: {out}: ") and done.stderr.count("\n") == 1, done.stderr
    assert "; choose another name\n" in done.stderr


@pytest.mark.parametrize("name", WRITERS)
def test_other_files_are_refused_before_the_work(name: str, inputs, made, tmp_path: Path, monkeypatch) -> None:
    """A model, a photo, a text, prompts, and whatever the other commands write."""
    kind, out = WRITERS[name].kind, tmp_path / f"x{WRITERS[name].suffix}"
    monkeypatch.setattr(WRITERS[name].work, lambda *_, **__: pytest.fail("the work has begun"))
    victims = [inputs[other] for other in ("TARGET", "photo", "TEXT", "IDS", "PROMPTS")]
    victims += [made[other] for other in WRITERS if WRITERS[other].kind != kind]
    for victim in (*victims, companion_path(made["trim"])):
        shutil.copy(victim, out)
        done = run(name, out, inputs)
        check_refused(done, out)
        assert out.read_bytes() == victim.read_bytes(), victim
        assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_is_refused_before_the_work(name: str, inputs, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / f"x{WRITERS[name].suffix}"
    out.mkdir()
    monkeypatch.setattr(WRITERS[name].work, lambda *_, **__: pytest.fail("the work has begun"))
    done = run(name, out, inputs)
    assert done.exit_code == 1 and done.stderr.startswith(f"Error: {out}: "), done.stderr
    assert list(tmp_path.iterdir()) == [out] and not list(out.iterdir())


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_told_before_the_work(name: str, inputs, small_disk: Path, monkeypatch) -> None:
    with contextlib.suppress(OSError), open(small_disk / "other", "wb", buffering=0) as file:
        while file.write(bytes(65536)):
            pass
    out = small_disk / f"x{WRITERS[name].suffix}"
    monkeypatch.setattr(WRITERS[name].work, lambda *_, **__: pytest.fail("the work has begun"))
    done = run(name, out, inputs)
    assert (done.exit_code, done.stdout) == (1, ""), done.output
    assert done.stderr == f"Error: {out}: the disk is full; free some room or write elsewhere\n"
    assert [path.name for path in small_disk.iterdir()] == ["other"]


@pytest.mark.parametrize("name", WRITERS)
def test_its_own_kind_is_replaced(name: str, inputs, made, tmp_path: Path) -> None:
    """But answers, which are gone on from: none of them is missing here."""
    writer, out = WRITERS[name], tmp_path / f"x{WRITERS[name].suffix}"
    (copy_trimmed if writer.kind == "trimmed" else shutil.copy)(made[name], out)
    os.utime(out, (0, 0))
    done = run(name, out, inputs)
    assert done.exit_code == 0, done.output
    assert (out.stat().st_mtime > 0) == (writer.kind != "answers")


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--if-needed"], ["--requant", "q8_0"]])
def test_a_companion_is_no_other_file(inputs, tmp_path: Path, more: list[str]) -> None:
    out = tmp_path / "x.gguf"
    shutil.copy(inputs["TARGET"], companion_path(out))
    check_refused(run("trim", out, inputs, *more), companion_path(out))
    assert companion_path(out).read_bytes() == inputs["TARGET"].read_bytes()
    assert list(tmp_path.iterdir()) == [companion_path(out)]


def test_the_best_k_is_not_looked_for_in_vain(inputs, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("gguf_trim.__main__.auto_k", lambda *_: pytest.fail("the work has begun"))
    out = tmp_path / "x.gguf"
    shutil.copy(inputs["TARGET"], out)
    words = ["trim", str(inputs["SPEC"]), "-o", str(out), "--k", "auto", "--target", str(inputs["TARGET"])]
    check_refused(CliRunner().invoke(gguf_trim, words), out)


def test_a_file_that_comes_while_it_works_is_kept(inputs, tmp_path: Path, monkeypatch) -> None:
    out, count = tmp_path / "x.npz", corpus_command.count

    def slow(*args, **settings):
        shutil.copy(inputs["TARGET"], out)
        return count(*args, **settings)

    monkeypatch.setattr(corpus_command, "count", slow)
    done = run("count", out, inputs)
    assert done.exit_code == 1 and f"Error: {out}: is there and is not a counts file" in done.stderr
    assert out.read_bytes() == inputs["TARGET"].read_bytes()
    assert list(tmp_path.iterdir()) == [out]


def test_a_model_is_no_conversation(inputs, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    shutil.copy(inputs["TARGET"], out)
    with pytest.raises(TrimError, match=r"x\.json: is there and is not a conversation; choose another name"):
        save([], out)
    assert out.read_bytes() == inputs["TARGET"].read_bytes()


def test_what_steps_lack_is_told_before_the_work(inputs, monkeypatch, tmp_path: Path) -> None:
    for work in ("bandwidth", "Models.open"):
        monkeypatch.setattr(f"runner.bench.__main__.{work}", lambda *_: pytest.fail("the work has begun"))
    pair = ["steps", "--target", str(inputs["TARGET"]), "--draft", str(inputs["SPEC"])]
    done = CliRunner().invoke(bench, pair)
    assert done.exit_code == 1 and "needs the uncut drafter and a trimmed one" in done.stderr, done.output
    for text in ("{}", "[" * 20_000, '{"draft_max": 1, "tau": {"a": "x"}}'):
        (tmp_path / "a.json").write_text(text)
        done = CliRunner().invoke(
            bench, [*pair, "--full", str(inputs["TARGET"]), "--acceptance", str(tmp_path / "a.json")]
        )
        assert done.exit_code == 1 and done.stderr.startswith(f"Error: {tmp_path / 'a.json'}: "), done.output
