"""The plan of the house: floors are the four packages, rooms the folders in them; imports run one way between both."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("llamabase", "corpus", "gguf_trim", "runner")  # from the ground up


def _modules() -> dict[str, Path]:
    files = [path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


MODULES = _modules()


def _tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text("utf-8"))


def _imports(name: str) -> set[str]:
    """The modules that one imports, anywhere in its text; a package stands for its __init__."""
    package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
    imported: set[str] = set()
    for node in ast.walk(_tree(name)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            whole = ".".join([*base, *([node.module] if node.module else [])])
            imported |= {f"{whole}.{a.name}" if f"{whole}.{a.name}" in MODULES else whole for a in node.names}
    return imported


IMPORTS = {name: _imports(name) - {name} for name in MODULES}
OURS = {name: imported & MODULES.keys() for name, imported in IMPORTS.items()}


def _within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _room(name: str) -> str | None:
    """The folder of a module.

    A command (`__main__`, `command`), an `__init__` and a module directly in one of the four packages are in no room.
    """
    *folder, module = name.split(".")
    return ".".join(folder) if len(folder) > 1 and module not in ("__main__", "command") else None


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_down(name: str) -> None:
    """runner -> gguf_trim -> corpus -> llamabase."""
    below = FLOORS[: FLOORS.index(name.split(".")[0]) + 1]
    assert {used for used in OURS[name] if not _within(used, *below)} == set()


def _others(names: str, *allowed: str) -> dict[str, set[str]]:
    """Which modules of a package import what besides the allowed packages."""
    used = {name: {u for u in OURS[name] if not _within(u, *allowed)} for name in MODULES if _within(name, names)}
    return {name: others for name, others in used.items() if others}


def test_runner_knows_the_format_of_a_trim_and_the_pairs() -> None:
    """Of gguf_trim, no more than these two rooms."""
    floors = (floor for floor in FLOORS if floor != "gguf_trim")
    assert _others("runner", *floors, "gguf_trim.format", "gguf_trim.pairs") == {}


def test_the_format_of_a_trim_needs_nothing_else_of_gguf_trim() -> None:
    floors = (floor for floor in FLOORS if floor != "gguf_trim")
    assert _others("gguf_trim.format", *floors, "gguf_trim.format") == {}


def test_files_are_read_without_llama_cpp() -> None:
    """Nor does llamabase.gguf reach it through another module."""
    names = {name for name in MODULES if _within(name, "llamabase.gguf")}
    while more := {used for name in names for used in OURS[name]} - names:
        names |= more
    assert {name for name in names if _within(name, "llamabase.llama")} == set()
    assert {name for name in names if any(_within(used, "llama_cpp") for used in IMPORTS[name])} == set()


def test_no_module_imports_one_that_imports_it() -> None:
    list(TopologicalSorter(OURS).static_order())  # raises CycleError, naming the cycle


def test_no_room_imports_one_that_imports_it() -> None:
    rooms: dict[str, set[str]] = {}
    for name, used in OURS.items():
        if room := _room(name):
            rooms.setdefault(room, set()).update({_room(u) for u in used} - {room, None})
    list(TopologicalSorter(rooms).static_order())


def test_corpus_computes_with_a_model_only_to_generate() -> None:
    corpus = [name for name in MODULES if _within(name, "corpus")]
    used = {name: {node.id for node in ast.walk(_tree(name)) if isinstance(node, ast.Name)} for name in corpus}
    using = {name for name, names in used.items() if "Meeting" in names}
    assert using == {"corpus.generate"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_only_re_exports(name: str) -> None:
    body = [node for node in _tree(name).body if not isinstance(node, ast.Expr)]
    assert not body or not all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)
