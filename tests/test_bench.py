"""The benchmark on toy models: every figure can be reckoned again from the raw rounds, and nothing measured is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf.constants import GGMLQuantizationType as Quant

from corpus.prompts import Prompt
from gguf_trim.cut import lay_out, write
from gguf_trim.format.companion import Trimmed
from gguf_trim.format.memory_bound import step_bytes
from gguf_trim.pairs.prepare import Prepared
from gguf_trim.pairs.rivals import best_uncut, cut_to_first
from gguf_trim.pairs.shapes import SHAPES, Shape
from llamabase.errors import EngineError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import head_tensor
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.quantize import quantize, tensor_types
from runner.bench import __main__ as bench
from runner.bench import demo, figures, peers, runs, steps
from runner.bench.demo import verdict
from runner.bench.figures import ALL
from runner.bench.machine import bandwidth, machine
from runner.bench.modes import KINDS, Files, names_of, with_rivals
from runner.draft.lookup import LookupDrafter
from runner.loop import engine
from runner.options import Models

from .conftest import copy_trimmed, keep_spread
from .terminal import Terminal

ROOT = Path(__file__).parent.parent
MODES = ["plain", "full", "trim", "context", "spec", "lookup", "pool", "auto"]


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth of memory is in every record; how much is copied to find it is all one here."""
    monkeypatch.setattr("runner.bench.machine.COPIED", 16 << 20)


@pytest.fixture(autouse=True)
def few_answers(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A type is chosen by four answers here, and what is requantised does not go into the user's own cache."""
    monkeypatch.setattr("gguf_trim.fit.calibrate.CONVERSATIONS", 8)
    monkeypatch.setattr("gguf_trim.pairs.rivals.cache_folder", lambda: tmp_path_factory.mktemp("cache"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two tasks, one of them in two turns as MT-Bench is."""
    lines = [
        {"question_id": 1, "category": "writing", "turns": ["the sea and the tea and the sea", "on and on and on"]},
        {"question_id": 2, "category": "qa", "turns": ["is it in the sea"]},
        {"question_id": 3, "category": "qa", "turns": ["and the tea in the tea"]},
    ]
    path = tmp_path / "question.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def arguments(toys: dict[str, Path], prompts: Path) -> list[str]:
    files = ["--target", str(toys["target"]), "--draft", str(toys["spec-trimmed"]), "--full", str(toys["target"])]
    return ["run", *files, "--prompts", str(prompts), "-n", "12", "-c", "256"]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(bench.main, list(arguments))


def record_of(done: Result) -> dict:
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_every_mode_answers_every_turn(arguments: list[str], tmp_path: Path) -> None:
    done = invoke(*arguments, "-o", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png"), "--repeat", "2")
    record = record_of(done)
    assert record["settings"]["modes"] == MODES
    keys = [(a["prompt"], a["turn"], a["repeat"], a["mode"]) for a in record["answers"]]
    turns = [("1", 0), ("1", 1), ("2", 0), ("3", 0)]
    assert sorted(keys) == sorted((p, t, again, mode) for p, t in turns for again in (0, 1) for mode in MODES)
    assert not any("error" in answer for answer in record["answers"])
    assert json.loads((tmp_path / "r.json").read_text()) == record
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert {a["task"] for a in record["answers"]} == {"mt_bench", "qa"}
    tables = done.stdout.splitlines()[:-1]
    assert max(map(len, tables)) <= 100
    first = [line.split("|")[1].strip() for line in tables if line.startswith("| ")]
    assert [name for name in first if set(name) != {"-"}] == ["mode", *MODES, "x plain", *MODES]
    assert record["figures"] == json.loads(json.dumps(figures.figures(record)))
    drawn = {mode: found["vocab"] for mode, found in record["modes"].items()}
    own = {mode: mode for mode in ("full", "trim", "context", "spec")}
    assert drawn == dict.fromkeys(MODES) | own | {"auto": "spec"}
    assert "auto drafts from the vocabulary spec." in tables
    # The toy is F32: every mode says the same.
    texts = {(a["prompt"], a["turn"]): a["token_ids"] for a in record["answers"]}
    assert all(texts[a["prompt"], a["turn"]] == a["token_ids"] for a in record["answers"])


def test_figures_agree_with_an_independent_count(arguments: list[str], toys: dict[str, Path]) -> None:
    record = record_of(invoke(*arguments))
    found = figures.figures(record)
    for mode in MODES:
        rounds = [r for a in record["answers"] if a["mode"] == mode for r in a["rounds"]]
        tokens = sum(len(a["token_ids"]) for a in record["answers"] if a["mode"] == mode)
        f = found[ALL][mode]
        assert f["tokens"] == tokens == sum(r[0] for r in rounds)
        assert f["tau"] == pytest.approx(tokens / len(rounds))
        drafted, accepted = sum(r[1] for r in rounds), sum(r[2] for r in rounds)
        assert f["acceptance_rate"] == (pytest.approx(accepted / drafted) if drafted else None)
        if f["acceptance_by_position"]:
            first = [r for r in rounds if r[1] >= 1]
            assert f["acceptance_by_position"][0] == pytest.approx(sum(r[2] >= 1 for r in first) / len(first))
        seconds = sum(sum(r[3:]) for r in rounds)
        assert f["tokens_per_second"] == pytest.approx(tokens / seconds)
        plain = [a for a in record["answers"] if a["mode"] == "plain"]
        slow = sum(sum(r[3:]) for a in plain for r in a["rounds"]) / sum(len(a["token_ids"]) for a in plain)
        assert f["speedup_over_plain"]["total"] == pytest.approx(slow * tokens / seconds)
        assert f["share_of_ceiling"] == pytest.approx(f["speedup_over_plain"]["total"] / f["mbsu_bytes"])
    for mode, drafter in (("full", "target"), ("trim", "spec-trimmed")):
        f, c = found[ALL][mode], step_bytes(GGUFFile(toys[drafter])) / step_bytes(GGUFFile(toys["target"]))
        assert c == 1 if mode == "full" else c < 0.9
        assert f["mbsu_bytes"] == pytest.approx(f["tau"] / (c * f["drafted"] / f["rounds"] + 1))
    assert found[ALL]["plain"]["mbsu_bytes"] == found[ALL]["plain"]["speedup_over_plain"]["total"] == 1.0
    assert found[ALL]["plain"]["tau"] == 1.0
    # A full head drafts as the target itself would, so every draft is right.
    assert found[ALL]["full"]["acceptance_rate"] == 1.0
    assert found[ALL]["trim"]["mbsu_bytes"] != found[ALL]["spec"]["mbsu_bytes"]


def test_pool_drafts_from_earlier_answers_alone(arguments: list[str], prompts: Path, tmp_path: Path) -> None:
    """Not from one that it repeats, and also if the run that gave them was cut off."""
    line = {"question_id": 1, "category": "qa", "turns": ["is it in the sea"]}
    prompts.write_text("\n".join(json.dumps(line | {"question_id": i}) for i in (1, 2)))
    path = tmp_path / "r.json"
    run = [*arguments, "--modes", "plain,lookup,pool:8", "--repeat", "2", "-o", str(path)]
    record = record_of(invoke(*run))
    calls = {(a["prompt"], a["repeat"], a["mode"]): len(a["rounds"]) for a in record["answers"]}
    assert calls["1", 0, "pool:8"] == calls["1", 1, "pool:8"] == calls["1", 0, "lookup"] == calls["2", 0, "lookup"]
    assert calls["2", 0, "pool:8"] == calls["2", 1, "pool:8"] < calls["1", 0, "pool:8"]
    del record["answers"][6:], record["figures"]
    path.write_text(json.dumps(record | {"missing": 6}))
    again = record_of(invoke(*run))["answers"]
    assert {(a["prompt"], a["repeat"], a["mode"]): len(a["rounds"]) for a in again} == calls


def test_prices_leave_hiccups_out() -> None:
    """A round is [tokens, drafted, accepted, draft, verify, host seconds]; prompt b sees too few of its batches."""

    def answer(prompt: str, mode: str, rounds: list[list[float]]) -> dict:
        return {
            "prompt": prompt,
            "turn": 0,
            "mode": mode,
            "rounds": rounds,
            "token_ids": [0] * int(sum(r[0] for r in rounds)),
        }

    plain = [
        answer(name, "plain", [[1, 0, 0, 0, one, 0]] * 9 + [[1, 0, 0, 0, 50, 0]]) for name, one in (("a", 1), ("b", 2))
    ]
    a = answer("a", "auto", [[2, 1, 1, 0.1, 1.5, 0]] * 9 + [[2, 1, 1, 0.1, 50, 0]])
    b = answer("b", "auto", [[2, 1, 1, 0.2, 50, 0]])
    everything = [*plain, a, b]
    found = figures.priced([a, b], everything)
    of_a, of_b = 20 / (10 * 1.6), 2 * 2 / (2 * 1.5 / 2 + 0.2)  # in the record a batch of two takes 1.5, of one 2
    assert found["least"] == pytest.approx(min(of_a, of_b))
    assert found["total"] == pytest.approx((20 + 4) / (16 + 1.7))
    assert figures.priced(plain, everything) == {"total": 1.0, "least": 1.0}


def test_parts_add_up_to_the_wall(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock around an answer and the sum of its parts; time that is in none of them is seen."""

    def adds_up() -> bool:
        found = figures.figures(record_of(invoke(*arguments, "--modes", "plain,spec")))[ALL]
        return all(abs(f["unaccounted"]) < 0.1 for f in found.values())  # of 5 ms; 2 % on real answers

    assert any(adds_up() for _ in range(5))  # a busy machine may well come in between
    generate = engine.generate

    def dawdling(*args, **settings):
        for round_ in generate(*args, **settings):
            yield round_
            time.sleep(0.01 + 2 * (round_.draft_seconds + round_.verify_seconds + round_.host_seconds))

    monkeypatch.setattr(engine, "generate", dawdling)
    found = figures.figures(record_of(invoke(*arguments, "--modes", "plain")))[ALL]
    assert found["plain"]["unaccounted"] > 0.3


def test_interrupted_anywhere_it_goes_on(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in any answer: what was measured is there, what is missing is said, the same command goes on."""
    path = tmp_path / "r.json"
    answer, calls = runs.answer, 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            raise KeyboardInterrupt
        return answer(*args)

    monkeypatch.setattr(runs, "answer", interrupted)
    total = 4 * 3
    for kept in (3, 6, 9):
        done = invoke(*arguments, "--modes", "plain,trim,lookup", "-o", str(path))
        assert done.exit_code == 130, done.output
        record = json.loads(path.read_text())
        assert (len(record["answers"]), record["missing"]) == (kept, total - kept)
        assert f"{total - kept} answers are missing" in done.stdout
    record = record_of(invoke(*arguments, "--modes", "plain,trim,lookup", "-o", str(path)))
    assert len(record["answers"]) == total
    assert "missing" not in record
    assert calls == total + 3
    other = invoke(*arguments, "--modes", "plain", "-o", str(path))
    assert other.exit_code == 1
    assert isinstance(other.exception, SystemExit)
    assert len(json.loads(path.read_text())["answers"]) == total


def test_killed_it_has_what_it_measured(arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    command = [sys.executable, "-m", "runner.bench", *arguments, "--repeat", "400", "-o", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (path.exists() and len(json.loads(path.read_text())["answers"]) > 5):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(json.loads(path.read_text())["answers"]) > 5


def test_a_mode_that_fails_is_named_and_the_others_go_on(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    draft = LookupDrafter.draft
    count = 0

    def failing(self, text, *args):
        nonlocal count
        count += 1
        if count == 2:
            raise EngineError("the toy broke")
        return draft(self, text, *args)

    monkeypatch.setattr(LookupDrafter, "draft", failing)
    done = invoke(*arguments, "--modes", "plain,lookup")
    record = record_of(done)
    assert [a["mode"] for a in record["answers"] if "error" in a] == ["lookup"]
    assert len(record["answers"]) == 8
    assert "lookup: failed on 1 answers" in done.stdout
    assert "the toy broke" in done.stdout
    assert figures.figures(record)[ALL]["lookup"]["answers"] == 3


def test_a_prompt_too_long_is_a_failure_not_a_silence(arguments: list[str], prompts: Path) -> None:
    prompts.write_text(json.dumps({"prompt": "the sea " * 200}) + "\n" + json.dumps({"prompt": "tea"}))
    record = record_of(invoke(*arguments, "--modes", "plain,full"))
    assert ["error" in a for a in record["answers"]] == [True, True, False, False]


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        (["--tasks", "rag"], 1, "there is no task rag; there are mt_bench, qa"),
        (["--spec-bench", "auto"], 2, "--prompts or --spec-bench"),
        (["--modes", "plane"], 2, "plane"),
        (["--llama-cpp", "/nowhere"], 1, "/nowhere: holds no llama-bench"),
        (["-o", "/dev/zero"], 1, "/dev/zero: is a folder or a device"),
        (["-o", "PROMPTS"], 1, "holds no record of a benchmark"),
    ],
)
def test_wrong_use(arguments: list[str], prompts: Path, extra: list[str], code: int, words: str) -> None:
    before = prompts.read_text()
    command = [*arguments, *(str(prompts) if word == "PROMPTS" else word for word in extra)]
    done = subprocess.run(
        [sys.executable, "-m", "runner.bench", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert words in " ".join(done.stderr.split())
    assert prompts.read_text() == before


def test_compare(arguments: list[str], tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    record_of(invoke(*arguments, "--modes", "plain,trim", "-o", str(a)))
    assert arguments[5] == "--full"  # a file that no mode in common uses
    record_of(invoke(*arguments[:5], *arguments[7:], "--modes", "trim,spec", "-o", str(b)))
    done = invoke("compare", str(a), str(b))
    assert done.exit_code == 0, done.output
    assert "differ" not in done.stdout
    assert "| trim" in done.stdout
    assert {line.count("|") for line in done.stdout.splitlines() if line.startswith("|")} == {6}
    assert "| spec" not in done.stdout
    a.write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "runner.bench", "compare", str(a), str(b)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "holds no record of a benchmark" in done.stderr


def test_damaged_records_are_refused_and_left_alone(arguments: list[str], tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.json", tmp_path / "a.json"
    record = record_of(invoke(*arguments, "--modes", "plain", "-o", str(whole)))
    for damage in (
        {"answers": 5},
        {"answers": [{}]},
        {"answers": [None]},
        {"answers": [{**record["answers"][0], "rounds": [[1]]}]},
        {"modes": []},
        {"files": None},
        {"machine": []},
    ):
        path.write_text(json.dumps(record | damage))
        before = path.read_bytes()
        for command in ((*arguments, "--modes", "plain", "-o", str(path)), ("compare", str(whole), str(path))):
            done = invoke(*command)
            assert done.exit_code == 1, damage
            assert "a.json: holds no record of a benchmark" in " ".join(done.stderr.split())
        assert path.read_bytes() == before


def test_steps(toys: dict[str, Path], tmp_path: Path) -> None:
    files = ["--target", str(toys["target"]), "--draft", str(toys["spec-trimmed"]), "--full", str(toys["target"])]
    (tmp_path / "tau.json").write_text(json.dumps({"draft_max": 3, "tau": {"full": 3.0, "trim": 2.5}}))
    done = invoke(
        "steps", *files, "--rivals", "--repeat", "3", "--acceptance", str(tmp_path / "tau.json"),
        "-o", str(tmp_path / "s.json"),
    )  # fmt: skip
    record = record_of(done)
    assert {"full", "trim", "context", "spec", "head full", "verify 1", "verify 16"} <= record["seconds"].keys()
    assert all(len(found) == 3 for found in record["seconds"].values())
    assert record["bytes"]["full"] == step_bytes(GGUFFile(toys["target"]))
    assert record["bytes"]["trim"] == step_bytes(GGUFFile(toys["spec-trimmed"]))
    assert record["bytes"]["trim"] <= record["bytes"]["context"] < record["bytes"]["spec"]
    assert record["paying"].keys() == {"full", "quant", "trim", "context", "spec"}
    assert (record["full"], record["trimmed"]) == ("target.gguf", ["spec.gguf"])
    assert record["quant"] == "target.gguf" or re.fullmatch(r"target-[0-9a-f]{8}-[+\w]+\.gguf", record["quant"])
    assert "accepted" not in record
    assert record["paying"] == steps.paying(record)
    assert "| pays from" in done.stdout
    assert "With the acceptance of tau.json" in done.stdout
    assert json.loads((tmp_path / "s.json").read_text())["bytes"] == record["bytes"]


def test_steps_with_answers_count_what_is_accepted(toys: dict[str, Path]) -> None:
    files = ["--target", str(toys["target"]), "--draft", str(toys["good-trimmed"]), "--full", str(toys["target"])]
    done = invoke("steps", *files, "--repeat", "1", "--answers", "2")
    assert "quant" not in record_of(done)["seconds"]
    counts = record_of(done)["accepted"]
    assert counts.keys() >= {"full", "trim"}
    assert 0 < counts["full"]["drafted"] == counts["full"]["accepted"]  # the target itself
    header, _, first, *_ = done.stdout.splitlines()
    assert header.split("|")[-2].strip() == "accepted" and first.split("|")[-2].strip() == "1.000"


def test_rivals_run_beside_the_cut(arguments: list[str], toys: dict[str, Path], tmp_path: Path) -> None:
    """First: as many rows as the trimmed drafter's, the lowest ids beside the forced ones, in its types."""
    trimmed = copy_trimmed(toys["good-trimmed"], tmp_path / "t.gguf")
    types = tensor_types(trimmed) | {"blk.0.ffn_up.weight": Quant.Q4_0, "output.weight": Quant.IQ4_NL}
    quantize(trimmed, trimmed, "Q8_0", types)
    arguments[4] = str(trimmed)
    record = record_of(invoke(*arguments, "--modes", "plain,quant:2,first:2,trim:2"))
    assert record["settings"]["modes"] == ["plain", "quant:2", "first:2", "trim:2"]
    files = record["files"]
    assert [file["file"] for file in files["first"]] == ["target-first405.gguf"]
    assert files["first"][0]["types"] == files["trimmed"][0]["types"]
    assert files["first"][0]["types"].keys() >= {"Q4_0", "IQ4_NL"}
    assert files["quant"][0]["file"].startswith("target")
    texts = {(a["prompt"], a["turn"]): a["token_ids"] for a in record["answers"]}
    assert all(texts[a["prompt"], a["turn"]] == a["token_ids"] for a in record["answers"])
    assert all(record["figures"][ALL][mode]["drafted"] for mode in ("quant:2", "first:2"))
    assert record["modes"]["first:2"]["step"] == record["modes"]["trim:2"]["step"]  # the kept rows alone


def test_the_first_rows_are_the_forced_and_the_lowest_ids(toys: dict[str, Path], tmp_path: Path) -> None:
    counted = tmp_path / "counted.gguf"
    write(lay_out(toys["target"], keep_spread(320)), counted)
    first = Trimmed.open(cut_to_first(toys["target"], counted, tmp_path))
    forced = Vocabulary(GGUFFile(toys["target"])).forced
    others = np.setdiff1d(first.d2t, forced)
    assert len(first.d2t) == 320 and np.isin(forced, first.d2t).all()
    assert others.tolist() == np.setdiff1d(np.arange(600), forced)[: len(others)].tolist()


def test_rivals_need_an_uncut_drafter_that_reads_text(toys: dict[str, Path], tmp_path: Path, capfd) -> None:
    files = Files(toys["target"], None, {"": toys["good-trimmed"]})
    assert with_rivals(files, ["plain", "trim"], tmp_path) == files
    assert names_of(["plain", "quant:3", "first"], with_rivals(files, ["quant:3", "first"], tmp_path)) == ["plain"]
    assert "quant and first: left out" in capfd.readouterr().err


def test_the_best_uncut_drafter_is_measured_once_and_kept(toys: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("gguf_trim.pairs.rivals.cache_folder", lambda: tmp_path)
    monkeypatch.setattr("llamabase.store.memory_file", lambda: tmp_path / "remembered.sqlite")
    measured = []

    def chosen(target: Path, drafter: Path, folder: Path) -> str:
        measured.append(drafter)
        return "Q4_0+HEAD"

    monkeypatch.setattr("gguf_trim.pairs.rivals.quickest_uncut", chosen)
    path = best_uncut(toys["target"], toys["wrong"])
    assert tensor_types(path)["output.weight"] == Quant.Q4_0
    assert best_uncut(toys["target"], toys["wrong"]) == path
    path.unlink()
    assert best_uncut(toys["target"], toys["wrong"]) == path and path.is_file()
    assert [kept.name for kept in (tmp_path / "requantised").iterdir()] == [path.name]
    assert len(measured) == 1


def test_steps_of_a_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tables of different length, as Gemma 3 has; gigabytes go where TMPDIR says, and do not stay there."""
    for name, layers, n_vocab in (("big", 4, 4128), ("little", 1, 4096)):
        shape = Shape(name, "llama", n_vocab, 512, layers, 8, 2, 64, 768, True)
        monkeypatch.setitem(SHAPES, name, shape)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    folders = []

    def seen(files: Files, *args) -> dict:
        folders.append(files.target.parent)
        return steps.time_steps(files, *args)

    monkeypatch.setattr(bench, "time_steps", seen)
    record = record_of(invoke("steps", "--shape", "big+little", "--k", "512,1024", "--repeat", "2"))
    assert {"full", "trim@512", "trim@1024"} == record["paying"].keys() <= record["seconds"].keys()
    assert record["bytes"]["trim@512"] < record["bytes"]["trim@1024"] < record["bytes"]["full"]
    assert [folder.parent for folder in folders] == [tmp_path]
    assert list(tmp_path.iterdir()) == []


def test_unknown_shape() -> None:
    with pytest.raises(steps.FileFormatError, match=r"not a target\+drafter of known shapes; choose from llama-3.2-1b"):
        steps.shaped("llama+llama", "Q8_0", [8], Path())


def test_a_selection_has_every_task() -> None:
    prompts = [Prompt(str(i), task, []) for task in ("qa", "rag", "qa2") for i in range(10)]
    chosen = list(runs.chosen(prompts, [], 7))
    assert [sum(p.task == task for p in chosen) for task in ("qa", "rag", "qa2")] == [3, 2, 2]
    assert [p.id for p in chosen][:3] == ["0", "3", "6"]
    assert len(list(runs.chosen(prompts, ["rag"], 99))) == 10


def test_machine_card() -> None:
    card = machine()
    assert card["cpu"]
    assert card["cores"] >= 1
    assert "CPU" in card["backends"]
    assert 1e8 < bandwidth(1) < 1e13


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no folder of llama.cpp's tools")
def test_peers(arguments: list[str]) -> None:
    record = record_of(invoke(*arguments, "--modes", "plain", "--llama-cpp", os.environ["LLAMA_CPP"]))
    plain, speculative = record["peers"]["rows"]
    assert plain["tokens_per_second"] > 0
    assert speculative["tau"] > 1


def test_what_peers_say_is_read(arguments: list[str], tmp_path: Path) -> None:
    """Stand-ins that say what llama.cpp's tools say; 12 tokens with 6 drafts accepted are 6 rounds."""
    said = {
        peers.BENCH: '[{"avg_ts": 30.0}]',
        peers.SPECULATIVE: "decoded   12 tokens in    2.0 seconds\nn_drafted = 9\nn_accept  = 6",
    }
    for name, text in said.items():
        (tmp_path / name).write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        (tmp_path / name).chmod(0o755)
    done = invoke(*arguments, "--modes", "plain", "--llama-cpp", str(tmp_path))
    plain, speculative = record_of(done)["peers"]["rows"]
    assert plain["tokens_per_second"] == 30 and plain["ratio"] == f"{float(plain['ratio']):.3f}"
    assert speculative["tau"] == 2 and speculative["tokens_per_second"] == 6
    assert len(speculative["answers"]) == 3
    assert "| llama-bench, plain, 64 tokens" in done.stdout


def test_a_tool_that_fails_is_named(tmp_path: Path) -> None:
    for name in (peers.BENCH, peers.SPECULATIVE):
        (tmp_path / name).write_text("#!/bin/sh\necho 'no such model' >&2\nexit 3\n")
        (tmp_path / name).chmod(0o755)
    bench_tool, _ = peers.find(tmp_path)
    with pytest.raises(peers.TrimError, match="ended with 3: no such model"):
        peers.single_stream(bench_tool, Path("x"), 1)


def test_modes_with_draft_lengths_of_their_own(arguments: list[str]) -> None:
    record = record_of(invoke(*arguments, "--modes", "plain,again,spec:1,spec:3,lookup:2"))
    most = {
        mode: max(r[1] for a in record["answers"] if a["mode"] == mode for r in a["rounds"])
        for mode in record["settings"]["modes"]
    }
    assert most == {"plain": 0, "again": 0, "spec:1": 1, "spec:3": 3, "lookup:2": 2}
    assert invoke(*arguments, "--modes", "spec:0").exit_code == 2


def test_the_demo_shows_its_texts_and_no_json_in_a_terminal(toys: dict[str, Path], tmp_path: Path) -> None:
    files = ["--target", str(toys["target"]), "--draft", str(toys["good-trimmed"]), "-c", "256", "-n", "4"]
    record = record_of(invoke("demo", *files))
    with Terminal("-m", "runner.bench", "demo", *files, home=tmp_path, columns=200) as demo:
        assert demo.end() == 0
    shown = demo.plain
    assert '{"' not in shown
    for row in record["prompts"]:
        assert f"\n> {row['prompt']}\n{row['drafted']['text']}" in shown


def test_the_demo_shows_what_the_cut_brings(toys: dict[str, Path]) -> None:
    files = ["--target", toys["target"], "--draft", toys["spec-trimmed"], "--full", toys["target"]]
    done = invoke("demo", *map(str, files), "-c", "256", "-n", "4")
    cut = record_of(done)["cut"]
    full, quant, trim, spec = (cut[kind] for kind in ("full", "quant", "trim", "spec"))
    assert quant["rows"] == full["rows"] and 0 < quant["acceptance"] <= 1
    assert trim["bytes"] < spec["bytes"] and "acceptance" not in trim
    assert (full["rows"], spec["rows"]) == (600, head_tensor(GGUFFile(toys["spec-trimmed"])).n_rows)
    assert full["acceptance"] == full["per_draft"] == 1  # it is the target itself
    assert full["tau"] == 4 and full["seconds"] > 0 < spec["seconds"]
    table, legend = done.stdout.split("\n\n")[0].rsplit("\n", 1)
    assert "\nDrafting " in done.stdout and max(map(len, table.splitlines())) < 80
    assert legend.startswith("requantised: uncut, in the type that is quickest here (")
    assert "The target's type decides, too." in done.stdout
    assert "make demo MODEL=" not in done.stdout  # only beside a pair of the catalog


def test_the_demo_shows_a_larger_head_beside_a_pair_of_the_catalog(toys: dict[str, Path], monkeypatch) -> None:
    """Its steps if the file is here, else how to get it."""
    ready = Prepared(toys["target"], toys["target"], toys["spec-trimmed"])
    pair = Models(toys["target"], toys["spec-trimmed"], n_ctx=256, prepared=ready)
    monkeypatch.setattr(demo, "prepare", lambda name: ready)
    monkeypatch.setattr(demo, "is_here", lambda entry: False)
    assert demo.beside(pair) is None
    monkeypatch.setattr(demo, "is_here", lambda entry: entry.name == "gemma-3-270m")
    found = demo.beside(pair)
    assert found is not None and list(found) == ["full", "quant", "trim", "spec"]
    shown = demo.cut_table(found)
    assert shown.splitlines()[-1].split("|")[2].strip() == "1.00" and "accept" not in shown


@pytest.mark.parametrize(
    ("least", "stands", "said"),
    [
        (None, 1.0, "does not pay here: verifying four tokens takes 3.9 times as long as one"),
        (0.9, 0.8, "does not pay here: .*so drafts pay if 90% of them are accepted, and 80% are"),
        (0.4, 0.8, "Drafting pays here: .*40% of them are accepted, and 80% are; 1.50 x plain decoding"),
    ],
)
def test_the_verdict(least: float | None, stands: float, said: str) -> None:
    point = None if least is None else {"acceptance": least}
    cut = {"verify_4": 3.9, "paying": {"trim": {"from": point}}, "full": {}, "trim": {"per_draft": stands}}
    row = {"plain": {"tokens": 10, "seconds": 3.0}, "drafted": {"tokens": 10, "seconds": 2.0}}
    assert re.search(said, verdict({"cut": cut, "prompts": [row]}))


def test_a_trim_without_a_speculator_is_measured_without_spec(toys, capfd) -> None:
    files = Files(toys["target"], None, {"": toys["good-trimmed"]})
    assert names_of([*KINDS, "spec:3"], files) == ["plain", "trim", "context", "lookup", "pool", "auto"]
    assert "spec is left out: " in capfd.readouterr().err
    both = Files(toys["target"], toys["target"], {"@1": toys["spec-trimmed"], "@400": toys["good-trimmed"]})
    assert names_of(["full", "trim", "spec:3"], both) == ["full", "trim@1", "trim@400", "spec@1:3"]
