"""How quick several clients are answered at once: a closed loop, in which each asks anew as soon as it is answered.

The engine answers them in this process, and servers that run beside it (ours, or llama-server) over HTTP.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from llamabase.cli.progress import progress
from llamabase.errors import EngineError
from llamabase.files import Kind, marked
from llamabase.llama.meeting import Meeting
from llamabase.sampling.settings import GREEDY
from runner.loop.engine import Engine

from .modes import AUTO, PLAIN
from .report import table

PATIENCE = 600.0  # seconds that a server may be silent
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


def ask_all(url: str, n: int, prompts: Sequence[list[int]], max_tokens: int) -> Loop:
    """The same of a server: n clients ask llama-server's `/completion`, which ours has, too, for greedy answers.

    Raises EngineError if one is not answered.
    """
    loop, started = Loop(), time.perf_counter()
    with ThreadPoolExecutor(n) as pool:  # a thread is a client: it takes the next prompt once its last is answered
        answers = list(pool.map(partial(_answer, url, max_tokens), prompts))
    loop.seconds = time.perf_counter() - started
    for first, timings in answers:
        accepted = timings.get("draft_n_accepted", 0)
        loop.first.append(first)
        loop.tokens += timings["predicted_n"]
        loop.drafted += timings.get("draft_n", 0)
        loop.accepted += accepted
        loop.rounds += timings["predicted_n"] - accepted
    return loop


def _answer(url: str, max_tokens: int, prompt: list[int]) -> tuple[float, dict[str, Any]]:
    """(seconds to the first token of a streamed answer, what the server says that the answer took)."""
    asked = {"prompt": prompt, "n_predict": max_tokens, "temperature": 0, "stream": True, "cache_prompt": False}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/completion", json.dumps(asked).encode(), headers)
    asked_at, first, last = time.perf_counter(), 0.0, dict[str, Any]()
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    first, last = first or time.perf_counter() - asked_at, json.loads(line[6:])
        return first, dict(last["timings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{url}: did not answer as llama-server does: {error!r}; see whether it runs") from error


def measure(
    first: Engine,
    prompts: Sequence[list[int]],
    clients: Sequence[int],
    modes: Sequence[str],
    servers: Mapping[str, str],
    max_tokens: int,
    repeat: int,
) -> list[dict[str, Any]]:
    """Each number of clients in each mode and of each server (URLs by name), by turns, forwards and backwards
    alternately.
    """
    _ = first.auto  # measures what steps cost, if that is not known
    engines = [first, *(first.share_weights() for _ in range(max(clients) - 1))]
    runs, ways = [], [*modes, *servers]
    try:
        with progress("answering clients", len(clients) * len(ways) * repeat, "runs") as advance:
            for n in clients:
                order = cycle((ways, ways[::-1]))
                for _ in range(repeat):
                    for mode in next(order):
                        if mode in servers:
                            loop = ask_all(servers[mode], n, prompts, max_tokens)
                        else:
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
