"""A benchmark's record for people: tables of at most 100 columns, plots, and two records side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamabase.errors import TrimError
from llamabase.files import PLOT, write_whole

from .figures import ALL, Figures, figures

WIDTH = 100


def number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned for reading as text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _speed(f: Figures, which: str = "total") -> float | None:
    return (f["speedup_over_plain"] or {}).get(which)


def report(record: dict[str, Any]) -> str:
    """All modes, then their speed by task where that is not too wide, then what failed, is missing, or stands beside.

    Everything else that was reckoned is in the record alone.
    """
    found = record["figures"]
    header = ["mode", "tau", "acceptance", "tok/s", "x plain (quartiles)", "with prompt", "MBSU bytes"]
    rows = []
    for mode, f in found[ALL].items():
        quartiles = "" if _speed(f) is None else f" ({_speed(f, 'low'):.2f} to {_speed(f, 'high'):.2f})"
        rows.append([
            mode,
            number(f["tau"]),
            number(f["acceptance_rate"], ".3f"),
            number(f["tokens_per_second"], ".1f"),
            number(_speed(f)) + quartiles,
            number(_speed(f, "overall")),
            number(f.get("mbsu_bytes")),
        ])  # fmt: skip
    parts = [table(header, rows)]
    tasks = [task for task in found if task != ALL]
    by_task = table(
        ["x plain", *tasks], [[mode, *(number(_speed(found[task][mode])) for task in tasks)] for mode in found[ALL]]
    )
    if len(tasks) > 1 and by_task.index("\n") <= WIDTH:
        parts.append(by_task)
    for mode, f in found[ALL].items():
        if f["failed"]:
            parts.append(f"{mode}: failed on {f['failed']} answers, which are not in its figures:")
            parts += sorted({f"    {a['error']}" for a in record["answers"] if a["mode"] == mode and "error" in a})
    if record.get("missing"):
        parts.append(f"Interrupted: {record['missing']} answers are missing; run the same command again to go on.")
    if peers := record.get("peers"):
        rows = [
            [row["name"], number(row.get("tau")), number(row["tokens_per_second"], ".1f"), row.get("ratio", "-")]
            for row in peers["rows"]
        ]
        header = ["llama.cpp's own tools, in the same run", "tau", "tok/s", "ours / theirs"]
        parts.append(table(header, rows))
    return "\n\n".join(parts)


def compare(a: dict[str, Any], b: dict[str, Any], names: tuple[str, str]) -> str:
    """Two records, mode by mode: B over A."""
    first, second = figures(a)[ALL], figures(b)[ALL]
    modes = [mode for mode in first if mode in second]
    if not modes:
        raise TrimError(f"{names[0]} and {names[1]}: have no mode in common")
    lines = []
    for key in ("cpu", "cores", "llama_cpp_python", "date"):
        x, y = a["machine"].get(key), b["machine"].get(key)
        lines.append(f"{key}: {x}" if x == y else f"{key}: {x} | {y}")
    for which in ("target", "full", "trimmed"):
        x, y = ([f["sha256"] for f in record["files"].get(which, [])] for record in (a, b))
        if x != y and (which != "full" or any(mode.startswith("full") for mode in modes)):
            lines.append(f"the {which} files differ: no comparison of like with like")
    rows = []
    for mode in modes:
        f, g = first[mode], second[mode]
        rows.append([
            mode,
            f"{f['tau']:.2f}, {g['tau']:.2f}",
            f"{number(f['acceptance_rate'], '.3f')}, {number(g['acceptance_rate'], '.3f')}",
            f"{number(_speed(f))}, {number(_speed(g))}",
            number((g["tokens_per_second"] or 0) / f["tokens_per_second"] if f["tokens_per_second"] else None),
        ])  # fmt: skip
    return "\n".join(lines) + "\n\n" + table(["A, B", "tau", "acceptance", "x plain", "tok/s B / A"], rows)


@contextmanager
def _drawn(path: Path, height: float, n_axes: int) -> Iterator[Any]:
    """Axes, one below another, that are written as a PNG when they are filled. Needs the extra [plot]."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TrimError(f"{path}: plots need the extra: pip install 'gguf-trim[plot]'") from error
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots(n_axes, squeeze=False)[:, 0]
    yield axes
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize="small")
    with write_whole(path, PLOT) as file:
        figure.savefig(file, format="png", dpi=110)


def _draw_speeds(axes: Any, groups: dict[str, dict[str, Figures]], modes: Sequence[str]) -> None:
    """Bars of every mode's speed, for each group of figures."""
    width = 0.8 / len(modes)
    for i, mode in enumerate(modes):
        heights = [_speed(found[mode]) or 0.0 for found in groups.values()]
        axes.bar([x + i * width for x in range(len(groups))], heights, width, label=mode)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(groups))], list(groups))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("tokens per second, plain = 1")


def plot_side_by_side(records: Sequence[dict[str, Any]], labels: Sequence[str], path: Path) -> None:
    """Speed of every mode, one group of bars for each record."""
    found = [figures(record)[ALL] for record in records]
    modes = [mode for mode in found[0] if mode not in ("plain", "again") and all(mode in other for other in found)]
    if not modes:
        raise TrimError("the records have no mode in common but plain decoding")
    with _drawn(path, 4, 1) as (axes,):
        _draw_speeds(axes, dict(zip(labels, found, strict=True)), modes)
        for bars in axes.containers:
            axes.bar_label(bars, fmt="%.2f", fontsize="small")


def plot(record: dict[str, Any], path: Path) -> None:
    """Speed by task, acceptance by position and the time of a round."""
    found: dict[str, dict[str, Figures]] = record["figures"]
    whole = found[ALL]
    with _drawn(path, 9, 3) as (speeds, accepted, parts):
        _draw_speeds(speeds, found, list(whole))
        left = [0.0] * len(whole)
        for name in ("verify", "draft", "host"):
            values = [f[f"{name}_ms"] for f in whole.values()]
            parts.barh(list(whole), values, left=left, label="Python" if name == "host" else name)
            left = [a + b for a, b in zip(left, values, strict=True)]
        for f in whole.values():
            positions = f["acceptance_by_position"]
            accepted.plot(range(1, len(positions) + 1), positions, "-o")
        accepted.set(xlabel="position in the draft", ylabel="accepted of those drafted", ylim=(0, 1.02))
        accepted.xaxis.get_major_locator().set_params(integer=True)
        parts.set_xlabel("ms per round")
        parts.legend(fontsize="small")
