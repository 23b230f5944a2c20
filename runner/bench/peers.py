"""llama.cpp's own tools on the same pair, prompts and draft length, in the same run; docs/peers.md: how to get them.

Its speculative example loads both models for every prompt; only what it says of decoding is taken, not the loading.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from corpus.prompts import Prompt
from llamabase.errors import TrimError
from llamabase.llama import physical_cores
from llamabase.progress import progress
from llamabase.sampling import GREEDY

from ..engine import Engine, Record
from ..options import Models
from .modes import Files

BENCH, SPECULATIVE = "llama-bench", "llama-speculative-simple"
GENERATED = 64  # tokens of the single-stream comparison, from an empty context


def find(folder: Path) -> tuple[Path, Path]:
    """The two tools in a folder of llama.cpp's programs, or in a build folder's bin."""
    for place in (folder, folder / "bin", folder / "build" / "bin"):
        if (place / BENCH).is_file() and (place / SPECULATIVE).is_file():
            return place / BENCH, place / SPECULATIVE
    raise TrimError(f"{folder}: holds no {BENCH} and {SPECULATIVE}; docs/peers.md says how to build them")


def single_stream(tool: Path, target: Path, n_threads: int | None) -> float:
    """Tokens per second of llama.cpp's own benchmark of plain decoding."""
    threads = str(n_threads or physical_cores())
    arguments = ["-m", str(target), "-t", threads, "-p", "0", "-n", str(GENERATED), "-r", "1", "-o", "json"]
    return float(json.loads(_run(tool, arguments))[0]["avg_ts"])


def speculative(
    tool: Path,
    target: Path,
    drafter: Path,
    text: str,
    max_tokens: int,
    draft_max: int,
    n_ctx: int,
    n_threads: int | None,
) -> dict[str, float]:
    """One prompt through llama.cpp's speculative example, greedily: tokens, seconds, drafted, accepted."""
    threads = str(n_threads or physical_cores())
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as prompt:
        prompt.write(text)
        prompt.flush()
        arguments = {"-m": target, "-md": drafter, "-f": prompt.name, "-n": max_tokens, "--temp": 0, "-c": n_ctx}
        arguments |= {"--spec-type": "draft-simple", "--spec-draft-n-max": draft_max, "-t": threads, "-td": threads}
        said = _run(tool, [*(str(word) for pair in arguments.items() for word in pair), "-fit", "off"])
    wanted = {
        "tokens": r"decoded\s+(\d+) tokens",
        "seconds": r"decoded\s+\d+ tokens in\s+([\d.]+) seconds",
        "drafted": r"n_drafted\s*=\s*(\d+)",
        "accepted": r"n_accept\s*=\s*(\d+)",
    }
    found = {name: re.search(pattern, said) for name, pattern in wanted.items()}
    if not all(found.values()):
        raise TrimError(f"{tool}: does not say what it measured; its last words: {said.strip()[-200:]}")
    return {name: float(match[1]) for name, match in found.items() if match}


def summary(answers: Sequence[dict[str, float]], draft_max: int) -> dict[str, Any]:
    """Its row of the table; a round of n accepted drafts emits n + 1 tokens, so rounds are tokens less accepted."""
    tokens, seconds, accepted = (sum(found[name] for found in answers) for name in ("tokens", "seconds", "accepted"))
    rounds = tokens - accepted
    return {
        "name": f"{SPECULATIVE}, {draft_max} drafts",
        "tau": tokens / rounds if rounds else None,
        "tokens_per_second": tokens / seconds if seconds else None,
        "answers": list(answers),
    }


def alternate(ours: Callable[[], float], theirs: Callable[[], float], repeat: int = 7) -> tuple[float, float, float]:
    """Median tokens per second of both, and the median of their ratios, by turns."""
    a: list[float] = []
    b: list[float] = []
    for turn in range(repeat):
        for found, measure in ((a, ours), (b, theirs))[:: 1 if turn % 2 else -1]:
            found.append(measure())
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in zip(a, b, strict=True))


def beside(
    record: dict[str, Any],
    tools: tuple[Path, Path],
    files: Files,
    found: Models,
    engine: Engine,
    prompts: Sequence[Prompt],
) -> dict[str, Any]:
    """llama.cpp's own plain decoding, by turns with ours, and its speculative decoding of the first turns."""
    bench, tool = tools
    settings = record["settings"]

    def ours() -> float:
        answered = Record()
        engine.reader.keep([], 0)
        for round_ in engine.rounds([engine.model.bos or 0], GREEDY, max_tokens=GENERATED, draft_max=0):
            answered.add(round_)
        return answered.tokens / answered.verify_seconds

    a, b, ratio = alternate(ours, lambda: single_stream(bench, files.target, found.n_threads))
    name = f"{bench.name}, plain, {GENERATED} tokens"
    rows = [{"name": name, "tokens_per_second": b, "ours": a, "ratio": f"{ratio:.3f}"}]
    if files.full is not None:
        answers = []
        n, limits = settings["draft_max"] or 3, (found.n_ctx, found.n_threads)
        with progress("llama.cpp's speculative example", len(prompts), "prompts") as advance:
            for prompt in prompts:
                text = engine.prompt_text(prompt.messages)
                answers.append(speculative(tool, files.target, files.full, text, settings["max_tokens"], n, *limits))
                advance(1)
        rows.append(summary(answers, n))
    return {"rows": rows}


def _run(tool: Path, arguments: list[str]) -> str:
    try:
        done = subprocess.run([str(tool), *arguments], capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise TrimError(f"{tool}: cannot be run: {error.strerror or error}") from error
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["it gave no reason"]
        raise TrimError(f"{tool}: ended with {done.returncode}: {reason[-1]}")
    return done.stdout if arguments[-1] == "json" else done.stdout + done.stderr
