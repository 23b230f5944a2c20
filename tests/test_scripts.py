"""The console scripts, and a wheel that works where nothing of the tree is."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gguf_trim.pairs.fetch import PIP

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
COMMANDS = {
    "gguf-trim": {
        *("trim", "verify", "card", "inspect", "speculator", "plan", "models", "prepare", "export", "cache"),
        *("count", "generate", "merge", "show"),
    },
    "gguf-run": {"chat", "serve", "bench", "exact", "cache"},
}


def test_every_package_is_packed() -> None:
    found = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("*/**/__init__.py")}
    ours = {name for name in found if name.split(".")[0] in ("llamabase", "corpus", "gguf_trim", "runner")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == ours


@pytest.mark.parametrize("script", COMMANDS)
def test_a_script_has_its_commands(script: str) -> None:
    module, _, name = PROJECT["project"]["scripts"][script].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    main = importlib.import_module(f"{module}.__main__").main
    assert COMMANDS[script] == set(main.commands)
    for command in COMMANDS[script]:
        assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize("script", COMMANDS)
def test_a_script_is_named_in_its_help(script: str) -> None:
    module, _, name = PROJECT["project"]["scripts"][script].partition(":")
    code = f"import sys; from {module} import {name}; sys.argv = ['x', '--help']; {name}()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: {script} ")


@pytest.mark.parametrize("path", sorted((ROOT / "tools").rglob("*.py")), ids=lambda path: path.name)
def test_what_a_tool_imports_of_ours_is_there(path: Path) -> None:
    """Without running it: what else it imports need not be installed."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and (ROOT / node.module.split(".")[0]).is_dir():
            exec(f"from {node.module} import {', '.join(alias.name for alias in node.names)}", {})


def test_nothing_that_lies_about_is_run(tmp_path: Path) -> None:
    """The scripts, isolated, in a folder with modules of well-known names; and the pip that downloads wheels."""
    for name in ("json", "numpy", "llama_cpp", "pip", "zipfile", "click"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} of the folder was run')")
    for script in COMMANDS:
        installed = shutil.which(script, path=str(Path(sys.executable).parent))
        if installed is None:
            pytest.skip("the scripts are not installed")
        command = [sys.executable, "-I", installed, "--help"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    done = subprocess.run([*PIP, "--version"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("pip "), done.stderr


def test_what_is_installed_is_locked() -> None:
    """CI installs from constraints.txt: whatever the project or its tests need is there, with a version."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]:
        pin = Requirement(line)
        pins[canonicalize_name(pin.name)] = pin
    wanted = [(Requirement(f"gguf-trim[{extra}]"), extra) for extra in ("dev", "corpus", "plot", "cluster", "serve")]
    seen: set[tuple[str, str]] = set()
    while wanted:
        need, extra = wanted.pop()
        for more in need.extras or {""}:
            key = canonicalize_name(need.name), more
            if key in seen or (need.marker and not need.marker.evaluate({"extra": extra})):
                continue
            seen.add(key)
            name = key[0]
            if name != "gguf-trim":
                assert name in pins, f"{name} is not in constraints.txt"
                assert [each.operator for each in pins[name].specifier] == ["=="], name
            try:
                needs = requires(name) or []
            except PackageNotFoundError:
                continue
            wanted += [(Requirement(text), more) for text in needs]
    assert len(seen) > 40


@pytest.mark.slow
def test_a_wheel_runs_the_default_pair(tmp_path: Path) -> None:
    """Built from what git knows, installed into an environment of its own, run from elsewhere."""
    tree, wheels, environment = tmp_path / "tree", tmp_path / "wheels", tmp_path / "environment"
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, known):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=clean)
        assert done.returncode == 0, done.stderr
        return done

    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", wheels, tree)
    run(sys.executable, "-m", "venv", environment)
    (wheel,) = wheels.iterdir()
    run(environment / "bin/pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel)
    where = run(environment / "bin/python", "-c", "import runner; print(runner.__file__)").stdout
    assert where.startswith(str(environment))
    said = run(environment / "bin/gguf-run", "chat", "--prompt", "Say hello.", "--temp", "0", "-n", "12")
    assert said.stdout.strip()
    assert "tok/s" in said.stderr
    assert "qwen2.5-coder-1.5b" in run(environment / "bin/gguf-trim", "models").stdout
    assert "trimmed" in run(environment / "bin/gguf-trim", "cache").stdout
