"""The measurement: every prompt answered in every mode, by turns, and every round of it kept.

The target reads a prompt once for all modes, since it reads the same for each; its time is added to every mode's own. A
drafter reads it anew for every answer. Second turns continue the first mode's answer, so that all modes see one text.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from corpus.prompts import Prompt, load_prompts, split, spread
from gguf_trim.layout import EMBEDDING
from gguf_trim.planning.costs import Weights
from llamabase.errors import FileFormatError, TrimError
from llamabase.files import Kind, marked, write_whole
from llamabase.gguf_file import GGUFFile
from llamabase.noise import Noise
from llamabase.progress import progress, stderr
from llamabase.sampling import Sampling

from ..auto import LONGEST
from ..engine import Engine
from ..options import Models
from ..speculative import generate
from . import peers
from .figures import Answer, figures
from .machine import bandwidth, peak, resident
from .modes import Files, Mode, open_modes

TASKS = ("translation", "summarization", "qa", "math_reasoning", "rag")  # Spec-Bench's, beside MT-Bench's categories
RECORD = Kind("holds no record of a benchmark", marked(b"{", b'"machine":', b'"settings":', b'"answers":'))
# Where `--spec-bench auto` looks, from the working directory.
SPEC_BENCH = ("question.jsonl", "spec_bench/question.jsonl", "../shared/data/spec_bench/question.jsonl")


def task_of(prompt: Prompt) -> str:
    """Spec-Bench's six tasks: its eight MT-Bench categories, whose prompts have two turns, are one."""
    return "mt_bench" if prompt.more and prompt.task not in TASKS else prompt.task


def turns_of(prompts: Sequence[Prompt]) -> int:
    return sum(1 + len(prompt.more) for prompt in prompts)


def answer(
    engine: Engine, mode: Mode, prompt: list[int], sampling: Sampling, max_tokens: int, seed: int | None
) -> Answer:
    """One answer's raw figures. The target has read the prompt; the drafter has not.

    A round is [tokens, drafted, accepted, draft seconds, verify seconds, host seconds].
    """
    mode.drafter.settle()
    if mode.model is not None:
        mode.model.prepare(prompt[:1], 0)  # forgets all but the first token, and reads nothing
    before, started = resident(), time.perf_counter()
    rounds: list[list[float]] = []
    tokens: list[int] = []
    first = 0.0
    for found in generate(
        engine.reader,
        mode.drafter,
        prompt,
        sampling,
        max_tokens=max_tokens,
        draft_max=LONGEST if mode.draft_max is None else mode.draft_max,
        is_end=engine.model.is_end,
        noise=Noise(seed),
    ):
        first = first or time.perf_counter() - started
        tokens += found.tokens
        parts = (found.draft_seconds, found.verify_seconds, found.host_seconds)
        rounds.append([len(found.tokens), len(found.drafted), found.accepted, *(round(part, 7) for part in parts)])
    seconds = time.perf_counter() - started
    mode.memory += max(0, resident() - before)
    mode.used = True
    return {"first_token_seconds": first, "seconds": seconds, "rounds": rounds, "token_ids": tokens}


def run(
    engine: Engine,
    modes: Sequence[Mode],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    record: dict[str, Any],
    *,
    max_tokens: int,
    repeat: int,
    seed: int | None,
    save: Callable[[], None],
    advance: Callable[[float, str], object],
) -> None:
    """Fill record["answers"] with what is missing there, saving after every answer.

    A mode that fails on a prompt is noted there with its error, and the others go on.
    """
    done = {_key(found): found for found in record["answers"]}
    order = 0
    for prompt in prompts:
        messages = list(prompt.messages)
        for turn, said in enumerate((None, *prompt.more)):
            if said is not None:
                messages.append({"role": "user", "content": said})
            ids = engine.prompt(messages)
            read: float | None = None
            first: list[int] | None = None
            for again in range(repeat):
                order += 1
                for mode in modes[:: 1 if order % 2 else -1]:
                    key = (prompt.id, turn, again, mode.name)
                    if key in done:
                        first = done[key].get("token_ids") if mode is modes[0] else first
                        continue
                    note: Answer = dict(zip(("prompt", "turn", "repeat", "mode"), key, strict=True))
                    note |= {"task": task_of(prompt), "prompt_tokens": len(ids)}
                    try:
                        if read is None:
                            read = _read(engine, ids)
                        note |= {"prompt_seconds": read, **answer(engine, mode, ids, sampling, max_tokens, seed)}
                        first = note["token_ids"] if mode is modes[0] else first
                    except TrimError as error:
                        note["error"] = str(error)
                    record["answers"].append(note)
                    record["peak_bytes"] = max(record.get("peak_bytes", 0), peak())
                    save()
                    advance(1, mode.name)
            text = b"".join(engine.model.piece(token) for token in first or ())
            messages.append({"role": "assistant", "content": text.decode("utf-8", "replace")})


def measure(
    record: dict[str, Any],
    files: Files,
    found: Models,
    prompts: list[Prompt],
    sampling: Sampling,
    save: Callable[[], None],
    tools: tuple[Path, Path] | None,
) -> None:
    """Everything that is timed; what is known already is not measured again."""
    settings = record["settings"]
    record["copy_bytes_per_second"] = bandwidth(found.n_threads)
    target = GGUFFile(files.target)
    weights, rows = Weights.of(target), target.tensors[EMBEDDING].n_rows
    record["target_step"] = {"params": weights.params_at(rows), "bytes": weights.bytes_at(rows)}
    names, repeat = settings["modes"], settings["repeat"]
    engine = replace(found, target=files.target, draft=None).open()
    with engine, open_modes(names, files, engine, found, settings["draft_max"]) as modes:

        def note() -> None:
            for mode in modes:
                if mode.name in record["modes"] and not mode.used:
                    continue  # what an earlier run knew of it
                params, n_bytes = mode.step()
                record["modes"][mode.name] = {
                    "draft_max": mode.draft_max,
                    "file": mode.file.name if mode.file else None,
                    "memory_bytes": mode.memory,
                    "step": {"params": params, "bytes": n_bytes},
                }
            record["missing"] = missing(record, prompts, names, repeat)
            save()

        with progress("measuring", missing(record, prompts, names, repeat), "answers") as advance:
            run(
                engine,
                modes,
                prompts,
                sampling,
                record,
                max_tokens=settings["max_tokens"],
                repeat=repeat,
                seed=settings["seed"],
                save=note,
                advance=advance,
            )
        note()
        if tools is not None and "peers" not in record:
            record["peers"] = peers.beside(record, tools, files, found, engine, prompts)


def _key(found: Answer) -> tuple[str, int, int, str]:
    return found["prompt"], found["turn"], found["repeat"], found["mode"]


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


def missing(record: dict[str, Any], prompts: Sequence[Prompt], modes: Sequence[str], repeat: int) -> int:
    """Answers that a record still lacks."""
    return turns_of(prompts) * len(modes) * repeat - len(record["answers"])


def read_record(path: Path, way_out: str, line: slice = slice(None)) -> dict[str, Any]:
    """A record that `run` has made, in these lines of a file. Raises FileFormatError where that makes no figures."""
    try:
        if not path.is_file():
            raise ValueError("it may never end")
        found: dict[str, Any] = json.loads("".join(path.read_text("utf-8").strip().split("\n")[line]))
        figures(found), [_key(answer) for answer in found["answers"]]
        found["machine"].get("cpu"), [file["sha256"] for files in found["files"].values() for file in files]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise FileFormatError(f"{path}: holds no record of a benchmark; {way_out}") from error
    return found


def left_in(path: Path | None) -> dict[str, Any] | None:
    """The record that an earlier run has left in `path`, or None. Raises TrimError where it holds anything else.

    More than RECORD asks: what a run goes on from must make figures.
    """
    if path is None or not path.exists():
        return None
    if path.is_file():
        RECORD.require(path)  # before all of a model would be read
        if not path.stat().st_size:
            return None
    return read_record(path, "name another file")


def resumed(left: dict[str, Any] | None, settings: dict[str, Any], path: Path | None) -> dict[str, Any]:
    """What a run of the same settings goes on from: the answers left in `path`, and what was known of its modes.

    Raises FileFormatError where they are another run's.
    """
    if left is None:
        return {"answers": [], "modes": {}}
    if left.get("settings") != settings:
        raise FileFormatError(f"{path}: holds the record of another run; name another file, or remove it")
    return {name: left[name] for name in ("answers", "modes")}


def saver(path: Path | None, record: dict[str, Any]) -> Callable[[], None]:
    """Writes the record whole after every answer, so that nothing measured is lost."""

    def save() -> None:
        if path is not None:
            with write_whole(path, RECORD) as file:
                file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())

    return save


def prompts_of(prompts: Path | None, spec_bench: str | None) -> list[Prompt]:
    """The file that is named; else Spec-Bench where it lies about; else bundled prompts that were never counted."""
    if prompts is not None and spec_bench is not None:
        raise click.UsageError("give --prompts or --spec-bench, not both")
    if prompts is not None or spec_bench not in (None, "auto"):
        return load_prompts(prompts or Path(str(spec_bench)))
    for place in SPEC_BENCH:
        if Path(place).is_file():
            stderr.print(f"prompts: {place}", markup=False)
            return load_prompts(Path(place))
    if spec_bench == "auto":
        raise TrimError(
            "question.jsonl: Spec-Bench is not here; get data/spec_bench/question.jsonl of "
            "github.com/hemingkx/Spec-Bench and give its path as --spec-bench"
        )
    return split(load_prompts(), "judge")


def chosen(prompts: list[Prompt], tasks: Sequence[str], limit: int | None) -> Iterator[Prompt]:
    """Prompts of the tasks, `limit` in all, each task having as many as another."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(task_of(prompt), []).append(prompt)
    if unknown := set(tasks) - set(groups):
        raise TrimError(f"there is no task {', '.join(sorted(unknown))}; there are {', '.join(sorted(groups))}")
    wanted = [groups[name] for name in (tasks or groups)]
    left, shares = sum(map(len, wanted)) if limit is None else limit, [0] * len(wanted)
    while left > 0 and any(share < len(group) for share, group in zip(shares, wanted, strict=True)):
        for i, group in enumerate(wanted):
            if left and shares[i] < len(group):
                shares[i], left = shares[i] + 1, left - 1
    for group, share in zip(wanted, shares, strict=True):
        yield from spread(group, share)
