"""From raw rounds to figures, by mode and task; everything here can be computed again from a record."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gguf_trim.format.weights import mbsu

ALL = "all"
MOST_DRAFTED = 1 << 12  # in a round: no batch is larger
FEW = 5  # batches of one size; the median of fewer says little
Answer = dict[str, Any]
Figures = dict[str, Any]


def figures(record: dict[str, Any]) -> dict[str, dict[str, Figures]]:
    """{task: {mode: figures}}, with every task and "all" of them; modes and tasks in the record's order."""
    tasks = [*dict.fromkeys(answer["task"] for answer in record["answers"]), ALL]
    return {task: {mode: _of_mode(record, mode, task) for mode in record["settings"]["modes"]} for task in tasks}


def _of_mode(record: dict[str, Any], mode: str, task: str) -> Figures:
    """What a mode's answers come to. tau, acceptance and tok/s are over all tokens; speed-ups by prompt as well."""
    everything = [answer for answer in record["answers"] if "error" not in answer]
    mine = [answer for answer in record["answers"] if answer["mode"] == mode and task in (answer["task"], ALL)]
    good = [answer for answer in mine if "error" not in answer]
    rounds = _rounds(good)
    tokens, drafted, accepted = map(int, rounds[:, :3].sum(axis=0))
    parts = rounds[:, 3:].sum(axis=0).tolist()
    n = max(1, len(rounds))
    about, target = record["modes"].get(mode, {}), record.get("target_step", {})
    wall, reading = sum(answer["seconds"] for answer in good), sum(map(_reading, good))
    first = [answer["prompt_seconds"] + answer["first_token_seconds"] for answer in good]
    out: Figures = {
        "answers": len(good),
        "failed": len(mine) - len(good),
        "tokens": tokens,
        "rounds": len(rounds),
        "tau": tokens / n,
        "drafted": drafted,
        "acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_by_position": by_position(rounds),
        **{f"{name}_ms": 1000 * part / n for name, part in zip(("draft", "verify", "host"), parts, strict=True)},
        "tokens_per_second": tokens / sum(parts) if tokens else None,
        "first_token_seconds": statistics.median(first) if first else None,
        "parted": _parted(good, everything),
        "memory_bytes": about.get("memory_bytes"),
        # The share of wall time, taken by a clock of its own around an answer, that no part of a round explains.
        "unaccounted": 1 - (sum(parts) + reading) / wall if wall else None,
        "speedup_over_plain": speedup(good, everything, "plain"),
        "speedup_over_full": speedup(good, everything, "full"),
        "speedup_priced": priced(good, everything),
    }
    if step := about.get("step"):
        for kind in ("params", "bytes"):
            out[f"mbsu_{kind}"] = mbsu(out["tau"], step[kind] / target[kind], out["drafted"] / n)
        if out["speedup_over_plain"] is not None:
            out["share_of_ceiling"] = out["speedup_over_plain"]["total"] / out["mbsu_bytes"]
    return out


def by_position(rounds: np.ndarray) -> list[float]:
    """The share of drafts at each place of a round that were accepted, of those that were drafted there."""
    drafted, accepted = rounds[:, 1], rounds[:, 2]
    return [float((accepted[drafted > i] > i).mean()) for i in range(int(drafted.max(initial=0)))]


def speedup(good: Sequence[Answer], everything: Sequence[Answer], base: str) -> dict[str, float] | None:
    """Tokens per second over those of mode `base` on the same prompts: in total, and quartiles of the prompts' ratios.

    "overall" counts reading the prompt, too. None where the base has none of them.
    """
    mine, theirs = _by_prompt(good), _by_prompt(answer for answer in everything if answer["mode"] == base)
    both = mine.keys() & theirs.keys()
    if not both:
        return None
    ratios = [_median_rate(mine[key]) / _median_rate(theirs[key]) for key in both]
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    ours, others = ([answer for key in found if key in both for answer in found[key]] for found in (mine, theirs))
    return {
        "total": _rate(ours) / _rate(others),
        "overall": _rate(ours, prompt=True) / _rate(others, prompt=True),
        "least": min(ratios),
        "low": low,
        "median": middle,
        "high": high,
    }


def priced(good: Sequence[Answer], everything: Sequence[Answer]) -> dict[str, float] | None:
    """The speed-up over plain with every batch at its usual price, so without the machine's noise: total and least.

    A batch costs the median of those of its size that this prompt saw, in any mode; where these are too few, as many
    times the prompt's batch of one as the medians of the whole record say. Drafting and Python cost what they took.
    """
    plain = [answer for answer in everything if answer["mode"] == "plain"]
    if not plain:
        return None
    host = float(np.median(_rounds(plain)[:, 5]))
    usual = {size: statistics.median(found) for size, found in _batches(everything).items()}
    prompts = _by_prompt(everything)
    costs = []  # (seconds at these prices, seconds of plain decoding) of every prompt
    for key, answers in _by_prompt(good).items():
        seen = _batches(prompts[key])
        if 1 not in seen:
            continue
        one = statistics.median(seen[1])
        price = {
            size: statistics.median(found) if size == 1 or len(found) >= FEW else one * usual[size] / usual[1]
            for size, found in seen.items()
        }
        rounds = _rounds(answers)
        took = sum(price[int(drafted) + 1] for drafted in rounds[:, 1]) + rounds[:, 3].sum() + rounds[:, 5].sum()
        costs.append((float(took), float(rounds[:, 0].sum() * (one + host))))
    if not costs:
        return None
    took, whole = map(sum, zip(*costs, strict=True))
    return {"total": whole / took, "least": min(b / a for a, b in costs)}


def _rounds(answers: Iterable[Answer]) -> np.ndarray:
    """All rounds (n x 6): tokens, drafted, accepted, and the seconds of drafting, verifying and Python.

    Raises ValueError for what no round is.
    """
    found = np.array([round_ for answer in answers for round_ in answer["rounds"]], float).reshape(-1, 6)
    tokens, drafted, accepted = found.T[:3]
    if not (np.isfinite(found).all() and (accepted >= 0).all() and (accepted <= drafted).all()):
        raise ValueError("a round accepts what was not drafted, or is no numbers")
    if max(drafted.max(initial=0), tokens.max(initial=0)) > MOST_DRAFTED:
        raise ValueError("a round has more tokens than any batch")
    return found


def _batches(answers: Iterable[Answer]) -> dict[int, list[float]]:
    """Seconds of the target's batches by their size."""
    found = defaultdict(list)
    for round_ in _rounds(answers):
        found[int(round_[1]) + 1].append(float(round_[4]))
    return found


def _by_prompt(answers: Iterable[Answer]) -> dict[tuple[str, int], list[Answer]]:
    found = defaultdict(list)
    for answer in answers:
        found[answer["prompt"], answer["turn"]].append(answer)
    return found


def _rate(answers: Sequence[Answer], prompt: bool = False) -> float:
    """Tokens per second; with the reading of the prompt by target and drafter, or without."""
    rounds = _rounds(answers)
    reading = sum(answer["prompt_seconds"] + _reading(answer) for answer in answers) if prompt else 0.0
    return float(rounds[:, 0].sum()) / float(rounds[:, 3:].sum() + reading)


def _median_rate(repeats: Iterable[Answer]) -> float:
    return statistics.median(_rate([answer]) for answer in repeats)


def _reading(answer: Answer) -> float:
    """What a drafter took to read the prompt before the first round."""
    return max(0.0, float(answer["first_token_seconds"] - sum(answer["rounds"][0][3:6])))


def place(answer: Answer) -> tuple[str, int, int, str]:
    """What tells an answer from all others: its prompt, the turn in it, which repeat it is, and its mode."""
    return answer["prompt"], answer["turn"], answer["repeat"], answer["mode"]


def _parted(good: Sequence[Answer], everything: Sequence[Answer]) -> int:
    """Answers whose text is not the plain one's: at near-ties of a quantised target, where batch shapes differ."""
    plain = {place(answer)[:3]: answer["token_ids"] for answer in everything if answer["mode"] == "plain"}
    return sum(plain.get(place(answer)[:3], answer["token_ids"]) != answer["token_ids"] for answer in good)
