"""The promises, on real models: SmolLM2 always; the default pair and Gemma behind the `slow` marker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from gguf_trim.__main__ import main as gguf_trim
from gguf_trim.pairs.catalog import load_catalog
from gguf_trim.pairs.fetch import fetch
from gguf_trim.pairs.prepare import prepare
from runner import exact
from runner.bench.__main__ import main as bench

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2.5-coder-0.5b-instruct", "gemma-3-270m")]


def call(command, *arguments: str):
    done = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", *SLOW])
@pytest.mark.parametrize("k", [16384, 512])
def test_kept_logits_are_the_sources_bit_for_bit(name: str, k: int, smollm2: Path, tmp_path: Path) -> None:
    source, out = fetch(load_catalog().models[name]), tmp_path / "cut.gguf"
    done = CliRunner().invoke(gguf_trim, ["trim", str(source), "--k", str(k), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{out}\n"
    found = call(gguf_trim, "verify", out, "--source", source, "--json")
    assert found["ok"]
    assert found["kept"] == k
    assert found["max_logit_difference"] == 0


@pytest.fixture(scope="module")
def own_drafter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """SmolLM2 with itself, trimmed to 8192 rows, as its drafter."""
    out = tmp_path_factory.mktemp("smollm2") / "trimmed.gguf"
    done = CliRunner().invoke(gguf_trim, ["trim", str(smollm2), "--k", "8192", "-o", str(out)])
    assert done.exit_code == 0, done.output
    return ["--target", str(smollm2), "--draft", str(out), "-c", "1024"]


def test_every_token_is_the_targets_on_smollm2(own_drafter: list[str]) -> None:
    found = call(exact.main, *own_drafter, "--limit", "2", "-n", "32", "--draft-max", "3")
    assert found["tokens"] > 30
    assert found["replay_faults"] == found["beyond_noise"] == 0


def test_every_sampled_token_is_the_targets_on_smollm2(own_drafter: list[str]) -> None:
    found = call(exact.main, *own_drafter, "--limit", "1", "-n", "40", "--draft-max", "3", "--temp", "1", "-s", "3")
    assert found["tokens"] == 40
    assert found["replay_faults"] == found["beyond_noise"] == 0


def test_demo_on_smollm2(own_drafter: list[str]) -> None:
    found = call(bench, "demo", *own_drafter, "-n", "24", "--draft-max", "3")
    for row in found["prompts"]:
        assert row["drafted"]["tau"] > 1.5  # its own head, trimmed: most drafts stand
        assert row["plain"]["drafted"] == 0


def test_steps_on_smollm2(own_drafter: list[str], smollm2: Path) -> None:
    found = call(bench, "steps", *own_drafter, "--full", smollm2, "--repeat", "2")
    assert found["bytes"]["trim"] < found["bytes"]["full"]
    assert len(found["seconds"]["full"]) == 2


@pytest.mark.slow
def test_draft_step_and_host_share_of_the_default_pair() -> None:
    """docs/measured.md gives the measured figures; the bounds here leave room for a noisy machine.

    Python: at most 3 % of a round with the kept rows alone; the speculator's rows are touched for the first time.
    """
    prepare("qwen2.5-coder-1.5b")
    ratios = call(bench, "steps")["median_ratios"]
    assert ratios["trim"] <= 0.78
    assert ratios["context"] <= 1.05 * ratios["trim"]
    assert ratios["spec"] <= 0.86
    for vocab, share in (("trim", 0.03), ("spec", 0.08)):
        for row in call(bench, "demo", "--vocab", vocab, "--draft-max", "3")["prompts"]:
            assert row["drafted"]["host_seconds"] <= share * row["drafted"]["seconds"]


@pytest.mark.slow
def test_every_token_is_the_targets_on_the_default_pair() -> None:
    found = call(exact.main, "--limit", "4", "-n", "64", "--draft-max", "3")
    assert found["replay_faults"] == found["beyond_noise"] == 0
