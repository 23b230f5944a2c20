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
from gguf.constants import GGMLQuantizationType as Quant

from gguf_trim.__main__ import main as gguf_trim
from gguf_trim.fit.calibrate import TeacherForced, share
from gguf_trim.format.companion import Trimmed, companion_path
from gguf_trim.format.speculator import Speculator
from gguf_trim.pairs.prepare import prepare
from gguf_trim.pairs.shapes import Shape, write_shape
from gguf_trim.plan import quickest
from gguf_trim.plan.quickest import TYPES, Candidate, _candidates
from llamabase import store
from llamabase.errors import EngineError
from llamabase.gguf.reader import GGUFFile
from llamabase.llama.quantize import AS_SHIPPED, requantized, tensor_types
from llamabase.llama.timing import StepCost

from .conftest import copy_trimmed, keep_first


@pytest.fixture
def toy(toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Prepares the toy pair in a folder of its own, with few texts to read, and counts the measurements."""
    monkeypatch.setenv("GGUF_TRIM_CACHE", str(tmp_path))
    monkeypatch.setattr("gguf_trim.fit.calibrate.CONVERSATIONS", 4)
    monkeypatch.setattr(quickest, "DRAFT_REPEAT", 1)
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


@pytest.mark.parametrize("chosen", [AS_SHIPPED, "Q4_0+HEAD", "IQ4_NL"])
def test_the_quickest_is_kept_and_the_others_are_gone(toy, tmp_path: Path, monkeypatch, chosen: str) -> None:
    seconds = {"plain": 1.0} | dict.fromkeys((AS_SHIPPED, *TYPES), 0.5) | {chosen: 0.01}
    monkeypatch.setattr(quickest, "in_rows", lambda steps, *_: ({name: [1.0] for name in steps}, 0.0))
    monkeypatch.setattr(quickest, "by_turns", lambda steps, *_: {name: [seconds[name]] for name in steps})
    path, _ = toy()
    assert path.stem.endswith("-trim405" if chosen == AS_SHIPPED else f"-trim405-{chosen}")
    assert files(tmp_path) == {path.name, companion_path(path).name}
    trimmed = Trimmed.open(path)
    fitted = Speculator.of(trimmed)
    assert fitted is not None and fitted.acceptance.keys() == {"trim", "context", "spec", "full"}
    assert trimmed.companion.tensors["output.weight"].type.name == "F32"  # the added rows stay as shipped
    layer, head = (trimmed.file.tensors[name].type.name for name in ("blk.0.ffn_up.weight", "output.weight"))
    assert layer == ("F32" if chosen == AS_SHIPPED else chosen.removesuffix("+HEAD"))
    assert head == {AS_SHIPPED: "F32", "Q4_0": "Q6_K", "IQ4_NL": "Q6_K"}.get(chosen, layer)


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
    candidate = Candidate("Q4_0", rights, 0.1, verify)
    assert candidate.best == (pytest.approx(3 / (1.3 + 0.2)), 2)
    assert "acceptance 0.667, 2.00 x plain at 2 drafts" in str(candidate)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter of three layers whose head is its embedding table."""
    path = tmp_path_factory.mktemp("tied") / "tied.gguf"
    write_shape(Shape("tied", "llama", 1024, 256, 2, 4, 2, 64, 256, True), path, "F16")
    return path


@pytest.mark.parametrize("kind", ["Q4_0", "IQ4_NL", "Q4_K_M", "Q8_0"])
def test_the_head_has_the_type_if_asked(toys, tied: Path, tmp_path: Path, kind: str) -> None:
    for path, head in ((toys["wrong"], "output.weight"), (tied, "token_embd.weight")):
        left, asked = (tensor_types(requantized(path, name, tmp_path)) for name in (kind, f"{kind}+HEAD"))
        assert left[head].name == ("Q8_0" if kind == "Q8_0" else "Q6_K")
        assert asked == left | {head: Quant[kind.removesuffix("_M")]}


def test_a_type_that_is_joined_has_the_bytes_that_requantising_gives(toys, tied: Path, tmp_path: Path) -> None:
    for path in (toys["wrong"], tied):
        files = _candidates(path, tmp_path)
        made, other = GGUFFile(files["IQ4_NL"]), GGUFFile(requantized(path, "IQ4_NL", tmp_path / "by llama.cpp"))
        assert {name: made.read(tensor) for name, tensor in made.tensors.items()} == {
            name: other.read(tensor) for name, tensor in other.tensors.items()
        }


def test_no_file_is_a_candidate_twice(tied: Path, tmp_path: Path) -> None:
    """Of a drafter that is shipped as Q8_0."""
    shipped = requantized(tied, "Q8_0", tmp_path)
    assert list(_candidates(shipped, tmp_path / "made")) == [AS_SHIPPED, *TYPES[:-1]]
    assert len(list((tmp_path / "made").iterdir())) == len(TYPES) - 1 and shipped.exists()


def test_only_types_that_could_win_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Acceptance is lost by requantising, so what would lose with all of it is not read."""
    steps = {AS_SHIPPED: 0.5, "Q4_0": 0.1, "IQ4_NL": 0.11, "Q8_0": 0.4}
    monkeypatch.setattr(quickest, "_costs", lambda *_: (steps, StepCost({1: 1.0, 2: 1.1})))
    rights = {AS_SHIPPED: [True] * 9 + [False], "Q4_0": [True] * 6 + [False] * 4, "IQ4_NL": [True] * 8 + [False] * 2}
    read = []

    def reads(kind: str) -> list[np.ndarray]:
        read.append(kind)
        return [np.array(rights[kind] * 12)]

    assert quickest._quickest(Path(), dict.fromkeys(steps, Path()), reads, None) == "IQ4_NL"
    assert read == [AS_SHIPPED, "Q4_0", "IQ4_NL"]


def test_costs_are_in_units_of_the_drafter_as_shipped(monkeypatch: pytest.MonkeyPatch, toys, tmp_path: Path) -> None:
    """Each type takes turns with it: a machine that is busy for one of these minutes changes no ratio."""
    busy = iter((1.0, 3.0, 1.0, 1.0, 1.0, 1.0))
    own = {AS_SHIPPED: 2.0, "Q4_0": 1.0, "Q8_0": 1.5}

    def turns(steps, *_):
        scale = next(busy)
        return {name: [scale * own.get(name, 10.0)] for name in steps}

    monkeypatch.setattr(quickest, "by_turns", turns)
    monkeypatch.setattr(quickest, "in_rows", lambda steps, *_: ({name: [10.0] for name in steps}, 0.0))
    files = {AS_SHIPPED: toys["wrong"], "Q4_0": toys["wrong"], "Q8_0": toys["wrong"]}
    assert quickest._costs(toys["target"], files, None)[0] == own


def test_a_drafter_that_is_its_own_target_is_judged_by_what_the_target_says(toys, tmp_path: Path, monkeypatch) -> None:
    """Not by texts of another model: as shipped it is always right."""
    monkeypatch.setattr("gguf_trim.fit.calibrate.CONVERSATIONS", 4)
    rights = {}

    def judged(target, files, read, trimmed) -> str:
        rights[trimmed is None] = read(AS_SHIPPED)
        return AS_SHIPPED

    monkeypatch.setattr(quickest, "_quickest", judged)
    quickest.quickest_uncut(toys["target"], toys["target"], tmp_path)
    assert all(right.all() for right in rights[True]) and sum(map(len, rights[True])) > 50
    quickest.quickest_uncut(toys["target"], toys["wrong"], tmp_path / "wrong")
    assert share(rights[True]) < 0.5
    cut = copy_trimmed(toys["good-trimmed"], tmp_path / "cut.gguf")
    quickest.choose_type(toys["target"], cut, tmp_path)
    fitted = Speculator.of(Trimmed.open(cut))
    assert fitted is not None and 0.5 < fitted.acceptance["trim"] < 1 and 0.5 < share(rights[False]) < 1
