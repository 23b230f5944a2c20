"""python -m runner.bench: what trimming gains, measured here.

Both sides of a comparison run in one process, alternating, on the same prompts and with the same token ruler; medians
are given. The last line of stdout is a JSON record.
"""

from __future__ import annotations

from corpus.interrupt import leave_to_the_system

if __name__ == "__main__":
    leave_to_the_system()  # until the command begins; the imports take a while

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from corpus.command import FILE, Commands
from corpus.gguf_file import GGUFFile
from corpus.llama import physical_cores
from corpus.progress import progress
from corpus.sampling import Sampling
from corpus.vocabulary import Vocabulary
from gguf_trim.companion import Trimmed
from gguf_trim.cut import step_bytes
from gguf_trim.speculator import Speculator

from .drafter import NoDrafter, open_drafter
from .engine import Record
from .options import FULL, Models, draft_max_option, model_options

DEMO_PROMPTS = (
    "Write a Python function that returns the n-th Fibonacci number, with a docstring and a short test.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take? Explain each step.",
    "Summarise in three sentences why the sky is blue and sunsets are red.",
)
GREEDY = Sampling(temp=0)


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": physical_cores(),
        "logical_cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "llama_cpp_python": version("llama-cpp-python"),
        "date": time.strftime("%Y-%m-%d"),
    }


@click.group(cls=Commands)
def main() -> None:
    """Measure drafters on this machine."""


@main.command("demo")
@model_options
@click.option("-n", "--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Most per answer.")
@draft_max_option
def demo_command(models: Callable[[], Models], max_tokens: int, draft_max: int | None) -> None:
    """Three prompts, plain and speculative in turn: tokens, tau, acceptance, tok/s, and Python's own share."""
    found = models()
    rows = []
    with found.open() as engine, progress("generating", 2 * len(DEMO_PROMPTS), "answers") as advance:
        for i, text in enumerate(DEMO_PROMPTS):
            prompt = engine.prompt([{"role": "user", "content": text}])
            plain, drafted = Record(), Record()
            runs = [(plain, 0), (drafted, draft_max)]
            for record, n in runs if i % 2 else runs[::-1]:
                drafter = NoDrafter() if n == 0 else None
                for _ in engine.answer(prompt, GREEDY, record, max_tokens=max_tokens, draft_max=n, drafter=drafter):
                    pass
                advance(1)
            ratio = drafted.tokens_per_second / plain.tokens_per_second
            rows.append({"prompt": text, "plain": plain.as_json(), "drafted": drafted.as_json(), "ratio": ratio})
            click.echo(
                f"{text}\n    {drafted.line()}; plain {plain.tokens_per_second:.1f} tok/s; ratio {ratio:.2f}; "
                f"Python {drafted.host_seconds / drafted.seconds:.1%}"
            )
    click.echo(json.dumps({"machine": machine(), "draft_max": draft_max, "prompts": rows}, ensure_ascii=False))


@main.command("steps")
@model_options
@click.option("--full", type=FILE, help="The uncut drafter to compare with.")
@click.option("--repeat", type=click.IntRange(1), default=40, show_default=True, help="Steps of each.")
def steps_command(models: Callable[[], Models], full: Path | None, repeat: int) -> None:
    """The one-token draft step by what is drafted from, alternating: the whole head, the kept rows, those and more."""
    found = models()
    full = full or (found.prepared.drafter if found.prepared else None)
    trimmed = found.prepared.trimmed if found.prepared else found.draft
    if full is None or trimmed is None:
        raise click.UsageError("with --target, give the trimmed --draft and the uncut --full")
    target = Vocabulary(GGUFFile(found.target))
    rng = np.random.default_rng(0)
    vocabs = ["trim", "context"]
    if Speculator.of(Trimmed.open(trimmed)) is not None:
        vocabs.append("spec")
    drafters = {
        name: open_drafter(full if name == FULL else trimmed, target, 512, found.n_threads, found.n_gpu_layers, name)
        for name in (FULL, *vocabs)
    }
    text = np.random.default_rng(1).integers(256, target.n_real // 2, 64).tolist()
    seconds: dict[str, list[float]] = {name: [] for name in drafters}
    engine: dict[str, list[float]] = {name: [] for name in drafters}
    with progress("stepping", repeat, "steps") as advance:
        for step in range(repeat + 3):
            for name in list(drafters)[:: 1 if step % 2 else -1]:
                started, before = time.perf_counter(), drafters[name].seconds
                drafters[name].draft(text, 1, GREEDY, rng)
                if step >= 3:  # the first read the prompt and warm up
                    seconds[name].append(time.perf_counter() - started)
                    engine[name].append(drafters[name].seconds - before)
            if step >= 3:
                advance(1)
    for drafter in drafters.values():
        drafter.close()
    sizes = {FULL: step_bytes(GGUFFile(full)), "trim": step_bytes(GGUFFile(trimmed))}
    ratios = {}
    for name in drafters:
        ratios[name] = np.quantile(np.divide(seconds[name], seconds[FULL]), (0.25, 0.5, 0.75)).tolist()
        python = statistics.median(1 - b / a for a, b in zip(seconds[name], engine[name], strict=True))
        low, median, high = ratios[name]
        click.echo(
            f"{name:8s} {1000 * statistics.median(seconds[name]):7.2f} ms  ratio {median:.3f} "
            f"(quartiles {low:.3f} to {high:.3f})  Python {python:.1%}"
        )
    click.echo(f"by bytes {sizes['trim'] / sizes[FULL]:.3f}  ({sizes['trim'] / 1e6:.1f} of {sizes[FULL] / 1e6:.1f} MB)")
    record = {
        "machine": machine(),
        "full": full.name,
        "trimmed": trimmed.name,
        "seconds": seconds,
        "engine_seconds": engine,
        "bytes": sizes,
        "median_ratio": ratios["trim"][1],
        "median_ratios": {name: found[1] for name, found in ratios.items()},
    }
    click.echo(json.dumps(record))


if __name__ == "__main__":
    sys.exit(main(prog_name="python -m runner.bench"))
