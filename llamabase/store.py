"""What this machine has measured and learned, remembered in the cache folder from one start to the next.

An SQLite file with one table a kind, which processes may read and write at once. A damaged file is replaced; a file
that cannot be read or written is done without.
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import time
from pathlib import Path
from typing import Any, Literal

from .files import cache_folder

ENTRIES = 64  # remembered of each kind at most
DAY = 86_400.0  # seconds

Kind = Literal["hashes", "types", "costs", "learned"]


def memory_file() -> Path:
    return cache_folder() / "remembered.sqlite"


def recall(kind: Kind, key: str, days: float = math.inf) -> dict[str, Any]:
    """What was remembered under a key in the last `days`; empty if nothing was."""
    try:
        with contextlib.closing(sqlite3.connect(memory_file())) as memory:
            since = time.time() - DAY * days
            row = memory.execute(f"SELECT facts FROM {kind} WHERE key = ? AND at > ?", (key, since)).fetchone()
        facts = json.loads(row[0])
    except (sqlite3.Error, TypeError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def remember(kind: Kind, key: str, facts: dict[str, Any]) -> None:
    """Keep facts under a key in place of those that are there, and of each kind the last ENTRIES."""
    file = memory_file()
    with contextlib.suppress(OSError, sqlite3.OperationalError):  # no such folder, read-only, full, locked for long
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write(file, kind, key, facts)
        except sqlite3.OperationalError:
            raise
        except (sqlite3.DatabaseError, UnicodeDecodeError):  # damaged; the second if even the message about it is
            file.unlink()
            _write(file, kind, key, facts)


def _write(file: Path, kind: Kind, key: str, facts: dict[str, Any]) -> None:
    last = f"SELECT key FROM {kind} ORDER BY at DESC LIMIT ?"
    with contextlib.closing(sqlite3.connect(file)) as memory, memory:
        memory.execute(f"CREATE TABLE IF NOT EXISTS {kind} (key TEXT PRIMARY KEY, facts TEXT, at REAL)")
        memory.execute(f"INSERT OR REPLACE INTO {kind} VALUES (?, ?, ?)", (key, json.dumps(facts), time.time()))
        memory.execute(f"DELETE FROM {kind} WHERE key NOT IN ({last})", (ENTRIES,))
