"""Step costs: measured without a trace, remembered for the next time, and measured again when anything has changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gguf_trim.format.companion import companion_path
from llamabase import store as remembered
from llamabase.sampling.settings import GREEDY
from runner.draft import measured
from runner.draft.measured import measured_draft, measured_verify
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .conftest import copy_trimmed


def test_measures_and_leaves_no_trace(toys) -> None:
    with Engine(LoadOptions(toys["target"], toys["spec-trimmed"], n_ctx=256)) as engine:
        before = [r.tokens for r in engine.rounds([65, 66], GREEDY, max_tokens=9, draft_max=3)]
        verify, draft = measured_verify(engine.reader), measured_draft(engine.drafter)
        assert list(verify) == [1, 2, 3, 4, 5, 6, 8]
        assert all(seconds > 0 for seconds in verify.values())
        assert draft[64] > draft[1] > 0
        assert [r.tokens for r in engine.rounds([65, 66], GREEDY, max_tokens=9, draft_max=3)] == before


class Pair:
    """Opens a pair and counts how often it was measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured = 0

        def counted(reader) -> dict[int, float]:
            self.measured += 1
            return measured_verify(reader)

        monkeypatch.setattr(measured, "measured_verify", counted)

    def is_measured(self, target: Path, draft: Path | None = None, **settings) -> bool:
        before = self.measured
        with Engine(LoadOptions(target, draft, **({"n_ctx": 128} | settings))) as engine:
            engine.measure()
        return self.measured > before


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Pair:
    return Pair(monkeypatch)


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache" / "costs.json"
    monkeypatch.setattr(remembered, "costs_file", lambda: path)
    return path


def test_is_remembered_until_something_changes(toys, tmp_path: Path, pair: Pair, memory: Path, monkeypatch) -> None:
    draft = copy_trimmed(toys["good-trimmed"], tmp_path / "draft.gguf")
    assert pair.is_measured(toys["target"], draft)
    assert not pair.is_measured(toys["target"], draft)
    assert pair.is_measured(toys["target"])
    assert pair.is_measured(toys["target"], draft, n_threads=1)
    assert pair.is_measured(toys["target"], draft, vocab="trim")
    os.utime(companion_path(draft))  # another speculator, say
    assert pair.is_measured(toys["target"], draft)
    assert not pair.is_measured(toys["target"])
    monkeypatch.setattr(remembered, "DAYS", 0)
    assert pair.is_measured(toys["target"])
    assert len(json.loads(memory.read_text())) == 1  # the old ones are forgotten


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b'{"a": 1}', b'{"a": {"measured": "x"}}'])
def test_a_damaged_memory_is_done_without(toys, pair: Pair, memory: Path, damage: bytes) -> None:
    memory.parent.mkdir()
    memory.write_bytes(damage)
    assert pair.is_measured(toys["target"])
    assert not pair.is_measured(toys["target"])


@pytest.mark.parametrize("seconds", [None, [], {}, {"x": 1}, {"1": "y"}, {"1": -1.0}, {"0": 1.0}])
def test_damaged_costs_are_measured_again(toys, pair: Pair, memory: Path, seconds) -> None:
    assert pair.is_measured(toys["target"])
    (found,) = json.loads(memory.read_text()).items()
    memory.write_text(json.dumps({found[0]: found[1] | {"verify": seconds}}))
    assert pair.is_measured(toys["target"])


def test_a_memory_that_cannot_be_written_is_done_without(toys, tmp_path: Path, pair: Pair, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(remembered, "costs_file", lambda: tmp_path / "file" / "costs.json")
    assert pair.is_measured(toys["target"])
    assert pair.is_measured(toys["target"])


def test_not_more_pairs_than_are_kept(toys, pair: Pair, memory: Path, monkeypatch) -> None:
    monkeypatch.setattr(remembered, "ENTRIES", 2)
    for n_ctx in (64, 72, 80):
        assert pair.is_measured(toys["target"], n_ctx=n_ctx)
    assert not pair.is_measured(toys["target"], n_ctx=80)
    assert not pair.is_measured(toys["target"], n_ctx=72)
    assert pair.is_measured(toys["target"], n_ctx=64)


def test_what_a_session_learned_is_remembered(toys, memory: Path) -> None:
    with Engine(LoadOptions(toys["target"], toys["spec-trimmed"], n_ctx=256)) as engine:
        list(engine.rounds([65, 66, 65, 66, 65, 66], GREEDY, max_tokens=40))
        learned = engine.auto.stats
        seen = learned.certainties.seen, learned.matches.seen
    assert learned.tokens > 0
    with Engine(LoadOptions(toys["target"], toys["spec-trimmed"], n_ctx=256)) as engine:
        again = engine.auto.stats
        assert (again.tokens, again.steps) == (learned.tokens, learned.steps)
        assert (again.certainties.seen, again.matches.seen) == seen


def known_of(memory: Path) -> dict:
    (found,) = json.loads(memory.read_text()).values()
    return found["known"]


@pytest.mark.parametrize("damage", ["x", {}, {"tokens": 0}, {"steps": "y"}, {"matches": [[2, 1]]}])
def test_what_is_damaged_is_learned_anew(toys, memory: Path, damage) -> None:
    def learn() -> None:
        with Engine(LoadOptions(toys["target"], toys["spec-trimmed"], n_ctx=256)) as engine:
            list(engine.rounds([65, 66, 65, 66, 65, 66], GREEDY, max_tokens=40))

    learn()
    ((key, found),) = json.loads(memory.read_text()).items()
    bad = damage if not isinstance(damage, dict) or not damage else found["known"] | damage
    memory.write_text(json.dumps({key: found | {"known": bad}}))
    learn()
    assert known_of(memory).keys() == found["known"].keys()
    assert known_of(memory)["tokens"] > 0
