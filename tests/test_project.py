"""What stands around the code agrees with it: change log, contributing, citation, workflow and forms."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import llamabase
from gguf_trim.pairs.catalog import tomllib

ROOT = Path(__file__).parent.parent
PACKAGES = ("llamabase", "corpus", "gguf_trim", "runner")


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def parsed(name: str) -> dict:
    return yaml.safe_load(text(name))


def arxiv(page: str) -> set[str]:
    return set(re.findall(r"\b\d{4}\.\d{5}\b", page))


def test_the_version_is_in_one_place() -> None:
    """The change log leads to it: what is not released, or it."""
    found = {
        path.relative_to(ROOT)
        for path in (*ROOT.glob("*.*"), *ROOT.rglob(".github/**/*.*"), *(ROOT / "llamabase").rglob("*.py"))
        if path.is_file() and re.search(r"^\W*_*version_*\W*[=:]\W*\d+\.\d+\.\d+", path.read_text("utf-8"), re.M)
    }
    assert found == {Path("llamabase/__init__.py")}
    newest = re.search(r"^## \[(.+?)\]", text("CHANGELOG.md"), re.M)
    assert newest and newest[1] in ("Unreleased", llamabase.__version__)


def test_the_citation_names_the_papers_of_the_readme() -> None:
    references = parsed("CITATION.cff")["references"]
    assert {reference["url"][-10:] for reference in references} == arxiv(
        text("README.md").rpartition("The ideas are")[2]
    )
    assert all(reference["title"] and reference["authors"] for reference in references)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_file_it_names_is_there(page: str) -> None:
    named = re.findall(r"\]\(([^)]+)\)|`([\w/.-]+/[\w.-]*)`", text(page))
    for path in filter(None, (link or code for link, code in named)):
        assert "://" in path or path.startswith("src/models/") or (ROOT / path).exists(), path
    assert f"]({page})" in text("README.md")


def test_make_knows_the_targets_of_contributing() -> None:
    for target in re.findall(r"^    (make [\w-]+)", text("CONTRIBUTING.md"), re.M):
        assert subprocess.run([*target.split(), "-n"], cwd=ROOT, capture_output=True).returncode == 0, target


def test_the_workflow_runs_make_test_and_on_windows_what_that_calls() -> None:
    jobs = parsed(".github/workflows/ci.yml")["jobs"]
    runs = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert runs["make"] == ["make test"] and runs["dist"] == ["make dist"]
    systems = {row["system"] for row in jobs["make"]["strategy"]["matrix"]["include"]}
    assert {re.sub(r"-[\d.]+", "", system) for system in systems} == {"ubuntu", "ubuntu-arm", "macos"}
    recipes = re.findall(r"^\t.*\$\(RUN\) (.+)", re.sub(r"(?s)\ndemo:.*?\n(?=test:)", "", text("Makefile")), re.M)
    wanted = [
        line for line in recipes if line.split()[0] in ("ruff", "mypy") or "-e '.[" in line or "pytest -n" in line
    ]
    wanted = [line.partition("-n $$")[0].replace("'", '"') for line in wanted]
    assert len(wanted) == 5
    for line in wanted:
        assert any(run.startswith(f".venv/Scripts/python -m {line}") for run in runs["windows"]), line
    assert len(runs["windows"]) == len(wanted) + 1  # it makes the environment


def test_the_workflow_has_the_oldest_and_the_newest_python_that_are_named() -> None:
    project = tomllib.loads(text("pyproject.toml"))["project"]
    named = [name.rpartition(" ")[2] for name in project["classifiers"] if re.search(r"Python :: 3\.", name)]
    rows = parsed(".github/workflows/ci.yml")["jobs"]["make"]["strategy"]["matrix"]["include"]
    assert {named[0], named[-1]} == {row["python"] for row in rows}
    assert project["requires-python"] == f">={named[0]}"


def test_forms_ask_for_what_the_commands_print() -> None:
    forms = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")}
    assert forms.keys() == {"bug", "machine", "feature"}
    for form in forms.values():
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert form["name"] and form["description"] and any(field.get("validations") for field in fields)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_carry_their_types(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
