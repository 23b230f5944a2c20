"""What a newcomer sees first: what the cut brings to a draft step, three answers, and whether drafting pays here."""

from __future__ import annotations

import statistics
from collections.abc import Container
from dataclasses import replace
from typing import Any

import numpy as np

from gguf_trim.format.memory_bound import draft_weights
from llamabase.cli.progress import progress
from llamabase.sampling.settings import GREEDY
from runner.draft.contracts import FULL
from runner.loop.engine import Engine
from runner.loop.record import Record
from runner.options import Models

from .modes import SPEC, Files, open_modes
from .report import table
from .runs import answer
from .steps import paying, ratios, time_steps

PROMPTS = (
    "Write a Python function that returns the n-th Fibonacci number, with a docstring and a short test.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take? Explain each step.",
    "Summarise in three sentences why the sky is blue and sunsets are red.",
)
DRAFTS = 3  # tokens drafted in a round, by either drafter
REPEAT = 5  # timed steps of each kind


def the_cut(models: Models, files: Files, max_tokens: int) -> dict[str, Any]:
    """The uncut drafter beside the trimmed one: rows and bytes of a step, its time, and what becomes of its drafts."""
    steps = time_steps(files, models, REPEAT)
    pays = paying(steps)
    kinds = FULL, _kind(pays)
    cut: dict[str, Any] = {"draft_max": DRAFTS, "verify_4": ratios(steps)["verify 4"][1]}
    cut["paying"] = {kind: pays[kind] for kind in kinds}
    with (
        replace(models, draft=None).open() as engine,
        open_modes(kinds, files, engine, models, DRAFTS) as modes,
        progress("drafting", len(modes) * len(PROMPTS), "answers") as advance,
    ):
        for mode in modes:
            rounds: list[list[float]] = []
            for text in PROMPTS:
                rounds += answer(engine, mode, _tokens(engine, text), GREEDY, max_tokens, 0)["rounds"]
                advance(1)
            tokens, drafted, accepted = np.array(rounds)[:, :3].T
            judged = np.minimum(drafted, accepted + 1).sum()  # a draft after a rejected one is not judged
            assert mode.file is not None
            cut[mode.name] = {
                "file": mode.file.name,
                "rows": draft_weights(mode.file, files.target).n_rows,
                "bytes": mode.step().bytes,
                "seconds": statistics.median(steps["seconds"][mode.name]),
                "tau": float(tokens.mean()),
                "acceptance": float(accepted.sum() / max(drafted.sum(), 1)),
                "per_draft": float(accepted.sum() / max(judged, 1)),
            }
    return cut


def _kind(names: Container[str]) -> str:
    """What the trimmed drafter drafts from: the most that its files allow."""
    return SPEC if SPEC in names else "trim"


def _tokens(engine: Engine, text: str) -> list[int]:
    return engine.prompt([{"role": "user", "content": text}])


def cut_table(cut: dict[str, Any]) -> str:
    """`the_cut` for people, under 80 columns."""
    full, trimmed = cut[FULL], cut[_kind(cut)]
    chosen = " and those chosen as it goes" * (SPEC in cut)

    def both(name: str, unit: str, scale: float) -> tuple[str, str]:
        a, b = full[name], trimmed[name]
        return f"{scale * a:.1f} {unit}", f"{scale * b:.1f} {unit} ({b / a:.2f} x)"

    rows = [
        ["rows of its head", f"{full['rows']:,}", f"{trimmed['rows']:,}{chosen}"],
        ["read per draft step", *both("bytes", "MB", 1e-6)],
        ["a draft step here", *both("seconds", "ms", 1e3)],
        [f"acceptance, {cut['draft_max']} drafts a round", f"{full['acceptance']:.2f}", f"{trimmed['acceptance']:.2f}"],
        ["tokens per target call", f"{full['tau']:.2f}", f"{trimmed['tau']:.2f}"],
    ]
    return table(["drafter", "uncut", "trimmed"], rows)


def answers(models: Models, max_tokens: int, draft_max: int | None) -> list[dict[str, Any]]:
    """Every prompt plainly and with drafts, by turns."""
    rows = []
    with models.open() as engine, progress("generating", 2 * len(PROMPTS), "answers") as advance:
        if draft_max is None:
            engine.measure()  # or its time would count as reading the first prompt
        for i, text in enumerate(PROMPTS):
            plain, drafted = Record(), Record()
            for record, n in ((plain, 0), (drafted, draft_max))[:: 1 if i % 2 else -1]:
                for _ in engine.pieces(_tokens(engine, text), GREEDY, record, max_tokens=max_tokens, draft_max=n):
                    pass
                advance(1)
            ratio = drafted.tokens_per_second / plain.tokens_per_second
            line = f"[{drafted.line()}; plain {plain.tokens_per_second:.1f} tok/s; ratio {ratio:.2f}; Python "
            line += f"{drafted.host_seconds / drafted.seconds:.1%}]"
            both = {"plain": plain.as_json(), "drafted": drafted.as_json()}
            rows.append({"prompt": text, **both, "ratio": ratio, "line": line})
    return rows


def texts(rows: list[dict[str, Any]]) -> str:
    """The answers, each with its closing line."""
    return "\n".join(
        f"> {row['prompt']}\n{row['drafted']['text']}{' ...' * (row['drafted']['finish_reason'] == 'length')}\n"
        f"{row['line']}\n"
        for row in rows
    )


def verdict(record: dict[str, Any]) -> str:
    """Whether drafting pays on this machine, in one sentence with its reason."""
    cut = record["cut"]
    least, accepted = cut["paying"][_kind(cut)]["from"], cut[_kind(cut)]["per_draft"]
    costs = (
        f"verifying four tokens takes {cut['verify_4']:.1f} times as long as one (1 if only memory counts, 4 if only "
        "arithmetic does)"
    )
    if least is None:
        return f"Drafting does not pay here: {costs}, so not even drafts that are always accepted would."
    because = f"{costs}, so drafts pay if {least['acceptance']:.0%} of them are accepted, and {accepted:.0%} are"
    if accepted < least["acceptance"]:
        return f"Drafting does not pay here: {because}. The default drafts only what the text repeats."
    seconds = {name: sum(row[name]["seconds"] for row in record["prompts"]) for name in ("plain", "drafted")}
    tokens = {name: sum(row[name]["tokens"] for row in record["prompts"]) for name in seconds}
    speedup = tokens["drafted"] / seconds["drafted"] / (tokens["plain"] / seconds["plain"])
    return f"Drafting pays here: {because}; {speedup:.2f} x plain decoding on these three prompts."
