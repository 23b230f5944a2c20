"""README stays true: its commands run, its make targets exist, its figures stand in a record under docs/results/."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runner.bench.figures import ALL, figures

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [line.strip().partition("  #")[0].strip() for line in README.splitlines() if line.startswith("    ")]
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
    """In README's order, each using what the ones before have made; a chat gets its prompt through a pipe."""
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


def record(name: str) -> dict:
    found = sorted((ROOT / "docs" / "results").glob(f"*-{name}.json"))
    return json.loads(found[-1].read_text("utf-8"))


def test_figures_are_those_of_the_records() -> None:
    bench, steps, exact, vocab, shape = (record(name) for name in ("bench", "steps", "exact", "vocab", "llama"))
    sampled = record("exact-sampled")
    never, again, last, fixed = (figures(record(name))[ALL] for name in ("never", "never-128", "never-last", "fixed"))
    useless, creative = (figures(record(name))[ALL]["auto"] for name in ("useless", "creative"))
    (judged,) = (row for row in vocab["texts"] if row["text"].startswith("Spec-Bench"))
    wanted = [
        "| "
        + " | ".join(
            f"{value:.3f}"
            for value in (
                steps["median_ratios"][name],
                judged[f"{name} 16384"]["acceptance"] / judged["full"]["acceptance"],
                judged[f"{name} 16384"]["tau"] / judged["full"]["tau"],
            )
        )
        + " |"
        for name in ("trim", "context", "spec")
    ] + [
        f"{steps['bytes']['trim'] / steps['bytes']['full']:.3f}",
        f"takes {steps['median_ratios']['verify 4']:.2f} times",
        f"{exact['tokens']:,}",
        f"temperature {sampled['sampling']['temp']}, {len(sampled['prompts'])} prompts, {sampled['tokens']:,} tokens",
        f"{exact['greatest_gap']:.2f}",
        f"{exact['noise']:.2f}",
        f"{exact['parted']} of {len(exact['prompts'])}",
        bench["machine"]["date"],
        f"{bench['peers']['rows'][0]['ratio']} of `llama-bench`",
        "| {total:.2f} of plain in all, {least:.2f} at the least |".format(**never["auto"]["speedup_over_plain"]),
        "| {total:.2f} in all, {least:.2f} at the least |".format(**never["again"]["speedup_over_plain"]),
        "| {total:.2f} of plain in all, {least:.2f} at the least |".format(**again["auto"]["speedup_over_plain"]),
        "run | {total:.2f} in all, {least:.2f} at the least |".format(**again["again"]["speedup_over_plain"]),
        "| {total:.2f} of plain in all, {least:.2f} at the least (8 tokens".format(
            **last["auto"]["speedup_over_plain"]
        ),
        "run | {total:.2f} in all, {least:.2f} at the least |".format(**last["again"]["speedup_over_plain"]),
        f"temperature 1.2 | {creative['speedup_over_plain']['total']:.2f} |",
        "; ".join(f"{fixed[mode]['speedup_over_plain']['total']:.2f}" for mode in ("spec:1", "spec:3", "auto")) + " |",
        f"| auto with a drafter of scrambled weights | {useless['speedup_over_plain']['total']:.2f} |",
    ]
    for k in (16384, 32768):
        wanted += [f"{shape['median_ratios'][f'trim@{k}']:.3f}"]
        wanted += [f"{shape['bytes'][f'trim@{k}'] / shape['bytes']['full']:.3f}"]
    for mode, f in figures(bench)[ALL].items():
        speed = f["speedup_over_plain"]
        quartiles = "" if mode == "plain" else f" ({speed['low']:.2f} to {speed['high']:.2f})"
        wanted.append(f"| {speed['total']:.2f}{quartiles} | {f['mbsu_bytes']:.2f} |")
        wanted.append(f"| {f['tau']:.2f} | " + (f"{f['acceptance_rate']:.3f}" if f["drafted"] else "-"))
    for figure in wanted:
        assert figure in README, figure
    for checked in (exact, sampled):
        assert checked["replay_faults"] == checked["beyond_noise"] == 0


def test_every_file_it_names_is_there() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name


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
