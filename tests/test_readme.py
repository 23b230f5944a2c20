"""README and its pages stay true: commands run, make targets exist, figures stand in a record under docs/results/."""

from __future__ import annotations

import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runner.bench.figures import ALL, figures

from . import NO_SPINNING

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
MEASURED = (ROOT / "docs" / "measured.md").read_text("utf-8")
PAGES = dict.fromkeys(re.findall(r"\]\((docs/[\w-]+\.md)\)", README))  # as README links to them: a reader's order
TEXT = "\n".join([README, *((ROOT / page).read_text("utf-8") for page in PAGES)])
LINES = [line.strip().partition("  #")[0].strip() for line in TEXT.splitlines() if line.startswith("    ")]
SCRIPTS = {"gguf-trim": ".venv/bin/python -m gguf_trim", "gguf-run": ".venv/bin/python -m runner"}
LINES = [re.sub(r"^gguf-(trim|run)(?= )", lambda script: SCRIPTS[script[0]], line) for line in LINES]
COMMANDS = list(dict.fromkeys(LINES))
PYTHON = [line for line in COMMANDS if line.startswith(".venv/bin/python")]
MAKE = [line for line in COMMANDS if line.startswith("make ")]
RUN = [line for line in PYTHON if not re.search(r" --model | -hf |runner serve", line)]  # needs no network, and ends
QUICK = [line for line in RUN if "--types" not in line and "runner.bench" not in line]


@pytest.mark.parametrize("lines", [QUICK, pytest.param(RUN, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_commands_run(lines: list[str], tmp_path: Path, smollm2: Path) -> None:
    """In a reader's order, each using the files that earlier ones made; a chat gets its prompt through a pipe, and a
    question its yes.
    """
    for name in ("target.gguf", "drafter.gguf"):
        (tmp_path / name).symlink_to(smollm2)
    (tmp_path / "my-texts").mkdir()
    (tmp_path / "my-texts" / "a.txt").write_text("the king and the sea\n" * 200)
    (tmp_path / "few.json").write_text(json.dumps({"a": [list(range(100, 200)), list(range(300, 400))]}))
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **NO_SPINNING}
    for line in lines:
        if "runner.chat" in line:
            line += " -n 8" if "--target" in line else " --target target.gguf -n 8"  # the default pair is 1.6 GB
        if "gguf_trim speculator" in line:
            line += " --calibration few.json"  # SmolLM2 needs a minute to read the texts that ship
        arguments = [sys.executable, *shlex.split(line)[1:]]
        typed = "y\n" if line.endswith("--prune") else "Hello.\n"
        done = subprocess.run(arguments, cwd=tmp_path, input=typed, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)


@pytest.mark.parametrize("line", MAKE)
def test_make_knows_it(line: str) -> None:
    done = subprocess.run([*shlex.split(line), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def record_path(name: str) -> Path:
    """The newest record of a name."""
    return sorted((ROOT / "docs" / "results").glob(f"????-??-??-{name}.json"))[-1]


def record(name: str) -> dict:
    return json.loads(record_path(name).read_text("utf-8"))


REGIMES = {
    "f16": ("| memory | F16 |", "## The same in F16"),
    "shipped": ("| arithmetic | Q4_K_M |", "## The target as shipped"),
}  # the row of README's table, and the section of docs/measured.md
MODES = {
    "again": "plain decoding a second time",
    "full": "uncut drafter as shipped",
    "quant": "uncut drafter requantised",
    "first": "the first ids",
    "lookup": "prompt lookup, three drafts",
    "auto": "**auto, the default**",
}
EDITS = MODES | {"lookup": "prompt lookup", "pool": "pool"}
WAYS = ("full:3", "quant:3", "first:3", "spec:3", "lookup")  # the columns of README's table before auto
DRAFTS = {"": "", "1": ", one draft", "2": ", two drafts", "3": ", three drafts"}
DRAFTS |= {"4": ", four drafts", "5": ", five drafts", "7": ", seven drafts"}


def batch_of_four(bench: dict) -> float:
    """Median seconds of verifying three drafts, in plain steps."""
    seconds = {
        drafted: statistics.median(
            round_[4]
            for answer in bench["answers"]
            if answer["mode"] == mode and "error" not in answer
            for round_ in answer["rounds"]
            if round_[1] == drafted
        )
        for mode, drafted in (("plain", 0), ("spec:3", 3))
    }
    return seconds[3] / seconds[0]


def regime_row(bench: dict) -> str:
    found = figures(bench)[ALL]
    auto = found["auto"]["speedup_over_plain"]
    cells = [batch_of_four(bench), *(found[way]["speedup_over_plain"]["total"] for way in WAYS)]
    return " | ".join([*(f"{cell:.2f}" for cell in cells), f"**{auto['total']:.2f}** | {auto['overall']:.2f} |"])


STEPS = {"steps": "Qwen2.5-Coder-0.5B", "steps-gemma-3-270m": "Gemma 3 270M"}  # records, and the drafters in the pages
# Several clients, by the target's type: four of them, and one, two and eight.
OF_CLIENTS = ("clients", "clients-q4_0", "clients-f16")  # as shipped (Q4_K_M), in Q4_0, in F16
BY_CLIENTS = {"Q4_0": "clients-by-number-q4_0", "F16": "clients-by-number-f16"}
IN_LONG_SESSIONS = {"clients-long-q4_0": 2, "clients-long": 4, "clients-long-served": 4}  # how many clients
RECORDS = (
    *REGIMES,
    "exact",
    "exact-sampled",
    "bench",
    "never",
    "edits",
    "cold",
    "lengths",
    *OF_CLIENTS,
    *BY_CLIENTS.values(),
    *IN_LONG_SESSIONS,
    "clients-again",
    "steps-gemma-3-270m-iq4_nl",
    *STEPS,
)  # docs/measured.md's
VOCABS = {
    "full": "uncut, as shipped",
    "quant": "uncut, requantised",
    "trim": "trim: the kept rows only",
    "context": "context: and the tokens of the text",
    "spec": "spec: and the speculator's",
}


def step_row(steps: dict) -> str:
    """A line of README's table: draft steps, in those of the uncut drafter as shipped, and in those of the requantised
    one.
    """
    ratios = steps["median_ratios"]
    cells = [ratios[way] for way in ("quant", "trim", "spec")] + [
        ratios[way] / ratios["quant"] for way in ("trim", "spec")
    ]
    return " | ".join(f"{cell:.2f}" for cell in cells)


def step_rows(steps: dict) -> list[str]:
    """Lines of docs/measured.md: a draft step by vocabulary."""
    ratios, n_bytes = steps["median_ratios"], steps["bytes"]
    return [
        f"| {label} | {ratios[way]:.3f} | {ratios[way] / ratios['quant']:.3f} | {n_bytes[way] / n_bytes['full']:.3f} | "
        f"{steps['accepted'][way]['accepted'] / steps['accepted'][way]['drafted']:.3f} |"
        for way, label in VOCABS.items()
    ]


def python_ms(steps: dict, way: str) -> float:
    """Milliseconds of a draft step outside llama.cpp and ggml, the median."""
    both = zip(steps["seconds"][way], steps["engine_seconds"][way], strict=True)
    return 1000 * statistics.median(whole - inside for whole, inside in both)


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


def edit_row(mode: str, f: dict) -> str:
    """A line of the edits and rewrites."""
    speed = f["speedup_over_plain"]
    return (
        f"| {labelled(mode, EDITS)} | {f['tau']:.2f} | {f['acceptance_rate']:.3f} | "
        f"{speed['total']:.2f} ({speed['low']:.2f} to {speed['high']:.2f}) | {speed['overall']:.2f} |"
    )


def test_readme_has_the_figures_of_both_regimes() -> None:
    for name, (row, _) in REGIMES.items():
        assert f"\n{row} {regime_row(record(name))}\n" in README, name
    for name, drafter in STEPS.items():
        assert re.search(rf"^\| {drafter} \| [\d,]+ \| {re.escape(step_row(record(name)))} \|$", README, re.M), name
    f16, shipped = (figures(record(name))[ALL] for name in ("f16", "shipped"))
    assert f16["auto"]["tokens_per_second"] < shipped["plain"]["tokens_per_second"]  # both pages say so


@pytest.mark.parametrize("name", RECORDS)
def test_measured_links_to_the_newest_record(name: str) -> None:
    assert f"\n[{name}]: results/{record_path(name).name}\n" in MEASURED


def test_figures_are_those_of_the_records() -> None:
    """docs/measured.md against its records."""
    exact, sampled, bench, never = (record(name) for name in ("exact", "exact-sampled", "bench", "never"))
    steps = record("steps")
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
    for name, drafter in STEPS.items():
        wanted += [f"### {drafter}", *step_rows(record(name))]
    wanted.append(
        f"Python takes {python_ms(steps, 'trim'):.2f} ms of a step of trim and {python_ms(steps, 'spec'):.2f} of one"
    )
    small = record("steps-gemma-3-270m-iq4_nl")
    right = [small["accepted"][way]["accepted"] / small["accepted"][way]["drafted"] for way in ("full", "spec")]
    trim, spec = (small["median_ratios"][way] for way in ("trim", "spec"))
    text = f"a step of trim takes {trim:.3f} of an uncut one and one of spec {spec:.3f} (first drafts accepted: "
    text += f"uncut {right[0]:.3f}, spec {right[1]:.3f};"
    assert text in " ".join(MEASURED.split())
    for figure in wanted:
        assert figure in MEASURED, figure
    for name, (_, heading) in REGIMES.items():
        for mode, f in figures(record(name))[ALL].items():
            assert mode == "plain" or mode_row(mode, f) in section(MEASURED, heading), (name, mode)
    for mode, f in figures(record("lengths"))[ALL].items():
        assert mode == "plain" or mode_row(mode, f) in section(MEASURED, "## Other draft lengths"), mode
    for mode, f in figures(record("edits"))[ALL].items():
        assert mode == "plain" or edit_row(mode, f) in section(MEASURED, "## Edits and rewrites"), mode
    assert cold_ratios(record("cold")["sessions"]) in " ".join(MEASURED.split())
    for checked in (exact, sampled):
        assert checked["replay_faults"] == checked["beyond_noise"] == 0


def cold_ratios(sessions: list[dict]) -> str:
    """Tokens per second of each cold session in those of the warm one after it, from the second answer on."""
    speeds = {
        (session["turn"], session["kind"]): sum(row["n"] for row in session["rows"][1:])
        / sum(row["wall"] for row in session["rows"][1:])
        for session in sessions
    }
    turns = sorted({turn for turn, _ in speeds})
    return "had " + " and ".join(f"{speeds[turn, 'cold'] / speeds[turn, 'warm']:.3f}" for turn in turns) + " of"


WAYS_FOR_CLIENTS = {
    "plain": "in the program, plainly",
    "1": "in the program, one draft",
    "3": "in the program, three drafts",
    "auto": "**in the program, auto**",
    "before": "server that answers one at a time, auto",
    "served-plain": "server, plainly",
    "served": "**server, auto**",
    "llama-server": "llama-server",
    "llama-server-draft": "llama-server with the uncut drafter",
}


def of_clients(found: dict, mode: str, n: int = 4) -> tuple[float, float]:
    """Tokens per second of all clients, and seconds in which 95 of 100 answers had a first token."""
    same = [run for run in found["runs"] if (run["mode"], run["clients"]) == (mode, n)]
    firsts = [second for run in same for second in run["first"]]
    return sum(run["tokens"] for run in same) / sum(run["seconds"] for run in same), float(np.quantile(firsts, 0.95))


def clients_rows() -> list[str]:
    """Four clients: tokens per second by target, and the wait in the first of them, in units of one at a time."""
    founds, rows = [record(name) for name in OF_CLIENTS], []
    units = [of_clients(found, "before") for found in founds]
    for mode, label in WAYS_FOR_CLIENTS.items():
        ways = [of_clients(found, mode) for found in founds]
        cells = [speed / unit for (speed, _), (unit, _) in zip(ways, units, strict=True)]
        rows.append("| " + " | ".join([label, *(f"{cell:.2f}" for cell in [*cells, ways[0][1] / units[0][1]])]) + " |")
    return rows


def number_rows() -> list[str]:
    """Tokens per second by the number of clients, in units of one client's plain decoding."""
    rows = []
    for type_, name in BY_CLIENTS.items():
        found = record(name)
        unit, _ = of_clients(found, "plain", 1)
        for n in (1, 2, 8):
            cells = [of_clients(found, mode, n)[0] / unit for mode in ("plain", "1", "3", "auto")]
            rows.append(f"| {type_} | {n} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return rows


def long_rows() -> list[str]:
    """Tokens per second of 48 answers by their ways, in units of plain decoding in the program, of the same record."""
    founds, rows = [(record(name), n) for name, n in IN_LONG_SESSIONS.items()], []
    for mode in ("1", "3", "auto", "served-plain", "served", "llama-server"):
        cells = [
            f"{of_clients(found, mode, n)[0] / of_clients(found, 'plain', n)[0]:.2f}"
            if any(run["mode"] == mode for run in found["runs"])
            else "-"
            for found, n in founds
        ]
        rows.append("| " + " | ".join([WAYS_FOR_CLIENTS[mode], *cells]) + " |")
    return rows


def test_measured_says_how_several_clients_were_answered() -> None:
    part = section(MEASURED, "## Several clients")
    for row in (*clients_rows(), *number_rows(), *long_rows()):
        assert row in part, row
    again = record("clients-again")
    words = "auto {}; server, plainly {}; server, auto {}; llama-server {}; record: [clients-again]"
    ways = [of_clients(again, mode)[0] for mode in ("auto", "served-plain", "served", "llama-server")]
    assert words.format(*(f"{way / of_clients(again, 'plain')[0]:.2f}" for way in ways)) in " ".join(part.split())


def test_the_guide_promises_what_was_measured() -> None:
    """docs/guide.md: the pair by its shape, the default pair, and four clients of a server."""
    text = " ".join((ROOT / "docs" / "guide.md").read_text("utf-8").split())
    points = record("shape-qwen3.5-4b-Q4_K_M")["paying"]["trim"]["at"]
    assert [point["acceptance"] for point in points] == [0.6, 0.7, 0.8]
    speedups = [f"{point['speedup_over_plain']:.2f}" for point in points]
    assert "{}, {} and {} times plain decoding".format(*speedups) in text
    autos = [figures(record(name))[ALL]["auto"]["speedup_over_plain"]["total"] for name in ("shipped", "f16")]
    assert "{:.2f} in Q4_K_M and {:.2f} in F16".format(*autos) in text
    found = record("clients")
    ours, one = (of_clients(found, mode)[0] for mode in ("served", "before"))
    eight, many = (
        "{:.2f}".format(of_clients(record(name), "served")[0] / of_clients(record(name), "llama-server")[0])
        for name in ("clients-again", "clients-long-served")
    )
    assert f"{ours / one:.2f} times the tokens per second of one conversation after another" in text
    assert f"{eight} times its tokens per second in eight answers, and {many} times in 48" in text
    assert f"| {ours / one:.2f} with four clients |" in text


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
