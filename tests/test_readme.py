"""README and its pages stay true: commands run, make targets exist, figures stand in a record under docs/results/."""

from __future__ import annotations

import json
import re
import shlex
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
RUN = [line for line in PYTHON if "--model" not in line]
QUICK = [line for line in RUN if "--types" not in line and "runner.bench" not in line]


@pytest.mark.parametrize("lines", [QUICK, pytest.param(RUN, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_commands_run(lines: list[str], tmp_path: Path, smollm2: Path) -> None:
    """In a reader's order, each using the files that earlier ones made; a chat gets its prompt through a pipe."""
    for name in ("target.gguf", "drafter.gguf"):
        (tmp_path / name).symlink_to(smollm2)
    (tmp_path / "my-texts").mkdir()
    (tmp_path / "my-texts" / "a.txt").write_text("the king and the sea\n" * 200)
    (tmp_path / "few.json").write_text(json.dumps({"a": [list(range(100, 200)), list(range(300, 400))]}))
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    for line in lines:
        if "runner.chat" in line:
            line += " -n 8" if "--target" in line else " --target target.gguf -n 8"  # the default pair is 1.6 GB
        if "gguf_trim speculator" in line:
            line += " --calibration few.json"  # SmolLM2 needs a minute to read the texts that ship
        arguments = [sys.executable, *shlex.split(line)[1:]]
        done = subprocess.run(
            arguments, cwd=tmp_path, input="Hello.\n", env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, (line, done.stderr)


@pytest.mark.parametrize("line", MAKE)
def test_make_knows_it(line: str) -> None:
    done = subprocess.run([*shlex.split(line), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def record_path(name: str) -> Path:
    """The newest record of a name."""
    return sorted((ROOT / "docs" / "results").glob(f"*-{name}.json"))[-1]


def record(name: str) -> dict:
    return json.loads(record_path(name).read_text("utf-8"))


REGIMES = {
    "f16": ("| memory | F16 |", "## The same in F16"),
    "shipped": ("| arithmetic | Q4_K_M |", "## The target as shipped"),
}  # the row of README's table, and the section of docs/measured.md
MODES = {
    "again": "plain decoding a second time",
    "full": "uncut drafter",
    "lookup": "prompt lookup, three drafts",
    "auto": "**auto, the default**",
}
DRAFTS = {"": "", "1": ", one draft", "2": ", two drafts", "3": ", three drafts", "4": ", four drafts"}
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


def labelled(mode: str, names: dict[str, str]) -> str:
    """How a page's table calls a mode, such as spec:2: "spec, two drafts"."""
    name, _, n = mode.partition(":")
    return names.get(name, name) + DRAFTS[n]


def section(page: str, heading: str) -> str:
    return page.partition(f"\n{heading}")[2].partition("\n## ")[0]


def mode_row(mode: str, f: dict) -> str:
    speed = f["speedup_over_plain"]
    acceptance = f"{f['acceptance_rate']:.3f}" if f["drafted"] else "-"
    return (
        f"| {labelled(mode, MODES)} | {f['tau']:.2f} | {acceptance} | "
        f"{speed['total']:.2f} ({speed['low']:.2f} to {speed['high']:.2f}) | "
        f"{speed['overall']:.2f} | {f['mbsu_bytes']:.2f} |"
    )


def test_readme_has_the_figures_of_both_regimes() -> None:
    for name, (row, _) in REGIMES.items():
        assert f"\n{row} {regime_row(record(name))}\n" in README, name


@pytest.mark.parametrize("name", RECORDS)
def test_measured_links_to_the_newest_record(name: str) -> None:
    assert f"\n[{name}]: results/{record_path(name).name}\n" in MEASURED


def test_figures_are_those_of_the_records() -> None:
    """docs/measured.md against its records."""
    exact, sampled, bench, never = (record(name) for name in ("exact", "exact-sampled", "bench", "never"))
    steps, same_type = record("steps"), record("steps-same-type")
    auto, again = (figures(never)[ALL][mode]["speedup_over_plain"] for mode in ("auto", "again"))
    wanted = [
        f"AMD EPYC (x86-64, AVX-512),\n{record('shipped')['machine']['date']}, "
        f"llama-cpp-python {record('shipped')['machine']['llama_cpp_python']}:",
        f"| greedy exactness, {len(exact['prompts'])} prompts, {exact['tokens']:,} tokens",
        f"| sampled exactness at temperature {sampled['sampling']['temp']}, {len(sampled['prompts'])} prompts, "
        f"{sampled['tokens']:,} tokens",
        f"| the same text read in one batch | greatest gap {exact['greatest_gap']:.2f} logits; "
        f"noise of batch shape alone {exact['noise']:.2f} |",
        f"| texts that part from plain decoding, all at near-ties | {exact['parted']} of {len(exact['prompts'])} |",
        f"| plain decoding's own speed | {bench['peers']['rows'][0]['ratio']} of `llama-bench`'s |",
        f"wall clock | {auto['overall']:.2f} of plain in all, {auto['least']:.2f} at the least |",
        f"| plain against itself in that run | {again['overall']:.2f} in all, {again['least']:.2f} at the least |",
        f"The target as shipped: verifying four tokens takes {steps['median_ratios']['verify 4']:.2f} times",
    ]
    for name, label in (
        ("trim", "the kept rows only"),
        ("context", "and the tokens of the text"),
        ("spec", "and the speculator's"),
    ):
        wanted.append(
            f"| {name}: {label} | {steps['median_ratios'][name]:.3f} | "
            f"{steps['bytes'][name] / steps['bytes']['full']:.3f} | {same_type['median_ratios'][name]:.3f} |"
        )
    for figure in wanted:
        assert figure in MEASURED, figure
    for name, (_, heading) in REGIMES.items():
        for mode, f in figures(record(name))[ALL].items():
            assert mode == "plain" or mode_row(mode, f) in section(MEASURED, heading), (name, mode)
    for checked in (exact, sampled):
        assert checked["replay_faults"] == checked["beyond_noise"] == 0


def test_docs_say_what_the_shapes_were_timed_at() -> None:
    """docs/pairs.md against its records: from which acceptance drafting pays, and what it then brings."""
    text = (ROOT / "docs" / "pairs.md").read_text("utf-8")
    shapes = sorted((ROOT / "docs" / "results").glob("*-shape-*.json"))
    assert len(shapes) == 10
    for path in shapes:
        found = json.loads(path.read_text("utf-8"))
        model, _, type_ = path.stem.partition("-shape-")[2].rpartition("-")
        trim = "trim" if "trim" in found["paying"] else "trim@16384"  # names a k if there are several
        for way, rows in (("full", "uncut"), (trim, "16,384 rows")):
            pays = found["paying"][way]
            least = "-" if pays["from"] is None else f"{pays['from']['acceptance']:.2f}"
            speeds = " | ".join(f"{point['speedup_over_plain']:.2f} ({point['draft_max']})" for point in pays["at"])
            line = f"| {rows} | {found['median_ratios'][way]:.2f} | {least} | {speeds} |"
            assert re.search(rf"^\| {re.escape(model)} \+ [\w.-]+ \| {type_} {re.escape(line)}$", text, re.M), line


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
        name, _, size = mode.removesuffix(":3").partition("@")
        label = "the whole head, 49,152 rows" if name == "full" else f"{name} {int(size or 1024):,}"
        return (
            f"| {label} | {f['acceptance_rate']:.3f} | {f['tau']:.3f} | {steps[mode] / steps['full:3']:.2f} | "
            f"{f['mbsu_params']:.2f} | {f['mbsu_bytes']:.2f} |"
        )

    acceptance, small = record("acceptance-eagle3"), record("small-eagle3")
    for bench, left_out in ((acceptance, {"plain"}), (small, {"plain", "full:3"})):
        found = figures(bench)[ALL]
        for mode in bench["modes"].keys() - left_out:
            assert line(bench, found, mode) in text, mode
    rows = "8,192 rows"
    names = MODES | {"full": "the whole head", "trim": rows, "spec": f"{rows} and the speculator's"}
    speeds = [figures(record(f"{name}-eagle3"))[ALL] for name in ("f16", "shipped")]
    for mode in ("again", "full:1", "full:2", "trim:1", "trim:2", "spec:1", "spec:2", "auto"):
        cells = " | ".join(f"{found[mode]['speedup_over_plain']['total']:.2f}" for found in speeds)
        assert f"| {labelled(mode, names)} | {cells} |" in text, mode
    exact, sampled = record("exact-eagle3"), record("exact-sampled-eagle3")
    assert exact["replay_faults"] == sampled["replay_faults"] == 0
    said = f"greedily {exact['tokens']:,} tokens of 20 answers, at temperature 0.8 {sampled['tokens']:,} tokens of 20;"
    assert said in " ".join(text.split())


def test_the_page_of_mtp_is_that_of_its_record() -> None:
    """docs/mtp.md: a draft step of a published shape."""
    found, text = record("steps-mtp"), (ROOT / "docs" / "mtp.md").read_text("utf-8")
    for name, label in (("trim", "32,768 rows"), ("spec", "and the speculator's")):
        share = found["bytes"][name] / found["bytes"]["full"]
        assert f"| {label} | {found['median_ratios'][name]:.3f} | {share:.3f} |" in text
