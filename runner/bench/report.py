"""A benchmark's record for people: Markdown tables, plots, and two records side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llamabase.errors import TrimError
from llamabase.files import PLOT, write_whole

from .figures import ALL, figures


def _number(form: str, scale: float = 1.0) -> Callable[[Any], str]:
    return lambda value: "-" if value is None else format(scale * value, form)


ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tau": lambda f: _number(".2f")(f["tau"]),
    "acceptance": lambda f: _number(".3f")(f["acceptance_rate"]),
    "tok/s": lambda f: _number(".1f")(f["tokens_per_second"]),
    "x plain": lambda f: _speed(f, "plain", "total"),
    "  lower quartile": lambda f: _speed(f, "plain", "low"),
    "  upper quartile": lambda f: _speed(f, "plain", "high"),
    "  least prompt": lambda f: _speed(f, "plain", "least"),
    "  with the prompt read": lambda f: _speed(f, "plain", "overall"),
    "  at median step costs": lambda f: _number(".2f")((f["speedup_priced"] or {}).get("total")),
    "  of these, least prompt": lambda f: _number(".2f")((f["speedup_priced"] or {}).get("least")),
    "x full": lambda f: _speed(f, "full", "total"),
    "MBSU by parameters": lambda f: _number(".2f")(f.get("mbsu_params")),
    "MBSU by bytes": lambda f: _number(".2f")(f.get("mbsu_bytes")),
    "  share reached": lambda f: _number(".0%")(f.get("share_of_ceiling")),
    "a round: draft ms": lambda f: _number(".1f")(f["draft_ms"]),
    "  verify ms": lambda f: _number(".1f")(f["verify_ms"]),
    "  Python ms": lambda f: _number(".2f")(f["host_ms"]),
    "first token s": lambda f: _number(".2f")(f["first_token_seconds"]),
    "drafter's memory MB": lambda f: _number(".0f", 1e-6)(f["memory_bytes"]),
    "texts that part": lambda f: str(f["parted"]),
}


def _speed(f: dict[str, Any], base: str, which: str) -> str:
    return _number(".2f")((f[f"speedup_over_{base}"] or {}).get(which))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned for reading as text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def report(record: dict[str, Any]) -> str:
    """The tables of a record: all modes, then tau and speed by task, then what failed, is missing, or stands beside."""
    found = figures(record)
    whole = found[ALL]
    modes = list(whole)
    parts = [table(["", *modes], [[name, *(cell(whole[mode]) for mode in modes)] for name, cell in ROWS.items()])]
    tasks = [task for task in found if task != ALL]
    if len(tasks) > 1:
        rows = [
            [task, str(found[task][modes[0]]["answers"]), *(_task_cell(found[task][mode]) for mode in modes)]
            for task in tasks
        ]
        parts.append("Speed, plain = 1, and tau by task:\n\n" + table(["task", "answers", *modes], rows))
    for mode, f in whole.items():
        if f["failed"]:
            parts.append(f"{mode}: failed on {f['failed']} answers, which are not in its figures:")
            parts += sorted({f"    {a['error']}" for a in record["answers"] if a["mode"] == mode and "error" in a})
    if record.get("missing"):
        parts.append(f"Interrupted: {record['missing']} answers are missing; run the same command again to go on.")
    if peers := record.get("peers"):
        parts.append(_peers(peers))
    return "\n\n".join(parts)


def _task_cell(f: dict[str, Any]) -> str:
    speed = (f["speedup_over_plain"] or {}).get("total")
    return f"{_number('.2f')(speed)}, {f['tau']:.2f}"


def _peers(peers: dict[str, Any]) -> str:
    rows = [
        [row["name"], _number(".2f")(row.get("tau")), _number(".1f")(row["tokens_per_second"]), row.get("ratio", "-")]
        for row in peers["rows"]
    ]
    return "llama.cpp's own tools, in the same run:\n\n" + table(["", "tau", "tok/s", "ours / theirs"], rows)


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
            f"{_number('.3f')(f['acceptance_rate'])}, {_number('.3f')(g['acceptance_rate'])}",
            f"{_speed(f, 'plain', 'total')}, {_speed(g, 'plain', 'total')}",
            _number(".2f")((g["tokens_per_second"] or 0) / f["tokens_per_second"] if f["tokens_per_second"] else None),
        ])  # fmt: skip
    return "\n".join(lines) + "\n\n" + table(["A, B", "tau", "acceptance", "x plain", "tok/s B / A"], rows)


def _figure(path: Path, size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TrimError(f"{path}: plots need the extra: pip install 'gguf-trim[plot]'") from error
    return Figure(figsize=size, layout="constrained")


def plot_side_by_side(records: Sequence[dict[str, Any]], labels: Sequence[str], path: Path) -> None:
    """Speed of every mode, one group of bars for each record, as a PNG. Needs the extra [plot]."""
    figure = _figure(path, (8, 3.6))
    axes = figure.subplots()
    found = [figures(record)[ALL] for record in records]
    modes = [mode for mode in found[0] if mode not in ("plain", "again") and all(mode in other for other in found)]
    if not modes:
        raise TrimError("the records have no mode in common but plain decoding")
    width = 0.8 / len(modes)
    for i, mode in enumerate(modes):
        heights = [(other[mode]["speedup_over_plain"] or {}).get("total", 0.0) for other in found]
        bars = axes.bar([x + i * width for x in range(len(found))], heights, width, label=mode)
        axes.bar_label(bars, fmt="%.2f", fontsize="small")
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(found))], labels)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("tokens per second, plain = 1")
    figure.legend(loc="outside lower center", ncols=len(modes), fontsize="small")
    with write_whole(path, PLOT) as file:
        figure.savefig(file, format="png", dpi=110)


def plot(record: dict[str, Any], path: Path) -> None:
    """Speed by task, acceptance by position and the time of a round, as a PNG. Needs the extra [plot]."""
    figure = _figure(path, (11, 9))
    found = figures(record)
    modes = list(found[ALL])
    speed, accepted, parts = figure.subplots(3, 1)
    width = 0.8 / len(modes)
    for i, mode in enumerate(modes):
        heights = [(found[task][mode]["speedup_over_plain"] or {}).get("total", 0.0) for task in found]
        speed.bar([x + i * width for x in range(len(found))], heights, width, label=mode)
        positions = found[ALL][mode]["acceptance_by_position"]
        if positions:
            accepted.plot(range(1, len(positions) + 1), positions, "-o", label=mode)
    speed.set_xticks([x + 0.4 - width / 2 for x in range(len(found))], list(found))
    speed.axhline(1, color="black", linewidth=0.8)
    speed.set_ylabel("tokens per second, plain = 1")
    accepted.set(xlabel="position in the draft", ylabel="accepted of those drafted", ylim=(0, 1.02))
    left = [0.0] * len(modes)
    for name in ("verify", "draft", "host"):
        values = [found[ALL][mode][f"{name}_ms"] for mode in modes]
        parts.barh(modes, values, left=left, label="Python" if name == "host" else name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    parts.set_xlabel("ms per round")
    speed.legend(fontsize="small", ncols=len(modes), loc="lower right")
    for axes in (accepted, parts):
        axes.legend(fontsize="small", ncols=4)
    accepted.xaxis.get_major_locator().set_params(integer=True)
    with write_whole(path, PLOT) as file:
        figure.savefig(file, format="png", dpi=110)
