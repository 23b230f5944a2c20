"""Work that is killed (SIGKILL tidies nothing up) or runs out of disk: earlier results are kept, and it can go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from corpus.__main__ import main as corpus
from corpus.counts import Counts
from gguf_trim.__main__ import main as gguf_trim


def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", *map(str, arguments)], stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So much that no machine counts it in the seconds before a kill."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(200):
        (folder / f"{i:03}.txt").write_text(f"the king and the sea number {i}\n" * 4000)
    return folder


@pytest.mark.parametrize("wait", [0.2, 0.9, 1.2, 1.6])
def test_a_killed_count_leaves_the_last_one(toys: dict[str, Path], texts: Path, tmp_path: Path, wait: float) -> None:
    out = tmp_path / "counts.npz"
    (tmp_path / "few.txt").write_text("tea " * 100)

    def count(*sources: Path) -> list[str]:
        return ["count", *map(str, sources), "--tokenizer", str(toys["target"]), "-o", str(out)]

    assert CliRunner().invoke(corpus, count(tmp_path / "few.txt")).exit_code == 0
    kept = out.read_bytes()
    running = start("corpus", *count(texts))
    time.sleep(wait)
    running.kill()
    _, said = running.communicate()
    assert running.returncode == -signal.SIGKILL, said
    assert out.read_bytes() == kept
    assert CliRunner().invoke(corpus, count(texts / "000.txt", texts / "001.txt")).exit_code == 0
    assert Counts.load(out).total > 10_000
    assert not list(tmp_path.glob(".*.part"))


def test_a_killed_generate_goes_on(toys: dict[str, Path], tmp_path: Path) -> None:
    """Killed again and again at whatever moment: each answer is there once, the whole of it, and none is made twice."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"id": f"p{i}", "prompt": f"{'the sea and ' * (i % 5)}the king {i}"} for i in range(60)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def command(out: Path) -> list[str | Path]:
        return ["corpus", "generate", prompts, "--target", toys["target"], "-o", out, "-n", "64", "-np", "3"]

    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert CliRunner().invoke(corpus, [str(a) for a in command(whole)[1:]]).exit_code == 0
    for lines_there in (1, 7, 20):
        running = start(*command(out))
        while running.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= lines_there):
            time.sleep(0.005)
        running.kill()
        running.communicate()
        assert running.returncode == -signal.SIGKILL
    assert CliRunner().invoke(corpus, [str(a) for a in command(out)[1:]]).exit_code == 0

    def answers(path: Path) -> dict[str, list[int]]:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(found) == len({line["id"] for line in found}) == len(lines)
        return {line["id"]: line["answer_ids"] for line in found}

    # Other company, other batch shapes: near-ties of the toy may fall the other way.
    ours, theirs = answers(out), answers(whole)
    assert sum(ours[name] == theirs[name] for name in theirs) > 0.8 * len(lines)


@pytest.mark.parametrize("group", ["count", "generate", "plan"])
def test_a_full_disk_is_said_so(group: str, toys: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch) -> None:
    """What was there before is still there, and the message names the file."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / {"count": "c.npz", "generate": "a.jsonl", "plan": "p.png"}[group]
    ids = tmp_path / "answers.json"
    ids.write_text(json.dumps({"a": [[5, 6, 7], [8, 9, 10, 11]]}))
    commands = {
        "count": (corpus, ["count", texts / "000.txt", "--tokenizer", toys["target"], "-o", out]),
        "generate": (corpus, ["generate", "--limit", 2, "-n", 4, "--target", toys["target"], "-o", out]),
        "plan": (
            gguf_trim,
            [
                "plan",
                "--target",
                toys["target"],
                "--draft",
                toys["wrong"],
                "--answers",
                ids,
                "--no-measure",
                "--plot",
                out,
            ],
        ),
    }
    main, arguments = commands[group]
    monkeypatch.setattr(os, "fsync", full)
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 1, done.output
    assert f"{out}: " in done.stderr
    assert "disk is full" in done.stderr or "No space left" in done.stderr
    assert len(done.stderr.strip().splitlines()[-1]) > 20
    assert not list(tmp_path.glob(".*.part"))
