"""How quick several clients are answered at once: a closed loop, in which each asks anew as soon as it is answered."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from llamabase.cli.progress import progress
from llamabase.files import Kind, marked
from llamabase.llama.meeting import Meeting
from llamabase.sampling.settings import GREEDY
from runner.loop.engine import Engine

from .modes import AUTO, PLAIN
from .report import table

CLIENTS = Kind("holds no record of several clients", marked(b"{", b'"machine":', b'"clients":', b'"runs":'))


@dataclass
class Loop:
    """Some clients' answers: tokens, drafts, rounds, and seconds of all together; of each answer to its first token."""

    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)


def answer_all(engines: Sequence[Engine], prompts: Sequence[list[int]], max_tokens: int, draft_max: int | None) -> Loop:
    """Answer prompts greedily, in as many conversations as there are engines of one cache."""
    loop, waiting, meeting = Loop(), deque(prompts), Meeting()

    def client(engine: Engine) -> None:
        while waiting:
            prompt, asked, first = waiting.popleft(), time.perf_counter(), True
            for round_ in engine.rounds(prompt, GREEDY, max_tokens=max_tokens, draft_max=draft_max):
                if first:
                    loop.first.append(time.perf_counter() - asked)
                    first = False
                loop.tokens += len(round_.tokens)
                loop.drafted += len(round_.drafted)
                loop.accepted += round_.accepted
                loop.rounds += 1

    for engine in engines:
        engine.forget()  # a prompt is read anew, in every mode
        engine.meet(meeting)
        meeting.begin(partial(client, engine))
    started = time.perf_counter()
    try:
        while len(meeting):
            meeting.go_on()
    finally:
        meeting.close()
    loop.seconds = time.perf_counter() - started
    return loop


def measure(
    first: Engine,
    prompts: Sequence[list[int]],
    clients: Sequence[int],
    modes: Sequence[str],
    max_tokens: int,
    repeat: int,
) -> list[dict[str, Any]]:
    """Each number of clients in each mode, by turns, forwards and backwards alternately."""
    _ = first.auto  # measures what steps cost, if that is not known
    engines = [first, *(first.share_weights() for _ in range(max(clients) - 1))]
    runs = []
    try:
        with progress("answering clients", len(clients) * len(modes) * repeat, "runs") as advance:
            for n in clients:
                order = cycle((modes, modes[::-1]))
                for _ in range(repeat):
                    for mode in next(order):
                        draft_max = None if mode == AUTO else 0 if mode == PLAIN else int(mode)
                        loop = answer_all(engines[:n], prompts, max_tokens, draft_max)
                        runs.append({"clients": n, "mode": mode, **vars(loop)})
                        advance(1, f"{n} clients, {mode}: {loop.tokens / loop.seconds:.1f} tok/s")
    finally:
        for engine in engines[:0:-1]:
            engine.close()
    return runs


def clients_table(record: dict[str, Any]) -> str:
    """Tokens per second of all clients together, in units of one client's plain decoding, and the wait for a first
    token.
    """
    speeds, rows = dict[tuple[int, str], float](), []
    for run in record["runs"]:
        key = run["clients"], run["mode"]
        same = [each for each in record["runs"] if (each["clients"], each["mode"]) == key]
        if key in speeds:
            continue
        tokens, seconds = (sum(each[name] for each in same) for name in ("tokens", "seconds"))
        speeds[key] = tokens / seconds
        first = np.quantile([second for each in same for second in each["first"]], (0.5, 0.95))
        rounds, drafted, accepted = (sum(each[name] for each in same) for name in ("rounds", "drafted", "accepted"))
        base = speeds.get((record["clients"][0], PLAIN))
        rows.append([
            str(key[0]),
            key[1],
            f"{speeds[key]:.1f}",
            "-" if base is None else f"{speeds[key] / base:.2f}",
            f"{tokens / rounds:.2f}",
            f"{accepted / drafted:.3f}" if drafted else "-",
            f"{first[0]:.2f}",
            f"{first[1]:.2f}",
        ])  # fmt: skip
    return table(["clients", "mode", "tok/s", "x plain", "tau", "acceptance", "first token, s", "95 %"], rows)
