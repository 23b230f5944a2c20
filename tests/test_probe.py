"""The probe of batch invariance: it finds what is planted, by batch size, and says what that means."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from click.testing import CliRunner

from runner.exact import main as exact
from runner.loop.engine import Engine
from runner.probe import BLOCK, probe, verdict

PROMPTS = [[65, 66, 67, 68], [70, 71, 72]]


def probed(engine: Engine, **settings):
    return probe(engine.reader, PROMPTS, 2 * BLOCK, lambda _: False, **settings)


def plant(monkeypatch: pytest.MonkeyPatch, engine: Engine, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the logits of batches of five tokens and more."""
    decode = engine.context.decode

    def changed(inputs, outputs=1, hidden=False):
        logits = decode(inputs, outputs, hidden)
        return change(logits.copy()) if outputs > 4 else logits

    monkeypatch.setattr(engine.context, "decode", changed)


def test_rows_are_compared_with_those_of_the_same_tokens(engines) -> None:
    """An F32 toy parts by rounding at most; a row that is compared with another token's would part by far more."""
    found = probed(engines(None))
    assert [p.batch for p in found] == list(range(1, BLOCK + 1))
    assert [p.rows for p in found] == [4 * (BLOCK // p.batch) * p.batch for p in found]
    assert found[0].equal == found[0].rows
    assert max(p.greatest for p in found) < 1e-4 and not any(p.other_best for p in found)


def test_what_is_planted_is_found(engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engines(None)

    def raise_the_first(logits: np.ndarray) -> np.ndarray:
        logits[:, 0] += 0.25 * np.ptp(logits, axis=1)
        return logits

    plant(monkeypatch, engine, raise_the_first)
    found = probed(engine)
    for p in found:
        assert p.median == pytest.approx(0.25 if p.batch > 4 else 0, abs=1e-3)
        assert p.equal == 0 or p.batch < 5
    monkeypatch.undo()
    plant(monkeypatch, engine, lambda logits: -logits)
    assert all(p.other_best == (p.rows if p.batch > 4 else 0) for p in probed(engine))


def test_it_ends_in_time(engines) -> None:
    assert probed(engines(None), patience=-1) == []
    assert "nothing is known" in verdict([], "CPU")


def test_the_same_text_is_worded_by_what_was_found(toys, engines, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["--target", str(toys["target"]), "--draft", str(toys["good-trimmed"]), "-c", "256", "-t", "1"]
    done = CliRunner().invoke(exact, [*files, "--probe", "--limit", "1", "-n", "20"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout.splitlines()[-1])
    same = all(row["equal"] == row["rows"] for row in record["batches"])
    assert record["target"] == "target.gguf" and ("is plain decoding's" in done.stdout) == same
    engine = engines(None)
    plant(monkeypatch, engine, lambda logits: logits * 1.01)
    assert "a text may part from plain decoding's" in verdict(probed(engine), "CPU")
