"""A benchmark's record for people: tables of at most 100 columns, a plot, and two records side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamabase.cli.plot import drawing
from llamabase.errors import TrimError

from .figures import ALL, Figures

WIDTH = 100


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned for reading as text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _speed(f: Figures, which: str = "total") -> float | None:
    return (f["speedup_over_plain"] or {}).get(which)


def report(record: dict[str, Any]) -> str:
    """All modes, their speed by task if that table is narrow enough, failures, what is missing, llama.cpp's tools."""
    figures = record["figures"]
    rows = []
    for mode, f in figures[ALL].items():
        quartiles = "" if _speed(f) is None else f" ({_speed(f, 'low'):.2f} to {_speed(f, 'high'):.2f})"
        counted = _number(f["tau"]), _number(f["acceptance_rate"], ".3f"), _number(f["tokens_per_second"], ".1f")
        speeds = _number(_speed(f)) + quartiles, _number(_speed(f, "overall")), _number(f.get("mbsu_bytes"))
        rows.append([mode, *counted, *speeds])
    parts = [table(["mode", "tau", "acceptance", "tok/s", "x plain (quartiles)", "with prompt", "MBSU bytes"], rows)]
    drawn = {mode: record["modes"].get(mode, {}).get("vocab") for mode in figures[ALL] if mode.startswith("auto")}
    parts += [f"{mode} drafts from the vocabulary {vocab}." for mode, vocab in drawn.items() if vocab]
    tasks = [task for task in figures if task != ALL]
    rows = [[mode, *(_number(_speed(figures[task][mode])) for task in tasks)] for mode in figures[ALL]]
    by_task = table(["x plain", *tasks], rows)
    if len(tasks) > 1 and by_task.index("\n") <= WIDTH:
        parts.append(by_task)
    for mode, f in figures[ALL].items():
        if f["failed"]:
            parts.append(f"{mode}: failed on {f['failed']} answers, which are not in its figures:")
            parts += sorted({f"    {a['error']}" for a in record["answers"] if a["mode"] == mode and "error" in a})
    if record.get("missing"):
        parts.append(f"Interrupted: {record['missing']} answers are missing; run the same command again to go on.")
    if peers := record.get("peers"):
        rows = [
            [row["name"], _number(row.get("tau")), _number(row["tokens_per_second"], ".1f"), row.get("ratio", "-")]
            for row in peers["rows"]
        ]
        parts.append(table(["llama.cpp's own tools, in the same run", "tau", "tok/s", "ours / theirs"], rows))
    return "\n\n".join(parts)


def compare(a: dict[str, Any], b: dict[str, Any], names: tuple[str, str]) -> str:
    """Two records, mode by mode: B over A."""
    modes = [mode for mode in a["figures"][ALL] if mode in b["figures"][ALL]]
    if not modes:
        raise TrimError(f"{names[0]} and {names[1]}: have no mode in common")
    lines = []
    for key in ("cpu", "cores", "llama_cpp_python", "date"):
        x, y = a["machine"].get(key), b["machine"].get(key)
        lines.append(f"{key}: {x}" if x == y else f"{key}: {x} | {y}")
    for which in ("target", "full", "trimmed", "quant", "first"):
        x, y = ([file["sha256"] for file in record["files"].get(which, [])] for record in (a, b))
        if x != y and (which in ("target", "trimmed") or any(mode.startswith(which) for mode in modes)):
            lines.append(f"the {which} files differ, so the speeds are not comparable")
    rows = []
    for mode in modes:
        f, g = a["figures"][ALL][mode], b["figures"][ALL][mode]
        ratio = (g["tokens_per_second"] or 0) / f["tokens_per_second"] if f["tokens_per_second"] else None
        acceptance = (_number(x["acceptance_rate"], ".3f") for x in (f, g))
        speed = (_number(_speed(x)) for x in (f, g))
        rows.append([mode, f"{f['tau']:.2f}, {g['tau']:.2f}", ", ".join(acceptance), ", ".join(speed), _number(ratio)])
    return "\n".join(lines) + "\n\n" + table(["A, B", "tau", "acceptance", "x plain", "tok/s B / A"], rows)


def plot(labels: Sequence[str], groups: Sequence[dict[str, Figures]], path: Path) -> None:
    """Bars of every mode's speed over plain decoding's for each group, a task or a record, as a PNG.

    Only modes that all groups have are drawn. Needs the extra [plot].
    """
    modes = [mode for mode in groups[0] if all(mode in group for group in groups)]
    modes = [mode for mode in modes if mode not in ("plain", "again")] or modes
    width = 0.8 / len(modes)
    with drawing(path, (max(8, 0.35 * len(groups) * len(modes)), 4), dpi=110) as figure:
        axes = figure.subplots()
        for i, mode in enumerate(modes):
            heights = [_speed(group[mode]) or 0.0 for group in groups]
            bars = axes.bar([x + i * width for x in range(len(groups))], heights, width, label=mode)
            axes.bar_label(bars, fmt="%.2f", fontsize="small")
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(groups))], labels)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylabel("tokens per second, plain = 1")
        figure.legend(loc="outside lower center", ncols=len(modes), fontsize="small")
