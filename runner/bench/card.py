"""A report of a machine that people can post: a Markdown block and a small JSON, made of records of `steps` and `run`.

Only what is named here is taken from a record, and every string is checked: a report holds no path, and of a model's
file its name without the suffix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llamabase.errors import FileFormatError, TrimError
from llamabase.files import Kind, marked, read_text
from llamabase.llama.timing import medians

from .figures import ALL, figures
from .report import table
from .steps import paying, ratios

MOST = 50_000  # bytes of a report
REPORT = Kind("holds no report of a machine", marked(b"{", b'"report_of":', b'"steps":', b'"runs":'))
SAME = ("cpu", "cores", "gpus", "backends", "llama_cpp_python")  # what makes two records those of one machine
SHOWN = (*SAME, "memory_gb", "system", "ggml", "date")  # of the machine
WRONG = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def reports(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The reports among some files, and one that is made of the records of `steps` and `run` among them.

    Raises FileFormatError for any other file, and TrimError if the records are of several machines.
    """
    found, records = [], []
    for path in paths:
        text = read_text(path, "a record").strip()
        try:
            record = json.loads(text if text.startswith("{") else text.rpartition("\n")[2])
            if "report_of" in record:
                block(record)
                found.append(checked(record, str(path)))
            else:
                report_of([record], str(path))
                records.append(record)
        except WRONG as error:
            way_out = "make one with `bench steps -o FILE` or `bench run -o FILE`"
            raise FileFormatError(f"{path}: holds no record of steps or of a benchmark; {way_out}") from error
    return [*found, *([report_of(records, ", ".join(map(str, paths)))] if records else [])]


def report_of(records: Sequence[dict[str, Any]], source: str) -> dict[str, Any]:
    """The report that records of one machine make; `source` names them in errors."""
    machines = [record["machine"] for record in records]
    if any(a.get(key) != machines[0].get(key) for a in machines for key in SAME if key in a and key in machines[0]):
        raise TrimError(f"{source}: were measured on different machines; make a report of each")
    report = {
        "report_of": {key: machines[-1][key] for key in SHOWN if key in machines[-1]},
        "copy_gb_per_second": round(max(float(record["copy_bytes_per_second"]) for record in records) / 1e9, 1),
        "steps": [_steps(record) for record in records if "seconds" in record],
        "runs": [_run(record) for record in records if "seconds" not in record],
    }
    return checked(report, source)


def checked(report: dict[str, Any], source: str) -> dict[str, Any]:
    """The report itself. Raises TrimError if a string in it may be a path or a file's name, or if it is too large."""
    for text in _strings(report):
        if re.search(r"[/\\]|\.gguf$|\.json$", text):
            raise TrimError(f"{source}: a report would show {text!r}, which may be a path; take it out of the record")
    if (size := len(json.dumps(report, ensure_ascii=False).encode())) > MOST:
        raise TrimError(
            f"{source}: a report of them takes {size:,} bytes, and at most {MOST:,} can be posted; give fewer"
        )
    return report


def _strings(value: Any) -> Iterator[str]:
    """All strings in JSON, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *_strings(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _stem(name: str) -> str:
    return re.split(r"[/\\]", name)[-1].removesuffix(".gguf")


def _steps(record: dict[str, Any]) -> dict[str, Any]:
    ms = {name: round(1000 * seconds, 5) for name, seconds in medians(record["seconds"]).items()}
    times = {name: round(quartiles[1], 5) for name, quartiles in ratios(record).items()}
    n_bytes, pays = record["bytes"], paying(record)
    return {
        "target": _stem(record["target"]),
        "drafter": _stem(record["full"]),
        "random_weights": record["shape"] is not None,
        "verify_1_ms": ms["verify 1"],
        "verify": {name.split()[1]: times[name] for name in times if name.startswith("verify ")},
        "drafts": {
            name: {
                "ms": ms[name],
                "time": times[name],
                "bytes": round(n_bytes[name] / n_bytes["full"], 5),
                "pays_from": None if points["from"] is None else points["from"]["acceptance"],
            }
            for name, points in pays.items()
        },
    }


def _run(record: dict[str, Any]) -> dict[str, Any]:
    modes, found = {}, figures(record)[ALL]
    for mode, f in found.items():
        speed = f["speedup_over_plain"] or {"total": None, "overall": None}
        values = (f["tau"], f["acceptance_rate"], f["tokens_per_second"], speed["total"], speed["overall"])
        names = ("tau", "acceptance", "tokens_per_second", "times_plain", "with_prompt")
        rounded = (None if value is None else round(float(value), 5) for value in values)
        modes[mode] = dict(zip(names, rounded, strict=True))
    files = record["files"]
    return {
        "target": _stem(files["target"][0]["file"]),
        "drafters": [_stem(file["file"]) for which in ("full", "trimmed") for file in files[which]],
        "temperature": float(record["settings"]["sampling"]["temp"]),
        "answers": max(f["answers"] for f in found.values()),
        "modes": modes,
    }


def block(report: dict[str, Any]) -> str:
    """A report in Markdown: the machine, V and draft steps of each pair, and the speeds of each run."""
    machine = report["report_of"]
    computed = [f"{name}: {features}" for name, features in machine["backends"].items()]
    facts = [
        f"{machine['cores']} cores",
        f"{machine['memory_gb']} GB of memory, {report['copy_gb_per_second']} GB/s copied",
        f"llama-cpp-python {machine['llama_cpp_python']}" + (f" (ggml {machine['ggml']})" if "ggml" in machine else ""),
        machine["system"],
        machine["date"],
    ]
    parts = [f"## {', '.join([*machine.get('gpus', []), machine['cpu']])}", ", ".join(facts) + ".", *computed]
    if report["steps"]:
        pairs = [(_pair(found), found) for found in report["steps"]]
        sizes = list(dict.fromkeys(size for _, found in pairs for size in found["verify"] if size != "1"))
        rows = [
            [pair, f"{found['verify_1_ms']:.2f}", *(_shown(found["verify"].get(size), ".2f") for size in sizes)]
            for pair, found in pairs
        ]
        parts.append("Verifying: one token in ms, then several at once in units of one.")
        parts.append(table(["target + drafter", "1, ms", *sizes], rows))
        rows = [
            [pair, name, f"{d['ms']:.2f}", f"{d['time']:.2f}", f"{d['bytes']:.2f}", _shown(d["pays_from"], ".2f")]
            for pair, found in pairs
            for name, d in found["drafts"].items()
        ]
        parts.append("A draft step, in units of the uncut drafter's, and the acceptance from which it pays.")
        parts.append(table(["target + drafter", "drafts from", "ms", "time", "bytes", "pays from"], rows))
    for run in report["runs"]:
        rows = [
            [mode, f"{f['tau']:.2f}", *(_shown(f[key], form) for key, form in _SPEEDS)]
            for mode, f in run["modes"].items()
        ]
        drafters = " and ".join(run["drafters"]) or "no drafter"
        parts.append(
            f"{run['target']} with {drafters}: {run['answers']} answers by mode, temperature {run['temperature']:g}."
        )
        parts.append(table(["mode", "tau", "acceptance", "tok/s", "x plain", "with prompt"], rows))
    return "\n\n".join(parts)


_SPEEDS = (("acceptance", ".3f"), ("tokens_per_second", ".1f"), ("times_plain", ".2f"), ("with_prompt", ".2f"))


def _pair(steps: dict[str, Any]) -> str:
    return f"{steps['target']} + {steps['drafter']}{' (random weights)' * bool(steps['random_weights'])}"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
