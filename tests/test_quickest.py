"""Which quantisation a trim is kept in: the quickest here, measured once and remembered, or one decided by hand."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gguf_trim.__main__ import main as gguf_trim
from gguf_trim.fit.calibrate import TeacherForced
from gguf_trim.format.companion import Trimmed, companion_path
from gguf_trim.format.speculator import Speculator
from gguf_trim.pairs.prepare import prepare
from gguf_trim.plan import quickest
from gguf_trim.plan.quickest import TYPES, Candidate
from llamabase import store
from llamabase.errors import EngineError
from llamabase.gguf.reader import GGUFFile
from llamabase.llama.quantize import AS_SHIPPED
from llamabase.llama.timing import VERIFY, StepCost

from .conftest import keep_first


@pytest.fixture
def toy(toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Prepares the toy pair in a folder of its own, with few texts to read, and counts the measurements."""
    monkeypatch.setenv("GGUF_TRIM_CACHE", str(tmp_path))
    monkeypatch.setattr("gguf_trim.fit.calibrate.CONVERSATIONS", 4)
    monkeypatch.setattr(store, "memory_file", lambda: tmp_path / "remembered.sqlite")
    honest, measured = quickest._quickest, []

    def counted(*args) -> str:
        measured.append(args)
        return honest(*args)

    monkeypatch.setattr(quickest, "_quickest", counted)

    def run(requant: str | None = None) -> tuple[Path, int]:
        before = len(measured)
        made = prepare(target=toys["target"], drafter=toys["wrong"], choose=keep_first(400), requant=requant)
        return made.trimmed, len(measured) - before

    return run


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "trimmed").iterdir()}


def test_the_type_is_measured_once(toy, tmp_path: Path) -> None:
    path, measured = toy()
    assert measured == 1
    assert toy() == (path, 0)
    assert files(tmp_path) == {path.name, companion_path(path).name}  # what was not kept is gone
    (tmp_path / "remembered.sqlite").unlink()
    assert toy()[1] == 1


def test_what_is_remembered_is_not_written_again(toy, tmp_path: Path) -> None:
    toy()
    path = tmp_path / "remembered.sqlite"
    os.utime(path, (0, 0))
    assert toy()[1] == 0
    assert path.stat().st_mtime == 0


def test_what_a_killed_run_has_left_is_swept(toy, tmp_path: Path) -> None:
    path, _ = toy("none")
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    left = path.with_name(f".{path.name}.{gone.pid}.part")
    left.mkdir()
    (left / path.name).write_text("half a cut")
    made, _ = toy("q8_0")
    assert files(tmp_path) == {name for kept in (path, made) for name in (kept.name, companion_path(kept).name)}


@pytest.mark.parametrize("damage", [5, "Q9_9", ["Q4_0"], None])
def test_a_damaged_memory_is_measured_again(toy, tmp_path: Path, damage) -> None:
    toy()
    with closing(sqlite3.connect(tmp_path / "remembered.sqlite")) as memory, memory:
        assert memory.execute("UPDATE types SET facts = ?", [json.dumps({"type": damage})]).rowcount == 1
    assert toy()[1] == 1


@pytest.mark.parametrize("chosen", [AS_SHIPPED, *TYPES])
def test_the_quickest_is_kept_and_the_others_are_gone(toy, tmp_path: Path, monkeypatch, chosen: str) -> None:
    seconds = dict.fromkeys(VERIFY, 1.0) | dict.fromkeys((AS_SHIPPED, *TYPES), 0.5) | {chosen: 0.01}
    monkeypatch.setattr(quickest, "by_turns", lambda steps, *_: {name: [seconds[name]] for name in steps})
    path, _ = toy()
    assert path.stem.endswith("-trim405" if chosen == AS_SHIPPED else f"-trim405-{chosen}")
    assert files(tmp_path) == {path.name, companion_path(path).name}
    trimmed = Trimmed.open(path)
    fitted = Speculator.of(trimmed)
    assert fitted is not None and fitted.acceptance.keys() == {"trim", "context", "spec", "full"}
    assert trimmed.companion.tensors["output.weight"].type.name == "F32"  # the added rows stay as shipped
    assert trimmed.file.tensors["blk.0.ffn_up.weight"].type.name == ("F32" if chosen == AS_SHIPPED else chosen)


def test_a_type_decided_by_hand_is_not_measured(toy, toys, tmp_path: Path) -> None:
    as_shipped, measured = toy("none")
    assert measured == 0
    by_hand, measured = toy("q8_0")
    assert measured == 0
    assert by_hand.name == f"{as_shipped.stem}-Q8_0.gguf"
    assert toy("Q8_0") == (by_hand, 0)
    assert as_shipped.exists()  # it was asked for before
    done = CliRunner().invoke(
        gguf_trim,
        [
            "prepare",
            "--target",
            str(toys["target"]),
            "--draft",
            str(toys["wrong"]),
            "-k",
            "400",
            "--requant",
            "nonsense",
        ],
    )
    assert done.exit_code == 2
    assert "NONSENSE: is not a llama.cpp quantisation" in " ".join(done.stderr.split())


def test_an_interruption_leaves_nothing_that_is_not_whole(toy, tmp_path: Path, monkeypatch) -> None:
    honest = TeacherForced.of
    monkeypatch.setattr(TeacherForced, "of", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        toy()
    assert len(files(tmp_path)) == 2  # the proven cut and its companion
    monkeypatch.setattr(TeacherForced, "of", honest)
    assert toy()[1] == 1


def test_a_type_that_llama_cpp_cannot_make_is_left_out(toy, monkeypatch) -> None:
    def refuses(source: Path, out: Path, type_: str, kept: object) -> None:
        raise EngineError(f"{source}: llama.cpp cannot quantize it to {type_}")

    monkeypatch.setattr("llamabase.llama.quantize.quantize", refuses)
    path, measured = toy()
    assert measured == 1
    assert "-Q" not in path.name
    assert GGUFFile(path).tensors["blk.0.ffn_up.weight"].type.name == "F32"
    with pytest.raises(EngineError, match="cannot quantize"):
        toy("Q4_0")


def test_the_fastest_draft_length_by_hand() -> None:
    """Of three tokens two are drafted right: tau is 3 at two drafts a round and 1.5 at one."""
    rights = [np.array([True, True, False] * 40)]
    verify = StepCost({1: 1.0, 2: 1.2, 3: 1.3, 4: 2.5})
    candidate = Candidate("Q4_0", TeacherForced(np.empty(0), rights), 0.1, verify)
    assert candidate.best == (pytest.approx(3 / (1.3 + 0.2)), 2)
    assert "acceptance 0.667, 2.00 x plain at 2 drafts" in str(candidate)
