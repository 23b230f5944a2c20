"""What a pair's steps cost on this machine: measured when it first drafts here, and remembered for the next time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from corpus.errors import TrimError
from corpus.files import CACHED, write_whole
from corpus.llama import backends, physical_cores
from corpus.noise import Noise
from corpus.sampling import GREEDY
from gguf_trim.catalog import cache_folder

from .drafter import ModelDrafter, Reader
from .pace import StepCost

VERIFY_SIZES = (1, 2, 3, 4, 5, 6, 8)
DRAFT_SIZES = (1, 2, 4, 16, 64)
PATIENCE = 1.0  # seconds of measuring after which every size is measured once only
DAYS = 30  # a cost is measured again after so many
PAIRS = 64  # remembered at most


def costs_file() -> Path:
    return cache_folder() / "costs.json"


def step_costs(
    target: Reader, drafter: ModelDrafter | None, files: Sequence[Path], settings: Sequence[object]
) -> tuple[StepCost, StepCost | None]:
    """Of verifying, and of drafting where there is a drafter: as remembered, else measured.

    Remembered for the same files, settings, machine and llama.cpp. A memory that cannot be read or written is done
    without.
    """
    key, memory = _key(files, settings), _read()
    verify, draft = (_valid(memory.get(key, {}).get(which)) for which in ("verify", "draft"))
    if not verify or bool(draft) != (drafter is not None):
        verify = measured_verify(target)
        draft = {} if drafter is None else measured_draft(drafter)
        memory[key] = {"measured": time.time(), "verify": verify, "draft": draft}
        _write(memory)
    return StepCost(verify), StepCost(draft) if draft else None


def _key(files: Sequence[Path], settings: Sequence[object]) -> str:
    facts = [platform.node(), physical_cores(), backends(), version("llama-cpp-python"), *settings]
    for path in files:
        if not path.exists():  # the companion of an uncut drafter
            continue
        found = path.stat()
        facts += [str(path.resolve()), found.st_size, found.st_mtime_ns]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _read() -> dict[str, Any]:
    """What is remembered and not too old, the oldest first."""
    try:
        memory = json.loads(costs_file().read_bytes())
        young = {key: found for key, found in memory.items() if time.time() - found["measured"] < DAYS * 86_400}
        return dict(sorted(young.items(), key=lambda entry: entry[1]["measured"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _valid(seconds: Any) -> dict[int, float]:
    """Seconds by number of tokens as they were written; empty where they are damaged."""
    try:
        found = {int(n): float(took) for n, took in seconds.items()}
    except (AttributeError, TypeError, ValueError):
        return {}
    return found if all(n > 0 and 0 < took < math.inf for n, took in found.items()) else {}


def _write(memory: dict[str, Any]) -> None:
    with contextlib.suppress(TrimError), write_whole(costs_file(), CACHED) as file:
        file.write(json.dumps(dict(list(memory.items())[-PAIRS:])).encode())


def measured_verify(target: Reader) -> dict[int, float]:
    """Seconds of a target's step by the number of tokens it reads: the faster of two, on an empty cache."""
    context = target.context
    target.settle()  # where an interruption cut the last measurement short
    target.keep([], 0)

    def step(n: int) -> float:
        started = time.perf_counter()
        context.decode(list(range(n)), n)
        took = time.perf_counter() - started
        context.truncate(0)
        return took

    return _fastest([n for n in VERIFY_SIZES if n <= min(context.n_outputs, context.n_ctx)], step)


def measured_draft(drafter: ModelDrafter) -> dict[int, float]:
    """Seconds of drafting one token, by the number of tokens the drafter has to read first."""
    noise = Noise(0)
    longest = min(DRAFT_SIZES[-1], drafter.n_ctx // 2)
    text = list(range(longest))

    def step(n: int) -> float:
        drafter.settle()
        drafter.prepare(text[: longest - n + 1], 0)
        before = drafter.seconds
        next(drafter.propose(text, GREEDY, noise))
        return drafter.seconds - before

    return _fastest([n for n in DRAFT_SIZES if n <= longest], step)


def _fastest(sizes: Sequence[int], step: Callable[[int], float]) -> dict[int, float]:
    """The faster of two steps of each size; of one, where a machine is so slow that a hiccup is little beside it."""
    step(sizes[0])  # warms up
    started = time.perf_counter()
    seconds = {n: step(n) for n in reversed(sizes)}
    if time.perf_counter() - started < PATIENCE:
        seconds = {n: min(seconds[n], step(n)) for n in sizes}
    return seconds
