"""Step costs: measured without a trace, remembered for the next time, and measured again when anything has changed."""

from __future__ import annotations

import json
import multiprocessing
import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from gguf_trim.format.companion import companion_path
from llamabase import store
from llamabase.sampling.settings import GREEDY
from llamabase.store import recall, remember
from runner.draft import measured
from runner.draft.measured import measured_draft, measured_verify
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .conftest import copy_trimmed


def test_measures_and_leaves_no_trace(toys) -> None:
    with Engine(LoadOptions(toys["target"], toys["spec-trimmed"], n_ctx=256)) as engine:
        before = [r.tokens for r in engine.rounds([65, 66], GREEDY, max_tokens=9, draft_max=3)]
        (verify, change), draft = measured_verify(engine.reader), measured_draft(engine.drafter)
        assert list(verify) == [1, 2, 3, 4, 5, 6, 8]
        assert all(seconds > 0 for seconds in verify.values()) and change >= 0
        assert draft[64] > draft[1] > 0
        assert [r.tokens for r in engine.rounds([65, 66], GREEDY, max_tokens=9, draft_max=3)] == before


class Pair:
    """Opens a pair and counts how often it was measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured = 0

        def counted(reader) -> tuple[dict[int, float], float]:
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
    path = tmp_path / "cache" / "remembered.sqlite"
    monkeypatch.setattr(store, "memory_file", lambda: path)
    return path


def rows(memory: Path, kind: str = "costs") -> list[tuple]:
    """(key, facts, at) of all that is remembered of a kind."""
    with closing(sqlite3.connect(memory)) as database:
        return database.execute(f"SELECT key, facts, at FROM {kind}").fetchall()


def write_facts(memory: Path, kind: str, facts: object) -> None:
    """Put facts in place of all that are remembered of a kind."""
    with closing(sqlite3.connect(memory)) as database, database:
        database.execute(f"UPDATE {kind} SET facts = ?", [facts if isinstance(facts, bytes) else json.dumps(facts)])


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
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + (measured.DAYS - 1) * 86_400)
    assert not pair.is_measured(toys["target"])
    monkeypatch.setattr(time, "time", lambda: now + (measured.DAYS + 1) * 86_400)
    assert pair.is_measured(toys["target"])
    assert not pair.is_measured(toys["target"])


@pytest.mark.parametrize("damage", [b"", b"{", b"SQLite format 3\0" + b"\xff" * 4096, "cut", "page", "journal"])
def test_a_damaged_memory_is_replaced(toys, pair: Pair, memory: Path, damage: bytes | str) -> None:
    memory.parent.mkdir()
    if isinstance(damage, bytes):
        memory.write_bytes(damage)
    else:
        remember("costs", "other", {"x": 1})
        data = memory.read_bytes()
        if damage == "journal":
            memory.with_name(f"{memory.name}-journal").write_bytes(b"\xff" * 600)
        else:
            memory.write_bytes(data[:4096] if damage == "cut" else data[:4096] + b"\xff" * (len(data) - 4096))
    assert pair.is_measured(toys["target"])
    assert not pair.is_measured(toys["target"])


def test_costs_measured_beside_something_else_are_measured_again(toys, pair: Pair, memory: Path) -> None:
    """A session finds its plain steps much quicker than they were measured to be."""
    assert pair.is_measured(toys["target"])
    ((_, facts, _),) = rows(memory)
    verify = {n: 10 * seconds for n, seconds in json.loads(facts)["verify"].items()}
    write_facts(memory, "costs", json.loads(facts) | {"verify": verify})
    with Engine(LoadOptions(toys["target"], n_ctx=128)) as engine:
        list(engine.rounds([65, 66, 67], GREEDY, max_tokens=100))
    assert pair.is_measured(toys["target"])


def test_costs_of_a_usual_session_are_kept(memory: Path) -> None:
    remember("costs", "key", {"x": 1})
    measured.check_costs("key", 1.4, 1.0)
    assert rows(memory)[0][1] == '{"x": 1}'
    measured.check_costs("key", 1.6, 1.0)
    assert rows(memory)[0][1] == "{}"


@pytest.mark.parametrize("seconds", [None, [], {}, {"x": 1}, {"1": "y"}, {"1": -1.0}, {"0": 1.0}])
def test_damaged_costs_are_measured_again(toys, pair: Pair, memory: Path, seconds) -> None:
    assert pair.is_measured(toys["target"])
    write_facts(memory, "costs", {"verify": seconds, "draft": {}, "change": 0.0})
    assert pair.is_measured(toys["target"])


def test_costs_without_a_price_of_changes_are_measured_again(toys, pair: Pair, memory: Path) -> None:
    sizes = {"1": 0.5, "8": 0.9}
    assert pair.is_measured(toys["target"])
    for change in ({}, {"change": None}, {"change": -1.0}):
        write_facts(memory, "costs", {"verify": sizes, "draft": {}} | change)
        assert pair.is_measured(toys["target"])
    write_facts(memory, "costs", {"verify": sizes, "draft": {}, "change": 0.1})
    assert not pair.is_measured(toys["target"])
    write_facts(memory, "costs", {"verify": {"1": 0.5}, "draft": {}, "change": 0.1})  # of smaller batches
    assert pair.is_measured(toys["target"])


@pytest.mark.parametrize("facts", [[], 1, None, b"{", b"\xff", b"[" * 99_999])
def test_damaged_facts_are_written_anew(memory: Path, facts) -> None:
    remember("costs", "key", {"x": 1})
    write_facts(memory, "costs", facts)
    assert recall("costs", "key") == {}
    remember("costs", "key", {"x": 2})
    assert recall("costs", "key") == {"x": 2}


def test_a_memory_that_cannot_be_written_is_done_without(toys, tmp_path: Path, pair: Pair, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(store, "memory_file", lambda: tmp_path / "file" / "remembered.sqlite")
    assert pair.is_measured(toys["target"])
    assert pair.is_measured(toys["target"])
    monkeypatch.setattr(store, "memory_file", lambda: tmp_path)  # a folder of this name
    assert pair.is_measured(toys["target"])
    assert pair.is_measured(toys["target"])


def test_not_more_pairs_than_are_kept(toys, pair: Pair, memory: Path, monkeypatch) -> None:
    monkeypatch.setattr(store, "ENTRIES", 2)
    remember("hashes", "of another kind", {"x": 1})
    for n_ctx in (64, 72, 80):
        assert pair.is_measured(toys["target"], n_ctx=n_ctx)
    assert not pair.is_measured(toys["target"], n_ctx=80)
    assert not pair.is_measured(toys["target"], n_ctx=72)
    assert pair.is_measured(toys["target"], n_ctx=64)
    assert len(rows(memory)) == 2
    assert recall("hashes", "of another kind") == {"x": 1}


def write_many(memory: Path, number: int) -> None:
    """One process of several: remembers, and sees at once what it has remembered."""
    store.memory_file = lambda: memory
    for n in range(40):
        remember("learned", f"{number}", {"n": n})
        remember("types", f"{number} {n % 8}", {"n": n})
        assert recall("learned", f"{number}") == {"n": n}


def test_processes_write_at_once(memory: Path) -> None:
    """Nothing is lost and nobody fails, though they begin together."""
    memory.parent.mkdir()
    remember("costs", "before", {"x": 1})
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_many, args=(memory, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert {key: json.loads(facts) for key, facts, _ in rows(memory, "learned")} == {
        str(i): {"n": 39} for i in range(4)
    }
    assert len(rows(memory, "types")) == 32
    assert recall("costs", "before") == {"x": 1}


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


@pytest.mark.parametrize("damage", ["x", {}, {"tokens": 0}, {"steps": "y"}, {"matches": [[2, 1]]}])
def test_what_is_damaged_is_learned_anew(toys, memory: Path, damage) -> None:
    def learn() -> dict:
        with Engine(LoadOptions(toys["target"], toys["spec-trimmed"], n_ctx=256)) as engine:
            list(engine.rounds([65, 66, 65, 66, 65, 66], GREEDY, max_tokens=40))
        ((_, facts, _),) = rows(memory, "learned")
        return json.loads(facts)

    facts = learn()
    write_facts(memory, "learned", facts | damage if isinstance(damage, dict) and damage else damage)
    again = learn()
    assert again.keys() == facts.keys()
    assert again["tokens"] > 0
