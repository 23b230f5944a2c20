"""From raw rounds to figures, by mode and task; everything here can be computed again from a record."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from gguf_trim.planning.planner import mbsu

ALL = "all"
FEW = 5  # batches of one size; the median of fewer says little
Answer = dict[str, Any]


def figures(record: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """{task: {mode: figures}}, with every task and "all" of them; modes and tasks in the record's order."""
    answers: list[Answer] = record["answers"]
    tasks = [*dict.fromkeys(found["task"] for found in answers), ALL]
    return {
        task: {
            mode: mode_figures(
                [found for found in answers if found["mode"] == mode and task in (found["task"], ALL)],
                record["answers"],
                record["modes"].get(mode, {}),
                record.get("target_step", {}),
            )
            for mode in record["settings"]["modes"]
        }
        for task in tasks
    }


def mode_figures(
    found: Sequence[Answer], everything: Sequence[Answer], mode: dict[str, Any], target: dict[str, float]
) -> dict[str, Any]:
    """What a mode's answers come to. tau, acceptance and tok/s are over all tokens; speed-ups by prompt as well."""
    good = [answer for answer in found if "error" not in answer and answer["rounds"]]
    rounds = [round_ for answer in good for round_ in answer["rounds"]]
    tokens, drafted, accepted = (sum(round_[i] for round_ in rounds) for i in range(3))
    parts = [sum(round_[i] for round_ in rounds) for i in (3, 4, 5)]
    n = max(1, len(rounds))
    tau = tokens / n
    out: dict[str, Any] = {
        "answers": len(good),
        "failed": len(found) - len(good),
        "tokens": tokens,
        "rounds": len(rounds),
        "tau": tau,
        "drafted": drafted,
        "acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_by_position": by_position(rounds),
        "draft_ms": 1000 * parts[0] / n,
        "verify_ms": 1000 * parts[1] / n,
        "host_ms": 1000 * parts[2] / n,
        "tokens_per_second": tokens / sum(parts) if tokens else None,
        "first_token_seconds": _median(answer["prompt_seconds"] + answer["first_token_seconds"] for answer in good),
        "parted": _parted(good, everything),
        "memory_bytes": mode.get("memory_bytes"),
        "unaccounted": _unaccounted(good),
    }
    for name in ("plain", "full"):
        out[f"speedup_over_{name}"] = speedup(good, everything, name)
    out["speedup_priced"] = priced(good, everything)
    if step := mode.get("step"):
        length = drafted / n
        out["mbsu_params"] = mbsu(tau, step["params"] / target["params"], length)
        out["mbsu_bytes"] = mbsu(tau, step["bytes"] / target["bytes"], length)
        if (found_speed := out["speedup_over_plain"]) is not None:
            out["share_of_ceiling"] = found_speed["total"] / out["mbsu_bytes"]
    return out


def by_position(rounds: Iterable[Sequence[float]]) -> list[float]:
    """The share of drafts at each place of a round that were accepted, of those that were drafted there."""
    drafted: list[int] = []
    accepted: list[int] = []
    for round_ in rounds:
        for i in range(int(round_[1])):
            if i == len(drafted):
                drafted.append(0)
                accepted.append(0)
            drafted[i] += 1
            accepted[i] += i < round_[2]
    return [a / d for a, d in zip(accepted, drafted, strict=True)]


def speedup(good: Sequence[Answer], everything: Sequence[Answer], base: str) -> dict[str, float] | None:
    """Tokens per second over those of mode `base` on the same prompts: in total, and quartiles of the prompts' ratios.

    "overall" counts reading the prompt, too. None where the base has none of them.
    """
    mine, theirs = _by_prompt(good), _by_prompt(a for a in everything if a["mode"] == base and "error" not in a)
    both = [key for key in mine if key in theirs]
    if not both:
        return None
    ratios = [_rate(mine[key]) / _rate(theirs[key]) for key in both]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(both) > 1 else ratios * 3

    def total(found: dict[Any, list[Answer]], prompt: bool = False) -> float:
        chosen = [answer for key in both for answer in found[key]]
        seconds = sum(_seconds(answer) + (answer["prompt_seconds"] + _reading(answer)) * prompt for answer in chosen)
        return float(_tokens(chosen) / seconds)

    return {
        "total": total(mine) / total(theirs),
        "overall": total(mine, prompt=True) / total(theirs, prompt=True),
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
    sizes: dict[int, list[float]] = {}
    seen: dict[tuple[str, int], dict[int, list[float]]] = {}
    for answer in everything:
        for round_ in answer.get("rounds", ()):
            for of in (sizes, seen.setdefault((answer["prompt"], answer["turn"]), {})):
                of.setdefault(int(round_[1]) + 1, []).append(round_[4])
    hosts = [round_[5] for a in everything if a["mode"] == "plain" for round_ in a.get("rounds", ())]
    if not hosts:
        return None
    host = statistics.median(hosts)
    factor = {size: statistics.median(found) / statistics.median(sizes[1]) for size, found in sizes.items()}
    tokens = seconds = plain = 0.0
    least = []
    for key, answers in _by_prompt(good).items():
        if 1 not in seen[key]:
            continue
        one = statistics.median(seen[key][1])
        price = {
            size: statistics.median(found) if size == 1 or len(found) >= FEW else one * factor[size]
            for size, found in seen[key].items()
        }
        took = sum(price[int(r[1]) + 1] + r[3] + r[5] for answer in answers for r in answer["rounds"])
        n = _tokens(answers)
        tokens, seconds, plain = tokens + n, seconds + took, plain + n * (one + host)
        least.append(n * (one + host) / took)
    return {"total": plain / seconds, "least": min(least)} if least else None


def _by_prompt(answers: Iterable[Answer]) -> dict[tuple[str, int], list[Answer]]:
    found: dict[tuple[str, int], list[Answer]] = {}
    for answer in answers:
        if answer["rounds"]:
            found.setdefault((answer["prompt"], answer["turn"]), []).append(answer)
    return found


def _seconds(answer: Answer) -> float:
    return float(sum(sum(round_[3:6]) for round_ in answer["rounds"]))


def _reading(answer: Answer) -> float:
    """What a drafter took to read the prompt before the first round."""
    return max(0.0, float(answer["first_token_seconds"] - sum(answer["rounds"][0][3:6])))


def _tokens(answers: Iterable[Answer]) -> int:
    return sum(int(round_[0]) for answer in answers for round_ in answer["rounds"])


def _rate(answers: Sequence[Answer]) -> float:
    """Tokens per second of a prompt: the median of its repeats."""
    return float(statistics.median(_tokens([answer]) / _seconds(answer) for answer in answers))


def _unaccounted(good: Sequence[Answer]) -> float | None:
    """The share of wall time, taken by a clock of its own around an answer, that no part of a round explains."""
    wall = sum(answer["seconds"] for answer in good)
    return 1 - sum(_seconds(answer) + _reading(answer) for answer in good) / wall if wall else None


def _parted(good: Sequence[Answer], everything: Sequence[Answer]) -> int:
    """Answers whose text is not the plain one's: at near-ties of a quantised target, where batch shapes differ."""
    plain = {
        (answer["prompt"], answer["turn"], answer["repeat"]): answer["token_ids"]
        for answer in everything
        if answer["mode"] == "plain" and "error" not in answer
    }
    return sum(
        plain.get((answer["prompt"], answer["turn"], answer["repeat"]), answer["token_ids"]) != answer["token_ids"]
        for answer in good
    )


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None
