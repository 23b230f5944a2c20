"""README and its pages stay true: commands run, make targets exist, figures stand in a record under docs/results/."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from runner.bench.figures import ALL, figures

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
MEASURED = (ROOT / "docs" / "measured.md").read_text("utf-8")
PAGES = dict.fromkeys(re.findall(r"\]\((docs/[\w-]+\.md)\)", README))  # as README links to them: a reader's order
TEXT = "\n".join([README, *((ROOT / page).read_text("utf-8") for page in PAGES)])
LINES = [line.strip().partition("  #")[0].strip() for line in TEXT.splitlines() if line.startswith("    ")]
COMMANDS = list(dict.fromkeys(LINES))
PYTHON = [line for line in COMMANDS if line.startswith(".venv/bin/python")]
MAKE = [line for line in COMMANDS if line.startswith("make ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """The files the step-by-step part speaks of: SmolLM2 as its own drafter."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("target.gguf", "drafter.gguf"):
        shutil.copy(smollm2, folder / name)
    (folder / "my-texts").mkdir()
    (folder / "my-texts" / "a.txt").write_text("the king and the sea\n" * 200)
    (folder / "few.json").write_text(json.dumps({"a": [list(range(100, 200)), list(range(300, 400))]}))
    return folder


def slow(line: str) -> bool:
    return "--types" in line or "runner.bench" in line


@pytest.mark.parametrize(
    "line",
    [pytest.param(line, marks=pytest.mark.slow) if slow(line) else line for line in PYTHON if "--model" not in line],
)
def test_command_runs(line: str, folder: Path) -> None:
    """In a reader's order, each using what the ones before have made; a chat gets its prompt through a pipe."""
    if "runner.chat" in line:
        line += " -n 8" if "--target" in line else " --target target.gguf -n 8"  # the default pair is 1.6 GB
    if "gguf_trim speculator" in line:
        line += " --calibration few.json"  # those that ship take SmolLM2 a minute to read
    arguments = [sys.executable, *shlex.split(line)[1:]]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run(arguments, cwd=folder, input="Hello.\n", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", MAKE)
def test_make_knows_it(line: str) -> None:
    done = subprocess.run([*shlex.split(line), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def record_path(name: str) -> Path:
    """The newest record of a name."""
    return sorted((ROOT / "docs" / "results").glob(f"*-{name}.json"))[-1]


def record(name: str) -> dict:
    return json.loads(record_path(name).read_text("utf-8"))


REGIMES = ("f16", "shipped")
RECORDS = (*REGIMES, "exact", "exact-sampled", "bench", "never", "steps", "steps-same-type")  # docs/measured.md's


def batch_of_three(bench: dict) -> float:
    """Median seconds of verifying two drafts, in plain steps."""
    seconds = {
        drafted: statistics.median(
            round_[4]
            for answer in bench["answers"]
            if answer["mode"] == mode and "error" not in answer
            for round_ in answer["rounds"]
            if round_[1] == drafted
        )
        for mode, drafted in (("plain", 0), ("spec:2", 2))
    }
    return seconds[2] / seconds[0]


def regime_row(bench: dict) -> str:
    found = figures(bench)[ALL]
    speeds = [found[mode]["speedup_over_plain"]["total"] for mode in ("full:2", "spec:2", "lookup", "auto")]
    cells = [f"{batch_of_three(bench):.2f}", *(f"{speed:.2f}" for speed in speeds[:-1]), f"**{speeds[-1]:.2f}**"]
    return " | ".join([*cells, f"{found['auto']['speedup_over_plain']['overall']:.2f} |"])


def mode_row(f: dict) -> str:
    speed = f["speedup_over_plain"]
    acceptance = f"{f['acceptance_rate']:.3f}" if f["drafted"] else "-"
    return (
        f"| {f['tau']:.2f} | {acceptance} | {speed['total']:.2f} ({speed['low']:.2f} to {speed['high']:.2f}) | "
        f"{speed['overall']:.2f} | {f['mbsu_bytes']:.2f} |"
    )


def test_readme_has_the_figures_of_both_regimes() -> None:
    for name in REGIMES:
        assert regime_row(record(name)) in README, name


@pytest.mark.parametrize("name", RECORDS)
def test_measured_links_to_the_newest_record(name: str) -> None:
    assert f"\n[{name}]: results/{record_path(name).name}\n" in MEASURED


def test_figures_are_those_of_the_records() -> None:
    """docs/measured.md against its records."""
    exact, sampled, bench, never = (record(name) for name in ("exact", "exact-sampled", "bench", "never"))
    steps, same_type = record("steps"), record("steps-same-type")
    speed = {mode: f["speedup_over_plain"] for mode, f in figures(never)[ALL].items()}
    wanted = [
        f"greedy exactness, {len(exact['prompts'])} prompts, {exact['tokens']:,} tokens",
        f"temperature {sampled['sampling']['temp']}, {len(sampled['prompts'])} prompts, {sampled['tokens']:,} tokens",
        f"greatest gap {exact['greatest_gap']:.2f} logits; noise of batch shape alone {exact['noise']:.2f}",
        f"{exact['parted']} of {len(exact['prompts'])}",
        f"{bench['peers']['rows'][0]['ratio']} of `llama-bench`",
        "| {overall:.2f} of plain in all, {least:.2f} at the least |".format(**speed["auto"]),
        "| {overall:.2f} in all, {least:.2f} at the least |".format(**speed["again"]),
        "{date}, llama-cpp-python {llama_cpp_python}".format(**record("shipped")["machine"]),
        f"verifying four tokens takes {steps['median_ratios']['verify 4']:.2f} times",
    ]
    for name in ("trim", "context", "spec"):
        wanted.append(
            f"| {steps['median_ratios'][name]:.3f} | {steps['bytes'][name] / steps['bytes']['full']:.3f} | "
            f"{same_type['median_ratios'][name]:.3f} |"
        )
    for name in REGIMES:
        wanted += [mode_row(f) for mode, f in figures(record(name))[ALL].items() if mode != "plain"]
    for figure in wanted:
        assert figure in MEASURED, figure
    for checked in (exact, sampled):
        assert checked["replay_faults"] == checked["beyond_noise"] == 0


def test_docs_say_what_the_shapes_were_timed_at() -> None:
    """docs/pairs.md against its records: from which acceptance drafting pays, and what it then brings."""
    text = (ROOT / "docs" / "pairs.md").read_text("utf-8")
    shapes = sorted((ROOT / "docs" / "results").glob("*-shape-*.json"))
    assert len(shapes) == 6
    for path in shapes:
        found = json.loads(path.read_text("utf-8"))
        for way in ("full", "trim@16384"):
            pays = found["paying"][way]
            least = "-" if pays["from"] is None else f"{pays['from']['acceptance']:.2f}"
            speeds = " | ".join(f"{point['speedup_over_plain']:.2f} ({point['draft_max']})" for point in pays["at"])
            line = f"| {found['median_ratios'][way]:.2f} | {least} | {speeds} |"
            assert line in text, (path.name, way, line)


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_every_file_it_links_to_is_there(page: str) -> None:
    """And README links to every page."""
    path = ROOT / page
    for link in re.findall(r"(?:\]\(|^\[[^]]+\]: )([^)\s]+)", path.read_text("utf-8"), re.MULTILINE):
        assert "://" in link or (path.parent / link.partition("#")[0]).exists(), link
    assert page == "README.md" or page in PAGES, f"README does not link to {page}"


def test_docs_say_what_the_plan_found() -> None:
    """docs/dynamic.md against the record of its plan: each vocabulary at its best."""
    found = record("mbsu")
    text = (ROOT / "docs" / "dynamic.md").read_text("utf-8")
    for type_ in ("as shipped", "Q4_0"):
        best = {
            vocab: max(row["mbsu_bytes"] for row in found if (row["type"], row["vocab"]) == (type_, vocab))
            for vocab in ("full", "trim", "context", "spec")
        }
        line = next(
            line for line in text.splitlines() if line.startswith("| as ") and line.split(" |")[0].endswith(type_)
        )
        for value in (*best.values(), best["spec"] / best["trim"], best["spec"] / best["full"]):
            assert f"{value:.3f}" in line, (type_, value)


def test_the_page_of_heads_is_that_of_its_records() -> None:
    """docs/eagle3.md: what the trained head drafts, and how quick that is."""
    text = (ROOT / "docs" / "eagle3.md").read_text("utf-8")

    def line(bench: dict, found: dict, mode: str) -> str:
        f, steps = found[mode], {name: mode["step"]["bytes"] for name, mode in bench["modes"].items()}
        return (
            f"| {f['acceptance_rate']:.3f} | {f['tau']:.3f} | {steps[mode] / steps['full:3']:.2f} | "
            f"{f['mbsu_params']:.2f} | {f['mbsu_bytes']:.2f} |"
        )

    acceptance, small = record("acceptance-eagle3"), record("small-eagle3")
    for bench, left_out in ((acceptance, {"plain"}), (small, {"plain", "full:3"})):
        found = figures(bench)[ALL]
        for mode in bench["modes"].keys() - left_out:
            assert line(bench, found, mode) in text, mode
    speeds = [figures(record(f"{name}-eagle3"))[ALL] for name in ("f16", "shipped")]
    for mode in ("again", "full:1", "full:2", "trim:1", "trim:2", "spec:1", "spec:2", "auto"):
        cells = " | ".join(f"{found[mode]['speedup_over_plain']['total']:.2f}" for found in speeds)
        assert f"| {cells} |" in text, mode
    for name in ("exact-eagle3", "exact-sampled-eagle3"):
        found = record(name)
        assert found["replay_faults"] == 0
        assert f"{found['tokens']:,} tokens" in text


def test_the_page_of_mtp_is_that_of_its_record() -> None:
    """docs/mtp.md: a draft step of a published shape."""
    found, text = record("steps-mtp"), (ROOT / "docs" / "mtp.md").read_text("utf-8")
    for name in ("trim", "spec"):
        share = found["bytes"][name] / found["bytes"]["full"]
        assert f"| {found['median_ratios'][name]:.3f} | {share:.3f} |" in text
