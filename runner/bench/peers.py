"""llama.cpp's own tools on the same pair, prompts and draft length, in the same run; docs/peers.md: how to get them.

Its speculative example loads both models for every prompt; only the time that it reports for decoding is used.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from corpus.prompts import Prompt
from gguf_trim.format.mtp import MTP, DrafterSource, OwnBlock
from gguf_trim.format.state_fed import EAGLE3
from llamabase.cli.progress import progress
from llamabase.errors import TrimError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import ASSISTANT
from llamabase.llama.library import physical_cores
from llamabase.sampling.settings import GREEDY
from runner.loop.engine import Engine
from runner.options import Models

from .modes import Files

BENCH, SPECULATIVE = "llama-bench", "llama-speculative-simple"
GENERATED = 64  # tokens of the single-stream comparison, from an empty context
TURNS = 7  # of the single-stream comparison
# By architecture; all others are draft-simple.
SPEC_TYPES = {EAGLE3: "draft-eagle3", MTP: "draft-mtp", ASSISTANT: "draft-mtp"}
REPORTED = re.compile(
    r"decoded\s+(?P<tokens>\d+) tokens in\s+(?P<seconds>[\d.]+) seconds"
    r".*n_drafted\s*=\s*(?P<drafted>\d+).*n_accept\s*=\s*(?P<accepted>\d+)",
    re.DOTALL,
)


class Tools(NamedTuple):
    """Paths of the two programs."""

    bench: Path
    speculative: Path


def find(folder: Path) -> Tools:
    """The two tools in a folder of llama.cpp's programs, or in a build folder's bin."""
    for place in (folder, folder / "bin", folder / "build" / "bin"):
        if (place / BENCH).is_file() and (place / SPECULATIVE).is_file():
            return Tools(place / BENCH, place / SPECULATIVE)
    raise TrimError(f"{folder}: holds no {BENCH} and {SPECULATIVE}; docs/peers.md says how to build them")


def single_stream(tool: Path, target: Path, n_threads: int) -> float:
    """Tokens per second of llama.cpp's own benchmark of plain decoding."""
    done = _run(tool, {"-m": target, "-t": n_threads, "-p": 0, "-n": GENERATED, "-r": 1, "-o": "json"})
    return float(json.loads(done.stdout)[0]["avg_ts"])


def speculative(tool: Path, text: str, options: dict[str, Any]) -> dict[str, Any]:
    """One prompt through llama.cpp's speculative example: tokens, seconds, drafted, accepted, and the text."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as prompt:
        prompt.write(text)
        prompt.flush()
        done = _run(tool, {**options, "-f": prompt.name, "-fit": "off"})
    output = done.stdout + done.stderr
    if (reported := REPORTED.search(output)) is None:
        raise TrimError(f"{tool}: does not report what it measured; its output ends with {output.strip()[-200:]}")
    return {name: float(value) for name, value in reported.groupdict().items()} | {"text": done.stdout.strip()}


def beside(
    record: dict[str, Any], tools: Tools, files: Files, models: Models, engine: Engine, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """llama.cpp's own plain decoding, by turns with ours, and its speculative decoding of the first turns."""
    threads = models.n_threads or physical_cores()

    def ours() -> float:
        engine.reader.keep([], 0)
        rounds = list(engine.rounds([engine.model.bos or 0], GREEDY, max_tokens=GENERATED, draft_max=0))
        return sum(len(round_.tokens) for round_ in rounds) / sum(round_.verify_seconds for round_ in rounds)

    speeds = np.array([(ours(), single_stream(tools.bench, files.target, threads)) for _ in range(TURNS)])
    a, b = np.median(speeds, axis=0).tolist()
    ratio = np.median(speeds[:, 0] / speeds[:, 1])
    name = f"{BENCH}, plain, {GENERATED} tokens"
    rows = [{"name": name, "tokens_per_second": b, "ours": a, "ratio": f"{ratio:.3f}"}]
    # llama.cpp runs the uncut drafter and, of an EAGLE-3 head, the cuts too.
    drafters: list[DrafterSource] = [] if files.full is None else [files.full]
    if files.full is not None and _spec_type(files.full) == SPEC_TYPES[EAGLE3]:
        drafters += files.trimmed.values()
    for drafter in drafters:
        n = record["settings"]["draft_max"] or 3
        options: dict[str, Any] = {"-m": files.target, "-c": models.n_ctx, "--temp": 0}
        options |= {"-n": record["settings"]["max_tokens"], "-t": threads, "-td": threads}
        options |= {"--spec-type": _spec_type(drafter), "--spec-draft-n-max": n}
        options |= {} if isinstance(drafter, OwnBlock) else {"-md": drafter}
        answers = []
        with progress("llama.cpp's speculative example", len(prompts), "prompts") as advance:
            for prompt in prompts:
                answers.append(speculative(tools.speculative, engine.prompt_text(prompt.messages), options))
                advance(1)
        tokens, seconds, accepted = (sum(done[key] for done in answers) for key in ("tokens", "seconds", "accepted"))
        rows.append({
            "name": f"{SPECULATIVE}, {n} drafts" + (f", {drafter.name}" if drafter != files.full else ""),
            # A round of n accepted drafts emits n + 1 tokens.
            "tau": tokens / (tokens - accepted) if tokens > accepted else None,
            "tokens_per_second": tokens / seconds if seconds else None,
            "answers": answers,
        })  # fmt: skip
    return {"rows": rows}


def _spec_type(drafter: DrafterSource) -> str:
    return SPEC_TYPES.get(MTP if isinstance(drafter, OwnBlock) else GGUFFile(drafter).architecture, "draft-simple")


def _run(tool: Path, options: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    arguments = [str(word) for pair in options.items() for word in pair]
    try:
        done = subprocess.run([str(tool), *arguments], capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise TrimError(f"{tool}: cannot be run: {error.strerror or error}") from error
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["it gave no reason"]
        raise TrimError(f"{tool}: ended with {done.returncode}: {reason[-1]}")
    return done
