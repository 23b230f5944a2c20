"""From raw rounds to figures, by mode and task. A record holds everything that they are computed from."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import numpy as np

from gguf_trim.format.memory_bound import mbsu

ALL = "all"
MOST_DRAFTED = 1 << 12  # tokens of a round; no batch is larger
FEW = 5  # batches of one size; the median of fewer is too noisy
Figures = dict[str, Any]


class Answer(TypedDict, total=False):
    """One answer as a record holds it. One that failed has its `error` instead of what was measured.

    A round is [tokens, drafted, accepted, draft seconds, verify seconds, host seconds].
    """

    prompt: str
    turn: int
    repeat: int
    mode: str
    task: str
    prompt_tokens: int
    prompt_seconds: float
    first_token_seconds: float
    seconds: float
    rounds: list[list[float]]
    token_ids: list[int]
    error: str


def figures(record: dict[str, Any]) -> dict[str, dict[str, Figures]]:
    """{task: {mode: figures}} for every task and for "all" of them; modes and tasks in the record's order."""
    tasks = [*dict.fromkeys(answer["task"] for answer in record["answers"]), ALL]
    return {task: {mode: _of_mode(record, mode, task) for mode in record["settings"]["modes"]} for task in tasks}


def _of_mode(record: dict[str, Any], mode: str, task: str) -> Figures:
    """tau, acceptance and tok/s are over all tokens of the mode's answers; speed-ups are by prompt as well."""
    answers: list[Answer] = record["answers"]
    good = [answer for answer in answers if "error" not in answer]
    mine = [answer for answer in good if answer["mode"] == mode and task in (answer["task"], ALL)]
    rounds = _rounds(mine)
    tokens, drafted, accepted = map(int, rounds[:, :3].sum(axis=0))
    parts = rounds[:, 3:].sum(axis=0).tolist()
    n = max(1, len(rounds))
    wall, reading = sum(answer["seconds"] for answer in mine), sum(map(_reading, mine))
    first = [answer["prompt_seconds"] + answer["first_token_seconds"] for answer in mine]
    of_mode, target = record["modes"].get(mode, {}), record.get("target_step", {})
    out: Figures = {
        "answers": len(mine),
        "failed": sum(a["mode"] == mode and task in (a["task"], ALL) and "error" in a for a in answers),
        "tokens": tokens,
        "rounds": len(rounds),
        "tau": tokens / n,
        "drafted": drafted,
        "acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_by_position": _by_position(rounds),
        **{f"{name}_ms": 1000 * part / n for name, part in zip(("draft", "verify", "host"), parts, strict=True)},
        "tokens_per_second": tokens / sum(parts) if tokens else None,
        "first_token_seconds": statistics.median(first) if first else None,
        "parted": _parted(mine, good),
        "memory_bytes": of_mode.get("memory_bytes"),
        # The share of the wall time, which is clocked apart, that no part of a round explains.
        "unaccounted": 1 - (sum(parts) + reading) / wall if wall else None,
        "speedup_over_plain": _speedup(mine, good, "plain"),
        "speedup_over_full": _speedup(mine, good, "full"),
        "speedup_priced": priced(mine, good),
    }
    if step := of_mode.get("step"):
        for kind in ("params", "bytes"):
            out[f"mbsu_{kind}"] = mbsu(out["tau"], step[kind] / target[kind], out["drafted"] / n)
        if out["speedup_over_plain"] is not None:
            out["share_of_ceiling"] = out["speedup_over_plain"]["total"] / out["mbsu_bytes"]
    return out


def _by_position(rounds: np.ndarray) -> list[float]:
    """For each place in a round, the share of the drafts made there that were accepted."""
    drafted, accepted = rounds[:, 1], rounds[:, 2]
    return [float((accepted[drafted > i] > i).mean()) for i in range(int(drafted.max(initial=0)))]


def _speedup(mine: Sequence[Answer], good: Sequence[Answer], base: str) -> dict[str, float] | None:
    """Tokens per second over those of mode `base` on the same prompts: in total, and quartiles of the prompts' ratios.

    "overall" counts reading the prompt too. None if the base answered none of these prompts.
    """
    ours, theirs = _by_prompt(mine), _by_prompt(answer for answer in good if answer["mode"] == base)
    both = [key for key in ours if key in theirs]
    if not both:
        return None
    ratios = [statistics.median(map(_rate, ours[key])) / statistics.median(map(_rate, theirs[key])) for key in both]
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    a, b = ([answer for key in both for answer in side[key]] for side in (ours, theirs))
    total, overall = _rate(*a) / _rate(*b), _rate(*a, prompt=True) / _rate(*b, prompt=True)
    return {"total": total, "overall": overall, "least": min(ratios), "low": low, "median": median, "high": high}


def priced(mine: Sequence[Answer], good: Sequence[Answer]) -> dict[str, float] | None:
    """The speed-up over plain if every batch took its usual time, so without the machine's noise: total and least.

    The usual time of a batch is the median over the prompt's batches of that size, in any mode. If these are too few,
    it is the prompt's batch of one times the ratio of the record's medians. Drafting and Python count as measured.
    """
    plain = [answer for answer in good if answer["mode"] == "plain"]
    if not plain:
        return None
    host = float(np.median(_rounds(plain)[:, 5]))
    usual = {size: statistics.median(seconds) for size, seconds in _batches(good).items()}
    prompts, took, whole = _by_prompt(good), [], []  # by prompt: seconds at these prices, and of plain decoding
    for key, answers in _by_prompt(mine).items():
        if 1 not in (batches := _batches(prompts[key])):
            continue
        one = statistics.median(batches[1])
        price = {
            size: statistics.median(seconds) if size == 1 or len(seconds) >= FEW else one * usual[size] / usual[1]
            for size, seconds in batches.items()
        }
        rounds = _rounds(answers)
        took.append(sum(price[int(n) + 1] for n in rounds[:, 1]) + float(rounds[:, (3, 5)].sum()))
        whole.append(float(rounds[:, 0].sum()) * (one + host))
    return {"total": sum(whole) / sum(took), "least": min(np.divide(whole, took).tolist())} if took else None


def _rounds(answers: Iterable[Answer]) -> np.ndarray:
    """All rounds of some answers (n x 6); see `Answer`. Raises ValueError for impossible ones."""
    rounds = np.array([round_ for answer in answers for round_ in answer["rounds"]], float).reshape(-1, 6)
    tokens, drafted, accepted = rounds.T[:3]
    if not (np.isfinite(rounds).all() and (accepted >= 0).all() and (accepted <= drafted).all()):
        raise ValueError("a round accepts more than was drafted, or holds something else than numbers")
    if max(drafted.max(initial=0), tokens.max(initial=0)) > MOST_DRAFTED:
        raise ValueError("a round has more tokens than any batch")
    return rounds


def _batches(answers: Iterable[Answer]) -> dict[int, list[float]]:
    """Seconds of the target's batches, by size."""
    rounds = _rounds(answers)
    return {int(drafted) + 1: rounds[rounds[:, 1] == drafted, 4].tolist() for drafted in np.unique(rounds[:, 1])}


def _by_prompt(answers: Iterable[Answer]) -> dict[tuple[str, int], list[Answer]]:
    groups = defaultdict(list)
    for answer in answers:
        groups[answer["prompt"], answer["turn"]].append(answer)
    return groups


def _rate(*answers: Answer, prompt: bool = False) -> float:
    """Tokens per second, with or without the time in which target and drafter read the prompt."""
    rounds = _rounds(answers)
    reading = sum(answer["prompt_seconds"] + _reading(answer) for answer in answers) if prompt else 0.0
    return float(rounds[:, 0].sum()) / float(rounds[:, 3:].sum() + reading)


def _reading(answer: Answer) -> float:
    """Seconds in which the drafter read the prompt before the first round."""
    return max(0.0, float(answer["first_token_seconds"] - sum(answer["rounds"][0][3:6])))


def place(answer: Answer) -> tuple[str, int, int, str]:
    """What identifies an answer: its prompt, the turn, the repeat, and the mode."""
    return answer["prompt"], answer["turn"], answer["repeat"], answer["mode"]


def _parted(mine: Sequence[Answer], good: Sequence[Answer]) -> int:
    """Answers whose text differs from the plain one: at near-ties of a quantised target, where batch shapes differ."""
    plain = {place(answer)[:3]: answer["token_ids"] for answer in good if answer["mode"] == "plain"}
    return sum(plain.get(place(answer)[:3], answer["token_ids"]) != answer["token_ids"] for answer in mine)
