"""What is published: the wheel holds all that runs, the sdist what a reader needs, and neither anything else.

`tests/test_scripts.py` installs the wheel and runs it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("llamabase", "corpus", "gguf_trim", "runner")
DATA = {"gguf_trim/pairs/catalog.toml", "runner/serve/page.html", *(f"{package}/py.typed" for package in PACKAGES)}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both, built away from what an earlier build has left, which would be taken for source."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.gguf"))
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder)], cwd=source, check=True, capture_output=True
    )
    return folder


def ours() -> set[str]:
    modules = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    ready = {path.relative_to(ROOT).as_posix() for path in (ROOT / "corpus" / "ready").iterdir()}
    return modules | ready | DATA


def test_the_wheel_holds_the_packages_and_their_data(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        assert {name for name in wheel.namelist() if ".dist-info/" not in name} == ours()


def test_the_sdist_holds_pages_and_no_tests(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        names = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").iterdir() if path.is_file()}
    assert ours() | pages | {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} <= names
    assert not {name for name in names if name.startswith(("tests/", "tools/", "docs/results/"))}
