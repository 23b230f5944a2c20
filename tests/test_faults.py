"""Every command that writes, with a fault at every step of its writing: a full disk, a bad one, a kill, another writer.

Whatever happens: what the command reads is untouched, no half file is under a final name, and run again it succeeds.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from corpus.counts import Counts
from gguf_trim.__main__ import main as gguf_trim
from gguf_trim.format.companion import Trimmed
from gguf_trim.format.speculator import Speculator
from gguf_trim.model_card import CARD
from llamabase.files import sha256_of
from llamabase.gguf.reader import GGUFFile
from llamabase.llama.ggml import release_threads

from .conftest import copy_trimmed
from .test_outputs import WRITERS, Writer, inputs, made, small_work

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks")

COMMANDS = {
    **WRITERS,
    "speculator": Writer(gguf_trim, "speculator OUT", ".gguf", "trimmed", ""),
    "prepare": Writer(gguf_trim, "prepare --target TARGET --draft TARGET --k 320 --requant Q8_0", "", "cache", ""),
}
FAULTS = ("ENOSPC", "EIO", "kill", "second writer")


class Disk:
    """The functions that touch the disk, under `folder`: before the call number `at`, `act` is called."""

    def __init__(self, folder: Path, at: int | None, act: Callable[[], None]) -> None:
        self.folder, self.at, self.act, self.n = folder, at, act, 0
        self._open = builtins.open

    def step(self) -> None:
        self.n += 1
        if self.n - 1 == self.at:
            self.act()

    def open(self, path: Any, mode: str = "r", *args: Any, **settings: Any) -> Any:
        writes = set(mode) & set("wax+")
        if not writes or isinstance(path, int) or not Path(path).is_relative_to(self.folder):
            return self._open(path, mode, *args, **settings)
        self.step()
        raw = _Raw(path, mode.replace("b", ""))
        raw.step = self.step
        file = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return file if "b" in mode else io.TextIOWrapper(file, encoding=settings.get("encoding"))

    @contextmanager
    def watched(self) -> Iterator[Disk]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builtins, "open", self.open)
            for name in ("fsync", "replace", "mkdir", "copy_file_range"):
                if (function := getattr(os, name, None)) is not None:
                    patch.setattr(os, name, self._before(function))
            yield self

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **settings: Any) -> Any:
            self.step()
            return function(*args, **settings)

        return stepped


class _Raw(io.FileIO):
    step: Callable[[], None]

    def write(self, data: Any) -> int:
        self.step()
        return super().write(data)


def failing(number: int) -> Callable[[], None]:
    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act


class Case:
    """One command in a folder of its own."""

    def __init__(self, name: str, folder: Path, inputs: dict[str, Path], made: dict[str, Path]) -> None:
        self.name, self.folder, self.inputs, self.made = name, folder, inputs, made
        self.writer = COMMANDS[name]
        self.out = folder / f"x{self.writer.suffix}" if self.writer.suffix else folder / "cache"
        folder.mkdir()

    def before(self, there: bool) -> None:
        """What is there before: for `speculator` always a cut, else a file of the command's own kind or nothing."""
        if self.name == "speculator":
            copy_trimmed(self.made["trim"], self.out)
        elif there and self.name != "prepare":
            self.put()

    def put(self) -> None:
        """A whole file of the same kind, as another writer would have it."""
        if self.writer.kind == "trimmed":
            copy_trimmed(self.made["requant"], self.out)
        elif self.writer.kind != "cache":
            shutil.copy(self.made[self.name], self.out)

    def run(self) -> Any:
        words = [str({**self.inputs, "OUT": self.out}.get(word, word)) for word in self.writer.words.split()]
        return CliRunner().invoke(self.writer.group, words, env={"GGUF_TRIM_CACHE": str(self.folder / "cache")})

    def check_whole(self) -> None:
        """Whatever has a final name is whole."""
        for path in sorted(self.folder.rglob("*")):
            if path.is_dir() or path.name.endswith(".part") or any(p.name.endswith(".part") for p in path.parents):
                continue
            if path.suffix == ".npz":
                Counts.load(path)
            elif path.suffix == ".png":
                assert path.read_bytes().endswith(b"IEND\xaeB`\x82"), path
            elif path.suffix == ".md":
                assert CARD.known(path), path
            elif path.suffix == ".json":
                assert json.loads(path.read_text()), path
            elif path.suffix == ".jsonl":
                lines = path.read_text().split("\n")
                assert all(json.loads(line) for line in lines[:-1])  # the last may be cut off, and is mended
            elif path.name.endswith(".vocab.gguf"):
                pass  # with its file, which takes its name later
            else:
                assert path.suffix == ".gguf", path
                GGUFFile(path).require_loadable()
                if "requantised" not in path.parts:  # where uncut drafters are kept
                    Speculator.of(Trimmed.open(path))

    def parts(self) -> list[str]:
        return [path.name for path in self.folder.rglob("*.part")]


def act_of(fault: str, case: Case) -> Callable[[], None]:
    if fault == "kill":
        return lambda: os.kill(os.getpid(), signal.SIGKILL)
    if fault == "second writer":
        return case.put
    return failing(getattr(errno, fault))


def one(fault: str, at: int, case: Case) -> int:
    """Run the command with a fault at a step; the number of steps there were, -1 where it was killed."""
    disk = Disk(case.folder, at, act_of(fault, case))
    if fault != "kill":
        with disk.watched():
            done = case.run()
        assert isinstance(done.exception, SystemExit | None), (fault, at, done.exception)
        if fault in ("ENOSPC", "EIO") and disk.n > at and done.exit_code:
            said = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
            assert done.exit_code == 1 and len(said) == 1, (fault, at, done.output)
            assert "full" in said[0] or "cannot be" in said[0] or "No space" in said[0] or "error" in said[0], said
        return disk.n
    release_threads()  # a child has none of them
    if (child := os.fork()) == 0:
        with disk.watched():
            case.run()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return -1 if status else 0


def sweep(name: str, fault: str, there: bool, folder: Path, inputs: Any, made: Any, places: Iterator[int]) -> int:
    """The fault at each of these steps, as long as there is one; how many there were."""
    read = {path: sha256_of(path) for path in inputs.values()}
    count = 0
    for at in places:
        case = Case(name, folder / f"{at}", inputs, made)
        case.before(there)
        steps = one(fault, at, case)
        case.check_whole()
        if fault != "kill":
            assert not case.parts(), (fault, at)
        assert {path: sha256_of(path) for path in read} == read
        done = case.run()
        assert done.exit_code == 0, (fault, at, done.output)
        case.check_whole()
        assert not case.parts(), (fault, at)
        shutil.rmtree(case.folder)
        if 0 <= steps <= at:
            break
        count += 1
    return count


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_fault_somewhere(name: str, fault: str, inputs, made, tmp_path: Path) -> None:
    """At one of its first steps, or a later one: chance decides, the same every time."""
    rng = random.Random(f"{name} {fault}")
    sweep(name, fault, bool(rng.randrange(2)), tmp_path, inputs, made, iter([rng.randrange(12)]))


@pytest.mark.slow
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_fault_anywhere(name: str, fault: str, there: bool, inputs, made, tmp_path: Path) -> None:
    """At every step."""
    if there and name in ("prepare", "speculator"):
        pytest.skip("what is there before is always the same")
    n = sweep(name, fault, there, tmp_path, inputs, made, iter(range(10_000)))
    print(f"FAULTS {name}, {fault}, {'over a file' if there else 'from nothing'}: {n} places")
    assert n > 3
