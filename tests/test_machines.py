"""Reports of machines: they say what the records say, hold no path, and docs/machines.md shows those that are here."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llamabase.errors import FileFormatError, TrimError
from runner.bench import __main__ as bench
from runner.bench import card
from runner.bench.figures import ALL, figures

ROOT = Path(__file__).parent.parent
REPORTS = sorted((ROOT / "docs" / "results").glob("*-machine-*.json"))
PLANTED = ("/home/ann/models", "C:\\Users\\ann", "~/models", "models/ann", "mine.gguf")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(bench.main, list(map(str, arguments)))


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.bench.machine.COPIED", 16 << 20)


@pytest.fixture(scope="module")
def records(toys, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A record of `steps` and one of `run`."""
    folder = tmp_path_factory.mktemp("records")
    (folder / "p.jsonl").write_text(json.dumps({"id": "p", "prompt": "the sea"}))
    pair = ["--target", toys["target"], "--draft", toys["spec-trimmed"], "--full", toys["target"], "-t", 1, "-c", 256]
    steps, run = folder / "steps.json", folder / "run.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runner.bench.machine.COPIED", 16 << 20)
        assert invoke("steps", *pair, "--repeat", 2, "-o", steps).exit_code == 0
        done = invoke("run", *pair, "--prompts", folder / "p.jsonl", "-n", 6, "--modes", "plain,trim,auto", "-o", run)
        assert done.exit_code == 0, done.output
    return [steps, run]


def test_a_report_says_what_the_records_say(records: list[Path], tmp_path: Path) -> None:
    done = invoke("report", *records, "-o", tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == report
    assert (tmp_path / "r.json").stat().st_size < card.MOST
    steps, run = (json.loads(path.read_text()) for path in records)
    found = report["steps"][0]
    assert (found["target"], found["drafter"], found["random_weights"]) == ("target", "target", False)
    assert found["drafts"].keys() == steps["paying"].keys()
    for name, draft in found["drafts"].items():
        assert draft["ms"] == pytest.approx(1000 * statistics.median(steps["seconds"][name]), abs=1e-4)
        assert draft["time"] == pytest.approx(steps["median_ratios"][name], abs=1e-4)
    assert found["verify"]["4"] == pytest.approx(steps["median_ratios"]["verify 4"], abs=1e-4)
    auto = report["runs"][0]["modes"]["auto"]
    assert auto["tokens_per_second"] == pytest.approx(figures(run)[ALL]["auto"]["tokens_per_second"], abs=1e-4)
    assert report["report_of"]["cpu"] == run["machine"]["cpu"] and report["report_of"]["ggml"]
    shown = done.stdout.rpartition("\n{")[0]
    assert f"| auto  | {auto['tau']:.2f} |" in shown and "| target + target  | spec " in shown
    again = invoke("report", tmp_path / "r.json")
    assert again.stdout == done.stdout


def test_paths_in_files_names_are_left_out(records: list[Path], tmp_path: Path) -> None:
    record = json.loads(records[0].read_text()) | {"target": "C:\\Users\\ann\\a.gguf", "full": "/home/ann/b-1.5.gguf"}
    report = card.report_of([record], "x")
    assert (report["steps"][0]["target"], report["steps"][0]["drafter"]) == ("a", "b-1.5")


@pytest.mark.parametrize("planted", PLANTED)
def test_a_path_elsewhere_is_refused(records: list[Path], tmp_path: Path, planted: str) -> None:
    """In any string of a record that a report shows, and in any string of a report, keys too."""
    steps, run = (json.loads(path.read_text()) for path in records)
    for place in ({"cpu": planted}, {"system": planted}, {"gpus": [planted]}, {"backends": {planted: ""}}):
        path = tmp_path / "planted.json"
        path.write_text(json.dumps(steps | {"machine": steps["machine"] | place}))
        done = invoke("report", path)
        assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
        assert "planted.json: a report would show " in done.stderr and "may be a path" in done.stderr
        assert done.stdout == ""
    report = card.report_of([steps, run], "x")
    for changed in (report | {planted: 1}, report | {"note": ["fine", {"by": planted}]}):
        with pytest.raises(TrimError, match="may be a path"):
            card.checked(changed, "x")


def test_what_is_no_record_is_refused(records: list[Path], tmp_path: Path) -> None:
    steps, path = json.loads(records[0].read_text()), tmp_path / "x.json"
    for text in ("", "{}", "[]", '{"report_of": {}}', json.dumps(steps | {"seconds": {}}), "GGUF"):
        path.write_text(text)
        with pytest.raises(FileFormatError, match=r"x\.json: holds no record of steps or of a benchmark; make one"):
            card.reports([path])
    path.write_text(json.dumps(steps | {"machine": steps["machine"] | {"cpu": "another"}}))
    with pytest.raises(TrimError, match="were measured on different machines; make a report of each"):
        card.reports([records[1], path])
    with pytest.raises(TrimError, match="at most 50,000 can be posted; give fewer"):
        card.report_of([steps] * 200, "x")


def test_a_pair_is_measured_if_no_record_is_given(toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TURNS", "PROMPTS"):
        monkeypatch.setattr(bench, name, 1)
    monkeypatch.setattr(bench, "TOKENS", 4)
    pair = ["--target", toys["target"], "--draft", toys["spec-trimmed"], "--full", toys["target"], "-t", 1]
    done = invoke("report", *pair, "-o", tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert list(report["runs"][0]["modes"]) == bench.MODES and report["steps"][0]["verify"]["2"] > 0


def test_the_page_shows_every_report() -> None:
    """And every one can be posted. `python -m runner.bench report docs/results/*-machine-*.json` prints the blocks."""
    found = card.reports(REPORTS)
    assert len(found) == len(REPORTS) >= 2
    assert (ROOT / "docs" / "machines.md").read_text("utf-8").endswith("\n\n".join(map(card.block, found)) + "\n")
    assert all(path.stat().st_size <= card.MOST for path in REPORTS)


def test_the_page_of_exactness_says_what_the_probe_found() -> None:
    text = (ROOT / "docs" / "exact.md").read_text("utf-8")
    probes = sorted((ROOT / "docs" / "results").glob("*-probe-*.json"))
    assert probes
    for path in probes:
        batches = json.loads(path.read_text("utf-8"))["batches"]
        equal = [row["batch"] for row in batches if row["equal"] == row["rows"]]
        other, rows = (sum(row[key] for row in batches) for key in ("other_best", "rows"))
        greatest = max(row["greatest"] for row in batches)
        assert f"| 1 to {equal[-1]} | {greatest:.1%} | {other} of {rows:,} | [record](results/{path.name}) |" in text
        assert equal == list(range(1, equal[-1] + 1))
