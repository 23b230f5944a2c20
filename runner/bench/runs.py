"""The measurement: every prompt answered in every mode, by turns, and every round of it kept.

The target reads a prompt once for all modes, since it reads the same for each; its time is added to every mode's own. A
drafter reads it anew for every answer. Second turns continue the first mode's answer, so that all modes see one text.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import click

from corpus.prompts import Prompt, load_prompts, split, spread
from gguf_trim.format.weights import Weights
from llamabase.cli.progress import progress, stderr
from llamabase.errors import FileFormatError, TrimError
from llamabase.files import Kind, marked, write_whole
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import EMBEDDING
from llamabase.sampling.settings import Sampling
from runner.loop.engine import Engine
from runner.options import Models

from . import peers
from .figures import Answer, figures, place
from .machine import bandwidth, peak, resident
from .modes import Files, Mode, open_modes

TASKS = ("translation", "summarization", "qa", "math_reasoning", "rag")  # Spec-Bench's, beside MT-Bench's categories
RECORD = Kind("holds no record of a benchmark", marked(b"{", b'"machine":', b'"settings":', b'"answers":'))
# Where `--spec-bench auto` looks, from the working directory.
SPEC_BENCH = ("question.jsonl", "spec_bench/question.jsonl", "../shared/data/spec_bench/question.jsonl")


def task_of(prompt: Prompt) -> str:
    """Spec-Bench's six tasks: its eight MT-Bench categories, whose prompts have two turns, are one."""
    return "mt_bench" if prompt.more and prompt.task not in TASKS else prompt.task


def answer(
    engine: Engine, mode: Mode, prompt: list[int], sampling: Sampling, max_tokens: int, seed: int | None
) -> Answer:
    """One answer's raw figures. The target has read the prompt; the drafter has not.

    A round is [tokens, drafted, accepted, draft seconds, verify seconds, host seconds].
    """
    mode.drafter.settle()
    if mode.model is not None:
        mode.model.prepare(prompt[:1], 0)  # forgets all but the first token, and reads nothing
    limits: dict[str, Any] = {"max_tokens": max_tokens, "draft_max": mode.draft_max, "seed": seed}
    before, started = resident(), time.perf_counter()
    rounds: list[list[float]] = []
    tokens: list[int] = []
    first = 0.0
    for found in engine.rounds(prompt, sampling, drafter=mode.drafter, **limits):
        first = first or time.perf_counter() - started
        tokens += found.tokens
        parts = (found.draft_seconds, found.verify_seconds, found.host_seconds)
        rounds.append([len(found.tokens), len(found.drafted), found.accepted, *(round(part, 7) for part in parts)])
    seconds = time.perf_counter() - started
    mode.memory += max(0, resident() - before)
    return {"first_token_seconds": first, "seconds": seconds, "rounds": rounds, "token_ids": tokens}


def missing(record: dict[str, Any], prompts: Sequence[Prompt]) -> int:
    """Answers that a record still lacks."""
    turns = sum(1 + len(prompt.more) for prompt in prompts)
    wanted: int = turns * len(record["settings"]["modes"]) * record["settings"]["repeat"]
    return wanted - len(record["answers"])


def measure(
    record: dict[str, Any],
    files: Files,
    found: Models,
    prompts: Sequence[Prompt],
    tools: tuple[Path, Path] | None,
    save: Callable[[], None],
) -> None:
    """Everything that is timed, saved after every answer; what is known already is not measured again."""
    settings = record["settings"]
    record["copy_bytes_per_second"] = bandwidth(found.n_threads)
    target = GGUFFile(files.target)
    weights, rows = Weights.of(target), target.tensors[EMBEDDING].n_rows
    record["target_step"] = {"params": weights.params_at(rows), "bytes": weights.bytes_at(rows)}
    engine = replace(found, target=files.target, draft=None).open()
    with (
        engine,
        open_modes(settings["modes"], files, engine, found, settings["draft_max"]) as modes,
        progress("measuring", missing(record, prompts), "answers") as advance,
    ):

        def note(mode: Mode, answered: Answer) -> None:
            record["answers"].append(answered)
            record["modes"][mode.name] = mode.as_json()
            record["peak_bytes"] = max(record.get("peak_bytes", 0), peak())
            record["missing"] = missing(record, prompts)
            save()
            advance(1, mode.name)

        for prompt in prompts:
            messages, said = list(prompt.messages), ""
            for turn, more in enumerate(("", *prompt.more)):
                if turn:
                    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": more}]
                said = _ask(engine, modes, prompt, turn, messages, record, note)
        if tools is not None and "peers" not in record:
            record["peers"] = peers.beside(record, tools, files, found, engine, prompts)


def _ask(
    engine: Engine,
    modes: list[Mode],
    prompt: Prompt,
    turn: int,
    messages: Sequence[dict[str, str]],
    record: dict[str, Any],
    note: Callable[[Mode, Answer], None],
) -> str:
    """Have every mode answer what it has not answered yet; returns what the first mode has said.

    A mode that fails is noted with its error, and the others go on.
    """
    settings = record["settings"]
    ids = engine.prompt(messages)
    read = cache(lambda: _read(engine, ids))
    done = {place(found): found for found in record["answers"]}
    for again in range(settings["repeat"]):
        for mode in modes:
            here = (prompt.id, turn, again, mode.name)
            if here in done:
                continue
            done[here] = dict(zip(("prompt", "turn", "repeat", "mode"), here, strict=True))
            done[here] |= {"task": task_of(prompt), "prompt_tokens": len(ids)}
            try:
                done[here] |= {"prompt_seconds": read()}
                sampling = Sampling(**settings["sampling"])
                done[here] |= answer(engine, mode, ids, sampling, settings["max_tokens"], settings["seed"])
            except TrimError as error:
                done[here]["error"] = str(error)
            note(mode, done[here])
        modes.reverse()  # forwards and backwards by turns
    tokens = done[prompt.id, turn, settings["repeat"] - 1, settings["modes"][0]].get("token_ids", ())
    return b"".join(map(engine.model.piece, tokens)).decode("utf-8", "replace")


def _read(engine: Engine, ids: list[int]) -> float:
    """Seconds in which the target reads a prompt, from nothing."""
    started = time.perf_counter()
    engine.reader.settle()
    engine.reader.keep([], 0)
    if len(ids) > engine.context.n_ctx:
        return 0.0  # every mode will say that it does not fit
    if len(ids) > 1:
        engine.reader.read(ids[:-1], 0)
    return time.perf_counter() - started


def read_record(path: Path, way_out: str) -> dict[str, Any]:
    """A record that `run` has made, or has printed last. Raises FileFormatError where it makes no figures."""
    try:
        if not path.is_file():
            raise ValueError("it may never end")
        text = path.read_text("utf-8").strip()
        found: dict[str, Any] = json.loads(text if text.startswith("{") else text.rpartition("\n")[2])
        found["figures"] = figures(found)  # as this program reckons them
        json.dumps(found, ensure_ascii=False).encode()  # as it will be written again
        [place(answer) for answer in found["answers"]]
        found["machine"].get("cpu"), [file["sha256"] for files in found["files"].values() for file in files]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise FileFormatError(f"{path}: holds no record of a benchmark; {way_out}") from error
    return found


def left_in(path: Path | None) -> dict[str, Any]:
    """The record that an earlier run has left in `path`; empty for none. Raises TrimError where it holds anything else.

    More than RECORD asks: what a run goes on from must make figures.
    """
    RECORD.require(path)  # before all of a model would be read
    if path is None or not path.exists() or not path.stat().st_size:
        return {}
    return read_record(path, "name another file")


def write_record(record: dict[str, Any], path: Path | None, kind: Kind = RECORD) -> None:
    if path is not None:
        with write_whole(path, kind) as file:
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def prompts_of(prompts: Path | None, spec_bench: str | None) -> list[Prompt]:
    """The file that is named; else Spec-Bench where it lies about; else bundled prompts that were never counted."""
    if prompts is not None and spec_bench is not None:
        raise click.UsageError("give --prompts or --spec-bench, not both")
    if prompts is not None or spec_bench not in (None, "auto"):
        return load_prompts(prompts or Path(str(spec_bench)))
    for path in map(Path, SPEC_BENCH):
        if path.is_file():
            stderr.print(f"prompts: {path}", markup=False)
            return load_prompts(path)
    if spec_bench == "auto":
        raise TrimError(
            "question.jsonl: Spec-Bench is not here; get data/spec_bench/question.jsonl of "
            "github.com/hemingkx/Spec-Bench and give its path as --spec-bench"
        )
    return split(load_prompts(), "judge")


def chosen(prompts: Sequence[Prompt], tasks: Sequence[str], limit: int | None) -> list[Prompt]:
    """Prompts of the tasks, `limit` in all, each task having as many as another."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(task_of(prompt), []).append(prompt)
    if unknown := set(tasks) - set(groups):
        raise TrimError(f"there is no task {', '.join(sorted(unknown))}; there are {', '.join(sorted(groups))}")
    wanted = [groups[task] for task in dict.fromkeys(tasks or groups)]
    places = sorted((n, i) for i, group in enumerate(wanted) for n in range(len(group)))[:limit]
    shares = Counter(i for _, i in places)
    return [prompt for i, group in enumerate(wanted) for prompt in spread(group, shares[i])]
