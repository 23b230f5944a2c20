"""What a newcomer sees first: what the cut brings to a draft step, three answers, and whether drafting pays here."""

from __future__ import annotations

import statistics
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf_trim.format.mtp import DrafterSource, MtpBlock, OwnBlock
from llamabase.cli.progress import progress
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import head_tensor
from llamabase.sampling.settings import GREEDY
from runner.loop.engine import Engine
from runner.loop.record import Record
from runner.options import FULL, Models

from .modes import SPEC, Files, open_modes
from .report import table
from .runs import answer
from .steps import paying, ratios, time_steps

PROMPTS = (
    "Write a Python function that returns the n-th Fibonacci number, with a docstring and a short test.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take? Explain each step.",
    "Summarise in three sentences why the sky is blue and sunsets are red.",
)
DRAFTS = 3  # a round, the same for both drafters
REPEAT = 5  # steps of each kind that are timed


def the_cut(found: Models, files: Files, max_tokens: int) -> dict[str, Any]:
    """The uncut drafter beside the trimmed one: rows and bytes of a step, its time, and what becomes of its drafts."""
    steps = time_steps(files, found, REPEAT)
    pays = paying(steps)
    ways = (FULL, _way(pays))
    out: dict[str, Any] = {
        "draft_max": DRAFTS,
        "verify_4": ratios(steps)["verify 4"][1],
        "paying": {way: pays[way] for way in ways},
    }
    with (
        replace(found, draft=None).open() as engine,
        open_modes(ways, files, engine, found, DRAFTS) as modes,
        progress("drafting", len(modes) * len(PROMPTS), "answers") as advance,
    ):
        for mode in modes:
            rounds: list[list[float]] = []
            for text in PROMPTS:
                rounds += answer(engine, mode, _asked(engine, text), GREEDY, max_tokens, 0)["rounds"]
                advance(1)
            tokens, drafted, accepted = (int(sum(column)) for column in list(zip(*rounds, strict=True))[:3])
            judged = sum(min(round_[1], round_[2] + 1) for round_ in rounds)
            assert mode.file is not None
            out[mode.name] = {
                "file": mode.file.name,
                "rows": _rows(mode.file, files.target),
                "bytes": mode.step()[1],
                "seconds": statistics.median(steps["seconds"][mode.name]),
                "tau": tokens / len(rounds),
                "acceptance": accepted / max(drafted, 1),
                "per_draft": accepted / max(judged, 1),
            }
    return out


def _rows(drafter: DrafterSource, target: Path) -> int:
    """Rows of the head that a drafter drafts from."""
    if isinstance(drafter, OwnBlock):
        return MtpBlock.of(GGUFFile(target)).n_vocab
    return head_tensor(GGUFFile(drafter)).n_rows


def _way(named: Container[str]) -> str:
    """What the trimmed drafter drafts from: the most that its files allow."""
    return SPEC if SPEC in named else "trim"


def _asked(engine: Engine, text: str) -> list[int]:
    return engine.prompt([{"role": "user", "content": text}])


def cut_table(cut: dict[str, Any]) -> str:
    """`the_cut` for people, under 80 columns."""
    full, trimmed = cut[FULL], cut[_way(cut)]
    some = " and those chosen as it goes" * (SPEC in cut)

    def both(name: str, unit: str, scale: float) -> tuple[str, str]:
        a, b = full[name], trimmed[name]
        return f"{scale * a:.1f} {unit}", f"{scale * b:.1f} {unit} ({b / a:.2f} x)"

    rows = [
        ["rows of its head", f"{full['rows']:,}", f"{trimmed['rows']:,}{some}"],
        ["read per draft step", *both("bytes", "MB", 1e-6)],
        ["a draft step here", *both("seconds", "ms", 1e3)],
        [f"acceptance, {cut['draft_max']} drafts a round", f"{full['acceptance']:.2f}", f"{trimmed['acceptance']:.2f}"],
        ["tokens per target call", f"{full['tau']:.2f}", f"{trimmed['tau']:.2f}"],
    ]
    return table(["drafter", "uncut", "trimmed"], rows)


def answers(found: Models, max_tokens: int, draft_max: int | None) -> list[dict[str, Any]]:
    """Every prompt plainly and with drafts, by turns."""
    rows = []
    with found.open() as engine, progress("generating", 2 * len(PROMPTS), "answers") as advance:
        if draft_max is None:
            engine.measure()  # or the first answer's prompt would seem to take as long
        for i, text in enumerate(PROMPTS):
            plain, drafted = Record(), Record()
            for record, n in ((plain, 0), (drafted, draft_max))[:: 1 if i % 2 else -1]:
                for _ in engine.pieces(_asked(engine, text), GREEDY, record, max_tokens=max_tokens, draft_max=n):
                    pass
                advance(1)
            ratio = drafted.tokens_per_second / plain.tokens_per_second
            shown = f"[{drafted.line()}; plain {plain.tokens_per_second:.1f} tok/s; ratio {ratio:.2f}; Python "
            shown += f"{drafted.host_seconds / drafted.seconds:.1%}]"
            row = {"prompt": text, "plain": plain.as_json(), "drafted": drafted.as_json(), "ratio": ratio}
            rows.append(row | {"line": shown})
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
    way = _way(cut)
    least, stands = cut["paying"][way]["from"], cut[way]["per_draft"]
    costs = (
        f"verifying four tokens takes {cut['verify_4']:.1f} times as long as one (1 where only memory counts, 4 where "
        "only arithmetic does)"
    )
    if least is None:
        return f"Drafting does not pay here: {costs}, so not even drafts that always stand would."
    asks = f"drafts pay where {least['acceptance']:.0%} of them stand, and {stands:.0%} do"
    if stands < least["acceptance"]:
        return f"Drafting does not pay here: {costs}, so {asks}. The default drafts only what the text repeats."
    drafted, plain = (
        sum(row[name]["tokens"] for row in record["prompts"]) / sum(row[name]["seconds"] for row in record["prompts"])
        for name in ("drafted", "plain")
    )
    return f"Drafting pays here: {costs}, so {asks}; {drafted / plain:.2f} x plain decoding on these three prompts."
