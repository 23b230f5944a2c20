"""What a newcomer sees first: what the cut brings to a draft step, three answers, and whether drafting pays here."""

from __future__ import annotations

import statistics
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gguf_trim.format.memory_bound import draft_weights
from gguf_trim.pairs.catalog import load_catalog
from gguf_trim.pairs.fetch import is_here
from gguf_trim.pairs.prepare import prepare
from llamabase.cli.progress import progress
from llamabase.sampling.settings import GREEDY
from runner.draft.contracts import FULL
from runner.loop.engine import Engine
from runner.loop.record import Record
from runner.options import Models

from .modes import QUANT, SPEC, Files, find_files, open_modes, with_rivals
from .report import table
from .runs import drafted
from .steps import paying, ratios, time_steps

PROMPTS = (
    "Write a Python function that returns the n-th Fibonacci number, with a docstring and a short test.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take? Explain each step.",
    "Summarise in three sentences why the sky is blue and sunsets are red.",
)
DRAFTS = 3  # tokens drafted in a round, by either drafter
REPEAT = 5  # timed steps of each kind
BESIDE = "gemma-3-270m"  # 262,144 rows: of the drafters whose files can be had without an account, the largest head


def the_cut(models: Models, files: Files, max_tokens: int) -> dict[str, Any]:
    """The uncut drafter, as shipped and requantised, beside the trimmed one: what a step reads and takes, and what
    becomes of its drafts."""
    steps = time_steps(files, models, REPEAT)
    cut = _each(steps, files) | {"draft_max": DRAFTS, "verify_4": ratios(steps)["verify 4"][1], "paying": paying(steps)}
    kinds = [kind for kind in (FULL, QUANT, _kind(cut)) if kind in cut]
    with (
        replace(models, draft=None).open() as engine,
        open_modes(kinds, files, engine, models, DRAFTS) as modes,
        progress("drafting", len(modes) * len(PROMPTS), "answers") as advance,
    ):
        prompts = [_tokens(engine, text) for text in PROMPTS]
        for mode in modes:
            tokens, made, accepted = drafted(engine, mode, prompts, max_tokens, advance)
            judged = np.minimum(made, accepted + 1).sum()  # a draft after a rejected one is not judged
            cut[mode.name] |= {
                "tau": float(tokens.mean()),
                "acceptance": float(accepted.sum() / max(made.sum(), 1)),
                "per_draft": float(accepted.sum() / max(judged, 1)),
            }
    return cut


def _each(steps: dict[str, Any], files: Files) -> dict[str, Any]:
    """What a step of each drafter reads and takes, by what is drafted from."""
    kinds = (FULL, QUANT, *(kind for kind in ("trim", SPEC) if kind in steps["seconds"]))
    return {
        kind: {
            "file": source.name,
            "rows": draft_weights(source, files.target).n_rows,
            "bytes": steps["bytes"][kind],
            "seconds": statistics.median(steps["seconds"][kind]),
        }
        for kind in kinds
        if (source := files.of(kind, "")) is not None
    }


def beside(models: Models) -> dict[str, Any] | None:
    """A step of BESIDE, uncut and cut: of a drafter whose head is most of it. None if its file is not here."""
    pair = load_catalog().pair(BESIDE)
    if not is_here(pair.drafter):
        return None
    ready = prepare(BESIDE)
    models = replace(models, target=ready.target, draft=ready.trimmed, prepared=ready)
    files = with_rivals(find_files(models, Path(), None), [QUANT], Path())
    return _each(time_steps(files, models, REPEAT), files)


def _kind(names: Container[str]) -> str:
    """What the trimmed drafter drafts from: the most that its files allow."""
    return SPEC if SPEC in names else "trim"


def _tokens(engine: Engine, text: str) -> list[int]:
    return engine.prompt([{"role": "user", "content": text}])


COLUMNS = {FULL: "uncut", QUANT: "requantised", "trim": "trim", SPEC: "spec"}


def cut_table(cut: dict[str, Any]) -> str:
    """`the_cut`, or what is `beside` it, for people, under 80 columns."""
    kinds = [kind for kind in COLUMNS if kind in cut]
    whole = cut[FULL]["seconds"]
    lines: dict[str, list[str]] = {
        "rows of its head": [f"{cut[kind]['rows']:,}" for kind in kinds],
        "MB read per draft step": [f"{cut[kind]['bytes'] / 1e6:.1f}" for kind in kinds],
        "ms per draft step here": [f"{cut[kind]['seconds'] * 1e3:.1f}" for kind in kinds],
        "in steps of the uncut one": [f"{cut[kind]['seconds'] / whole:.2f}" for kind in kinds],
    }
    if "draft_max" in cut:
        for name, key in (
            (f"acceptance, {cut['draft_max']} drafts a round", "acceptance"),
            ("tokens a target call", "tau"),
        ):
            lines[name] = [f"{cut[kind][key]:.2f}" if key in cut[kind] else "-" for kind in kinds]
    return table(["drafter", *(COLUMNS[kind] for kind in kinds)], [[name, *cells] for name, cells in lines.items()])


def legend(cut: dict[str, Any]) -> str:
    """What the columns of `cut_table` are."""
    kind = Path(cut[QUANT]["file"]).stem.rpartition("-")[2] if QUANT in cut else ""
    parts = ["trim drafts from the rows that were kept"]
    if QUANT in cut:
        whole = "as shipped" if cut[QUANT]["file"] == cut[FULL]["file"] else kind
        parts.insert(0, f"requantised: uncut, in the type that is quickest here ({whole})")
    if SPEC in cut:
        parts.append("spec also from rows that are chosen at every step, on top of those")
    return "; ".join(parts) + "."


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
        because = f"{costs}, so not even drafts of the drafter that are always accepted would"
    else:
        because = f"{costs}, so drafts pay if {least['acceptance']:.0%} of them are accepted, and {accepted:.0%} are"
    if least is None or accepted < least["acceptance"]:
        return f"Drafting does not pay here: {because}. The default drafts only what the text repeats."
    seconds = {name: sum(row[name]["seconds"] for row in record["prompts"]) for name in ("plain", "drafted")}
    tokens = {name: sum(row[name]["tokens"] for row in record["prompts"]) for name in seconds}
    speedup = tokens["drafted"] / seconds["drafted"] / (tokens["plain"] / seconds["plain"])
    return f"Drafting pays here: {because}; {speedup:.2f} x plain decoding on these three prompts."
