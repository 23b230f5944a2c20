"""The plan of the house: which package stands on which, and that no module leans on one that leans on it."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("llamabase", "corpus", "gguf_trim", "runner")  # from the ground up
ROOMS = ("gguf_trim", "gguf_trim.dynamic", "gguf_trim.planning", "gguf_trim.pairs")  # the cut, and what builds on it
COMMANDS = ("gguf_trim.__main__", "gguf_trim.plan.command", "gguf_trim.describe")  # of all rooms


def _modules() -> dict[str, Path]:
    files = [path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


MODULES = _modules()


def _imports(name: str) -> set[str]:
    """The modules of ours that one imports, wherever in it; a package stands for its __init__."""
    package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            whole = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{whole}.{a.name}" if f"{whole}.{a.name}" in MODULES else whole for a in node.names}
    return found & MODULES.keys()


def _room(name: str) -> str:
    return max((room for room in (*FLOORS, *ROOMS) if name == room or name.startswith(f"{room}.")), key=len)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_down(name: str) -> None:
    """runner -> gguf_trim -> corpus -> llamabase, and within gguf_trim from pairs down to the cut."""
    floor = FLOORS.index(name.split(".")[0])
    below = set(FLOORS[: floor + 1])
    assert {used.split(".")[0] for used in _imports(name)} <= below
    if _room(name) in ROOMS and name not in COMMANDS:
        rooms = {_room(used) for used in _imports(name) if used.startswith("gguf_trim")}
        assert rooms <= set(ROOMS[: ROOMS.index(_room(name)) + 1])


def test_no_module_leans_on_one_that_leans_on_it() -> None:
    graph = {name: _imports(name) - {name} for name in MODULES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the cycle


def test_corpus_computes_with_a_model_only_to_generate() -> None:
    using = set()
    for name in (name for name in MODULES if name.startswith("corpus")):
        names = {
            node.id for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))) if isinstance(node, ast.Name)
        }
        using |= {name} if "ParallelContext" in names else set()
    assert using == {"corpus.generate"}


def test_no_module_only_passes_on_what_others_hold() -> None:
    """But runner's, which is the Python API."""
    for name, path in MODULES.items():
        body = [node for node in ast.parse(path.read_text("utf-8")).body if not isinstance(node, ast.Expr)]
        only_imports = bool(body) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)
        assert not only_imports, f"{name} only re-exports"
