"""The measurement: every prompt answered in every mode, by turns, and every round of it kept.

The target reads a prompt once for all modes, and each counts that time; a drafter reads it anew for every answer.
Second turns continue the first mode's answer, so that all modes are given the same text.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import click
import numpy as np

from corpus.prompts import Prompt, load_prompts, split, spread
from gguf_trim.format.memory_bound import StepWeights
from llamabase.cli.progress import Advance, progress, stderr
from llamabase.errors import FileFormatError, TrimError
from llamabase.files import Kind, marked, write_whole
from llamabase.gguf.reader import GGUFFile
from llamabase.sampling.settings import GREEDY, Sampling
from runner.loop.engine import Engine
from runner.options import Models

from . import peers
from .figures import Answer, figures, place
from .machine import bandwidth, peak, resident
from .modes import Files, Mode, open_modes

# Spec-Bench's categories of MT-Bench.
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
RECORD = Kind("holds no record of a benchmark", marked(b"{", b'"machine":', b'"settings":', b'"answers":'))
# Where `--spec-bench auto` looks, from the working directory.
SPEC_BENCH = ("question.jsonl", "spec_bench/question.jsonl", "../shared/data/spec_bench/question.jsonl")


def task_of(prompt: Prompt) -> str:
    """The prompt's task; MT-Bench's eight categories, whose prompts have two turns, count as one, as in Spec-Bench."""
    return "mt_bench" if prompt.more and prompt.task in MT_BENCH else prompt.task


def answer(engine: Engine, mode: Mode, prompt: list[int], sampling: Sampling, max_tokens: int, seed: int) -> Answer:
    """What one answer took. The target has read the prompt; the drafter has not."""
    mode.drafter.settle()
    if mode.model is not None:
        mode.model.prepare(prompt[:1], 0)  # forgets all but the first token, and reads nothing
    before, started = resident(), time.perf_counter()
    first, rounds, tokens = 0.0, list[list[float]](), list[int]()
    for round_ in engine.rounds(
        prompt, sampling, max_tokens=max_tokens, draft_max=mode.draft_max, seed=seed, drafter=mode.drafter
    ):
        first = first or time.perf_counter() - started
        tokens += round_.tokens
        parts = (round(part, 7) for part in (round_.draft_seconds, round_.verify_seconds, round_.host_seconds))
        rounds.append([len(round_.tokens), len(round_.drafted), round_.accepted, *parts])
    seconds = time.perf_counter() - started
    mode.memory += max(0, resident() - before)
    return {"first_token_seconds": first, "seconds": seconds, "rounds": rounds, "token_ids": tokens}


def drafted(
    engine: Engine, mode: Mode, prompts: Sequence[list[int]], max_tokens: int, advance: Advance
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, drafts and accepted drafts of every round of greedy answers to some prompts."""
    rounds: list[list[float]] = []
    for prompt in prompts:
        rounds += answer(engine, mode, prompt, GREEDY, max_tokens, 0)["rounds"]
        advance(1)
    tokens, made, accepted = np.array(rounds)[:, :3].T
    return tokens, made, accepted


def measure(
    record: dict[str, Any],
    files: Files,
    models: Models,
    prompts: Sequence[Prompt],
    tools: peers.Tools | None,
    output: Path | None,
) -> None:
    """Add to the record what is missing of it, and write it after every answer.

    Modes take turns, forwards and backwards alternately. If one fails, its answer is noted with the error.
    """
    settings = record["settings"]
    record["copy_bytes_per_second"] = bandwidth(models.n_threads)
    weights = StepWeights.of(GGUFFile(files.target))
    record["target_step"] = {"params": weights.params_at(weights.n_rows), "bytes": weights.bytes_at(weights.n_rows)}
    done = {place(answered): answered for answered in record["answers"]}
    sampling, max_tokens, seed = Sampling(**settings["sampling"]), settings["max_tokens"], settings["seed"]
    with (
        replace(models, target=files.target, draft=None, share_answers=False).open() as engine,
        open_modes(settings["modes"], files, engine, models, settings["draft_max"]) as modes,
        progress("measuring", record["missing"], "answers") as advance,
    ):
        order = cycle((modes, modes[::-1]))
        for prompt in prompts:
            messages = list(prompt.messages)
            for turn, more in enumerate((*prompt.more, "")):
                ids = engine.prompt(messages)
                read_once = cache(partial(_read, engine, ids))
                for repeat, mode in [(i, mode) for i in range(settings["repeat"]) for mode in next(order)]:
                    answered = Answer(prompt=prompt.id, turn=turn, repeat=repeat, mode=mode.name)
                    if place(answered) in done:
                        continue
                    answered |= {"task": task_of(prompt), "prompt_tokens": len(ids)}
                    try:
                        answered["prompt_seconds"] = read_once()
                        answered |= answer(engine, mode, ids, sampling, max_tokens, seed)
                    except TrimError as error:
                        answered["error"] = str(error)
                    done[place(answered)] = answered
                    record["answers"].append(answered)
                    record["modes"][mode.name] = mode.as_json()
                    record["peak_bytes"] = max(record.get("peak_bytes", 0), peak())
                    record["missing"] -= 1
                    write_record(record, output)
                    advance(1, mode.name)
                for mode in modes:  # not sooner: a repeat must not draft from the answer that it repeats
                    if mode.answers is not None:
                        mode.answers.add(done[prompt.id, turn, 0, mode.name].get("token_ids", ()))
                tokens = done[prompt.id, turn, settings["repeat"] - 1, settings["modes"][0]].get("token_ids", ())
                said = b"".join(map(engine.model.piece, tokens)).decode("utf-8", "replace")
                messages += [{"role": "assistant", "content": said}, {"role": "user", "content": more}]
        if tools is not None and "peers" not in record:
            record["peers"] = peers.beside(record, tools, files, models, engine, prompts)


def _read(engine: Engine, ids: list[int]) -> float:
    """Seconds in which the target reads a prompt, from nothing."""
    started = time.perf_counter()
    engine.reader.settle()
    engine.reader.keep([], 0)
    if 1 < len(ids) <= engine.context.n_ctx:  # every mode refuses a longer one
        engine.reader.read(ids[:-1], 0)
    return time.perf_counter() - started


def read_record(path: Path, way_out: str) -> dict[str, Any]:
    """A record that `run` has written, or has printed last. Raises FileFormatError if no figures come of it."""
    try:
        if not path.is_file():
            raise ValueError("reading it may never end")
        text = path.read_text("utf-8").strip()
        record: dict[str, Any] = json.loads(text if text.startswith("{") else text.rpartition("\n")[2])
        record["figures"] = figures(record)  # as this version computes them
        json.dumps(record, ensure_ascii=False).encode()  # as it will be written again
        [place(answered) for answered in record["answers"]]
        record["machine"].get("cpu"), [file["sha256"] for files in record["files"].values() for file in files]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise FileFormatError(f"{path}: holds no record of a benchmark; {way_out}") from error
    return record


def left_in(path: Path | None) -> dict[str, Any]:
    """The record that an earlier run has left in `path`, or an empty one. Raises TrimError if it holds anything else.

    This asks more than RECORD does: a run can only continue a record that figures come of.
    """
    RECORD.require(path)  # before all of a file that may be a model is read
    if path is None or not path.exists() or not path.stat().st_size:
        return {}
    return read_record(path, "name another file")


def write_record(record: dict[str, Any], path: Path | None, kind: Kind = RECORD) -> None:
    if path is not None:
        with write_whole(path, kind) as file:
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def prompts_of(prompts: Path | None, spec_bench: str | None) -> list[Prompt]:
    """The file that is named, else Spec-Bench if it is found, else the bundled prompts that were never counted."""
    if prompts is not None and spec_bench is not None:
        raise click.UsageError("give --prompts or --spec-bench, not both")
    if prompts is not None or spec_bench not in (None, "auto"):
        return load_prompts(prompts or Path(str(spec_bench)))
    for path in filter(Path.is_file, map(Path, SPEC_BENCH)):
        stderr.print(f"prompts: {path}", markup=False)
        return load_prompts(path)
    if spec_bench == "auto":
        raise TrimError(
            "question.jsonl: Spec-Bench is not here; get data/spec_bench/question.jsonl of "
            "github.com/hemingkx/Spec-Bench and give its path as --spec-bench"
        )
    return split(load_prompts(), "judge")


def chosen(prompts: Sequence[Prompt], tasks: Sequence[str], limit: int | None) -> list[Prompt]:
    """`limit` prompts of these tasks, an equal share of each."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(task_of(prompt), []).append(prompt)
    if unknown := set(tasks) - set(groups):
        raise TrimError(f"there is no task {', '.join(sorted(unknown))}; there are {', '.join(sorted(groups))}")
    wanted = [groups[task] for task in dict.fromkeys(tasks or groups)]
    places = sorted((n, i) for i, group in enumerate(wanted) for n in range(len(group)))[:limit]
    shares = Counter(i for _, i in places)
    return [prompt for i, group in enumerate(wanted) for prompt in spread(group, shares[i])]
