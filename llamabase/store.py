"""What was measured on this machine, remembered in the cache folder from one start to the next.

A memory that is damaged, or cannot be read or written, is done without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llamabase.llama.library import backends, physical_cores

from .errors import TrimError
from .files import CACHED, cache_folder, write_whole

DAYS = 30  # what is that old is measured again
ENTRIES = 64  # remembered at most


def costs_file() -> Path:
    return cache_folder() / "costs.json"


def key_of(files: Iterable[Path], settings: Sequence[object]) -> str:
    """What a measurement holds for: these files as they are, settings, this machine and this llama.cpp."""
    facts = [platform.node(), physical_cores(), backends(), version("llama-cpp-python"), *settings]
    for path in files:
        if not path.exists():  # the companion of an uncut drafter
            continue
        found = path.stat()
        facts += [str(path.resolve()), found.st_size, found.st_mtime_ns]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def recall(key: str) -> dict[str, Any]:
    """What is remembered under a key and not too old; empty where nothing is."""
    found: dict[str, Any] = _read().get(key, {})
    return found


def remember(key: str, facts: dict[str, Any], measured: bool = True) -> None:
    """Add facts to those under a key. Where they were not `measured` now, their age stays, and there must be some."""
    memory = _read()
    if not measured and key not in memory:
        return
    memory[key] = memory.get(key, {}) | facts | ({"measured": time.time()} if measured else {})
    with contextlib.suppress(TrimError), write_whole(costs_file(), CACHED) as file:
        file.write(json.dumps(dict(list(memory.items())[-ENTRIES:])).encode())


def _read() -> dict[str, Any]:
    """All that is remembered and not too old, the oldest first."""
    try:
        memory = json.loads(costs_file().read_bytes())
        young = {key: found for key, found in memory.items() if time.time() - found["measured"] < DAYS * 86_400}
        return dict(sorted(young.items(), key=lambda entry: entry[1]["measured"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return {}
