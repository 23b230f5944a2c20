"""The micro view: what single steps cost, by turns: drafting by head size, verifying by batch size, the head alone."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from corpus.prompts import load_prompts, split, spread
from gguf_trim.format.companion import Trimmed
from gguf_trim.format.memory_bound import mbsu, step_bytes
from gguf_trim.format.mtp import MtpBlock, OwnBlock
from gguf_trim.format.speculator import Speculator
from gguf_trim.pairs.shapes import write_pair
from llamabase.cli.progress import progress
from llamabase.errors import FileFormatError
from llamabase.files import Kind, marked, read_text
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import head_tensor
from llamabase.llama.context import Context
from llamabase.llama.ggml import Backend, Product, Table
from llamabase.llama.timing import VERIFY, Step, by_turns, decode_step, medians, timed
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import GREEDY
from runner.draft.contracts import FULL
from runner.loop.engine import Engine
from runner.options import Models

from .modes import CUT, QUANT, Files, Mode, named, names_of, open_modes
from .report import table
from .runs import drafted

BATCHES = (*VERIFY, 12, 16)  # tokens that are verified at once
DRAFT_LENGTHS = range(1, 9)
N_TEXT = 64  # tokens that are drafted after
N_CONTEXT = 512  # tokens that target and drafter remember
TOKENS = 96  # of an answer in which drafts are judged
ACCEPTANCES = (0.6, 0.7, 0.8)  # per draft: at these the table gives the speed
ROUND = 3  # drafts of a round that is timed as a whole
ROUND_OF = f" x {ROUND}"  # ends the names of such steps
PARTS = 1_000_000  # parts of 1 in which the least acceptance that pays is sought
STEPS = Kind("holds no record of steps", marked(b"{", b'"machine":', b'"shape":', b'"seconds":'))


@dataclass
class BenchStep:
    """A step that reads about `bytes` of weights; `base` names the step that its time is divided by."""

    base: str
    step: Step
    bytes: Callable[[], float]
    clock: Callable[[], float]  # seconds spent inside llama.cpp and ggml so far
    prepare: Callable[[], object] = lambda: None  # untimed
    inside: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        self.prepare()
        before = self.clock()
        seconds = self.step()
        self.inside.append(self.clock() - before)
        return seconds


def shaped(pair: str, quant: str, ks: Sequence[int], folder: Path) -> Files:
    """Files of the shapes of a pair ("target+drafter"), with random weights, and cuts of the drafter to every k."""
    written = write_pair(pair, quant, ks, folder)
    return Files(written.target, written.drafter, named(written.cuts))


def time_steps(files: Files, models: Models, repeat: int, n_answers: int = 0) -> dict[str, Any]:
    """Times every step of a pair, by turns; the record has seconds by step, bytes, and the step of their ratio.

    With answers, also how many of its first drafts are accepted in that many of the target's greedy answers, by what is
    drafted from.
    """
    if files.full is None or not files.trimmed:
        raise FileFormatError(f"{files.target}: needs the uncut drafter and a trimmed one to compare")
    trims = list(files.trimmed.values())
    kinds = CUT if len(trims) == 1 and Speculator.of(Trimmed.open(trims[0])) is not None else CUT[:1]
    engine = replace(models, target=files.target, draft=None, n_ctx=N_CONTEXT).open()
    with engine, open_modes(names_of([FULL, QUANT, *kinds], files), files, engine, models, 1) as modes:
        steps = {mode.name: _drafting(mode, engine) for mode in modes}
        steps |= {mode.name + ROUND_OF: _drafting(mode, engine, ROUND) for mode in modes}
        steps |= _heads(files.full, files, models.n_threads)
        n_bytes = step_bytes(GGUFFile(files.target))
        steps |= {
            f"verify {n}": _verifying(engine.context, n, n_bytes) for n in BATCHES if n <= engine.context.n_outputs
        }
        judged = {"accepted": _accepted(modes, engine, n_answers)} if n_answers else {}
        return judged | {
            "seconds": by_turns(steps, repeat, "stepping"),
            "engine_seconds": {name: step.inside[-repeat:] for name, step in steps.items()},
            "bytes": {name: step.bytes() for name, step in steps.items()},
            "base": {name: step.base for name, step in steps.items()},
        }


def _accepted(modes: Sequence[Mode], engine: Engine, n_answers: int) -> dict[str, dict[str, int]]:
    """What becomes of drafts, one a round, in greedy answers to bundled prompts that were never counted."""
    judging = [engine.prompt(list(prompt.messages)) for prompt in split(load_prompts(), "judge")]
    prompts = spread([ids for ids in judging if len(ids) + TOKENS <= N_CONTEXT], n_answers)
    counts = {}
    with progress("answering", len(modes) * len(prompts), "answers") as advance:
        for mode in modes:
            _, made, accepted = drafted(engine, mode, prompts, TOKENS, advance)
            counts[mode.name] = {"drafted": int(made.sum()), "accepted": int(accepted.sum())}
    return counts


def _drafting(mode: Mode, engine: Engine, n_drafts: int = 1) -> BenchStep:
    """A round of drafts after a random text. Before it, untimed, a round after all but the last token has fallen."""
    n_vocab, target = engine.model.n_vocab, engine.reader
    text, noise = np.random.default_rng(1).integers(n_vocab // 8, n_vocab // 2, N_TEXT).tolist(), Noise(0)

    def read(part: list[int]) -> None:
        if engine.context.recorders:  # the drafter reads the target's states of it
            target.settle()
            target.read_prompt(part)

    def prepare() -> None:
        read(text[:-1])
        mode.drafter.prepare(text[:-1], 0)
        mode.drafter.draft(text[:-1], n_drafts, GREEDY, noise)
        read(text)

    step = timed(lambda: mode.drafter.draft(text, n_drafts, GREEDY, noise))
    base = FULL if n_drafts == 1 else mode.name
    return BenchStep(base, step, lambda: n_drafts * mode.step()[1], lambda: mode.drafter.seconds, prepare)


def _verifying(context: Context, n: int, n_bytes: int) -> BenchStep:
    step = decode_step(context, n)
    # Untimed, one like it goes before: where changing sizes costs something, that is not what verifying costs.
    return BenchStep("verify 1", step, lambda: n_bytes, lambda: context.seconds, step)


def _heads(full: Path | OwnBlock, files: Files, n_threads: int | None) -> dict[str, BenchStep]:
    """The head's product alone, whole and cut."""
    file = GGUFFile(files.target if isinstance(full, OwnBlock) else full)
    head = MtpBlock.of(file).head if isinstance(full, OwnBlock) else head_tensor(file)
    rows = np.memmap(file.path, np.uint8, "r", head.offset, (head.n_rows, head.row_bytes))
    backend, hidden = Backend(n_threads), np.ones(head.shape[0], np.float32)

    def step(k: int) -> BenchStep:
        product = Product(backend, Table(rows, head.type, head.shape[0]), n_rows=k)
        return BenchStep(
            "head full", timed(lambda: product(hidden)), lambda: k * head.row_bytes, lambda: backend.seconds
        )

    ks = [head_tensor(GGUFFile(path)).n_rows for path in files.trimmed.values()]
    return {"head full": step(head.n_rows)} | {f"head {k}": step(k) for k in ks}


def ratios(record: dict[str, Any]) -> dict[str, list[float]]:
    """Quartiles (low, median, high) of each step's time over its base's, turn by turn."""
    seconds = record["seconds"]
    return {
        name: np.quantile(np.divide(taken, seconds[record["base"][name]]), (0.25, 0.5, 0.75)).tolist()
        for name, taken in seconds.items()
    }


def steps_table(record: dict[str, Any]) -> str:
    """One line a step. Bytes over time beside what a plain copy moves: how far the step is bound by memory."""
    cost, _ = _medians(record)
    accepted = record.get("accepted", {})
    rows = []
    for name, (low, median, high) in ratios(record).items():
        n_bytes, base = record["bytes"][name], record["bytes"][record["base"][name]]
        python = 1 - np.divide(record["engine_seconds"][name], record["seconds"][name])
        rows.append([
            name,
            f"{1000 * cost[name]:.2f}",
            f"{median:.3f} ({low:.3f} to {high:.3f})",
            f"{n_bytes / base:.3f}",
            f"{n_bytes / 1e6:.1f}",
            f"{n_bytes / cost[name] / record['copy_bytes_per_second']:.0%}",
            f"{np.median(python):.1%}",
            *([_share(accepted.get(name))] if accepted else []),
        ])  # fmt: skip
    header = ["step", "ms", "ratio (quartiles)", "by bytes", "MB", "of copying", "Python"]
    return table([*header, *(["accepted"] if accepted else [])], rows)


def _share(counts: Mapping[str, int] | None) -> str:
    return f"{counts['accepted'] / max(1, counts['drafted']):.3f}" if counts else ""


def _medians(record: dict[str, Any]) -> tuple[dict[str, float], dict[int, float]]:
    """Seconds of every step, and those of verifying by batch size."""
    cost = medians(record["seconds"])
    return cost, {n: cost[f"verify {n}"] for n in BATCHES if f"verify {n}" in cost}


def _speed(tau: float, n: int, draft: float, verify: Mapping[int, float]) -> float:
    """Tokens per second over plain decoding's, if rounds of n drafts bring tau tokens each."""
    return tau * verify[1] / (verify[n + 1] + n * draft)


def best_speed(acceptance: float, draft: float, verify: Mapping[int, float]) -> tuple[float, int]:
    """(x, m): the most that drafting brings, plain decoding being 1, and the draft length that brings it.

    `acceptance` is the chance that a draft is accepted if those before it were, the same at every place. `draft` is
    the seconds of a draft step, verify[b] those of verifying b tokens at once. Tries the DRAFT_LENGTHS whose m + 1 is
    in `verify`, and raises ValueError if none is; the shorter draft wins a tie.
    """

    def speed(m: int) -> float:
        return _speed(sum(acceptance**i for i in range(m + 1)), m, draft, verify)

    m = max((m for m in DRAFT_LENGTHS if m + 1 in verify), key=speed)
    return speed(m), m


def least_acceptance(draft: float, verify: Mapping[int, float]) -> float | None:
    """The least acceptance per draft, to one of PARTS, at which drafting beats plain decoding; None if none does.

    Arguments and errors are those of `best_speed`, which rises with the acceptance, so bisection finds it.
    """
    part = bisect_right(range(PARTS + 1), 1.0, key=lambda part: best_speed(part / PARTS, draft, verify)[0])
    return part / PARTS if part <= PARTS else None


def paying(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What median steps mean, by what is drafted from: {"from": the least acceptance that pays, "at": [ACCEPTANCES]}.

    Each is {"acceptance": per draft, "speedup_over_plain": x, "draft_max": m}; "from" is None if nothing pays.
    """
    cost, verify = _medians(record)

    def point(acceptance: float | None, draft: float) -> dict[str, Any] | None:
        if acceptance is None:
            return None
        x, m = best_speed(acceptance, draft, verify)
        return {"acceptance": acceptance, "speedup_over_plain": x, "draft_max": m}

    return {
        name: {
            "from": point(least_acceptance(cost[name], verify), cost[name]),
            "at": [point(acceptance, cost[name]) for acceptance in ACCEPTANCES],
        }
        for name, base in record["base"].items()
        if base == FULL and not name.endswith(ROUND_OF)
    }


def paying_table(record: dict[str, Any]) -> str:
    """`paying` for people: one line for the uncut drafter and for each trim."""
    rows = []
    for name, points in paying(record).items():
        least = points["from"]
        rows.append([
            name,
            "-" if least is None else f"{least['acceptance']:.3f} ({least['draft_max']})",
            *(f"{point['speedup_over_plain']:.2f} ({point['draft_max']})" for point in points["at"]),
        ])  # fmt: skip
    return (
        "From which acceptance per draft (the chance that it is accepted if those before it were) drafting\n"
        "pays, and x plain at three of them by these steps; in brackets the draft length that is best:\n\n"
    ) + table(["", "pays from", *(f"x plain at {acceptance}" for acceptance in ACCEPTANCES)], rows)


def acceptance_in(path: Path) -> tuple[int, dict[str, float]]:
    """(draft length, tau by step) of a file: {"draft_max": n, "tau": {step name: tau}}."""
    try:
        data = json.loads(read_text(path))
        return int(data["draft_max"]), {str(name): float(tau) for name, tau in data["tau"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise FileFormatError(f'{path}: should hold {{"draft_max": n, "tau": {{step: tau}}}} ({error})') from error


def promised(record: dict[str, Any], path: Path, n: int, taus: Mapping[str, float]) -> str:
    """The speeds that measured steps give with the acceptance in a file."""
    cost, verify = _medians(record)
    if n + 1 not in verify or not taus.keys() <= cost.keys():
        raise FileFormatError(f"{path}: names a step or a draft length that was not timed; timed: {', '.join(cost)}")
    rows = []
    for name, tau in taus.items():
        c = record["bytes"][name] / record["bytes"]["verify 1"]
        speed = _speed(tau, n, cost[name], verify)
        rows.append([name, f"{tau:.2f}", f"{mbsu(tau, c, n):.2f}", f"{speed:.2f}"])
    return f"With the acceptance of {path.name}, {n} drafts:\n\n" + table(
        ["", "tau (given)", "MBSU bytes", "x plain by these steps"], rows
    )
