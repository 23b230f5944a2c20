"""python -m gguf_trim plan: the best k and draft length for a pair on this machine, and what they would bring."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

import click

from corpus.answers import TargetAnswer, read_answers
from corpus.counts import Counts
from corpus.generate import generate
from corpus.prompts import load_prompts, split, spread
from corpus.ready import ranking_counts
from gguf_trim.fit.calibrate import TeacherForced, calibration
from gguf_trim.format.mtp import DrafterSource, OwnBlock, drafter_source
from gguf_trim.format.state_fed import EAGLE3, Eagle3Head
from gguf_trim.pairs.hub import HubModel, hub_options, local
from gguf_trim.pairs.prepare import DEFAULT_MODEL, files_of
from gguf_trim.pairs.target_types import type_costs
from llamabase.cli.command import FILE, THREADS, OneCommand, quantisation
from llamabase.cli.plot import drawing
from llamabase.cli.progress import stderr
from llamabase.errors import FileFormatError
from llamabase.files import PLOT
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import ASSISTANT, HEAD, is_block_alone
from llamabase.gguf.vocabulary import Vocabulary, require_same
from llamabase.llama.model import Model
from llamabase.llama.quantize import AS_SHIPPED
from llamabase.llama.timing import StepCost
from llamabase.sampling.settings import GREEDY, Sampling

from .costs import verify_cost
from .matches import grid, tau_of
from .planner import Plan, make_plan, sampled_acceptance

COUNTS = click.option("--counts", type=FILE, help="Counts from `python -m corpus count`.  [default: those that ship]")


def pair_options(command: Any) -> Any:
    """--model | --target --draft | -hf -hfd: what `files_of` takes."""

    @click.option("--model", help=f"A pair of the catalog.  [default: {DEFAULT_MODEL}]")
    @click.option("--target", type=FILE, help="The target's GGUF, instead of the catalog's.")
    @click.option(
        "--draft",
        "--drafter",
        "draft",
        type=drafter_source,
        metavar="PATH",
        help="The uncut drafter's, instead of the catalog's.",
    )
    @hub_options
    @wraps(command)
    def with_pair(
        model: str | None, target: Path | HubModel | None, draft: DrafterSource | HubModel | None, **others: Any
    ) -> Any:
        if model is None and (target is None) != (draft is None):
            raise click.UsageError("give both --target (or -hf) and --draft (or -hfd), or a --model")
        model = DEFAULT_MODEL if target is None and model is None else model
        drafter = local(draft)  # before the target, which takes longer to fetch
        return command(model=model, target=local(target), drafter=drafter, **others)

    return with_pair


def _types(text: str) -> list[str]:
    return [quantisation(name.strip()) for name in text.split(",") if name.strip()]


@click.command("plan", cls=OneCommand)
@pair_options
@COUNTS
@click.option("--prompts", type=FILE, help="Prompts that judge.  [default: bundled ones that were never counted]")
@click.option("--limit", type=click.IntRange(1), default=24, show_default=True, help="How many of the prompts.")
@click.option("-n", "--tokens", type=click.IntRange(1), default=96, show_default=True, help="Most per answer.")
@click.option("--answers", type=FILE, help="The target's answers, {id: [prompt_ids, answer_ids]}, instead of prompts.")
@click.option(
    "--types",
    type=_types,
    default="",
    metavar="TYPE,TYPE,...",
    help="Drafter quantisations to weigh, such as Q4_0,Q8_0.  [default: as shipped only]",
)
@click.option("--temp", type=float, default=0.0, show_default=True, help="Also the expected acceptance when sampling.")
@click.option("--no-measure", is_flag=True, help="Acceptance and MBSU only: no step is timed.")
@click.option("--json", "as_json", is_flag=True, help="Print the choices as one JSON list.")
@click.option("--plot", "picture", type=FILE, help="Draw acceptance and MBSU against k, as a PNG.")
@THREADS
def plan_command(
    model: str | None,
    target: Path | None,
    drafter: DrafterSource | None,
    counts: Path | None,
    prompts: Path | None,
    limit: int,
    tokens: int,
    answers: Path | None,
    types: list[str],
    temp: float,
    no_measure: bool,
    as_json: bool,
    picture: Path | None,
    threads: int | None,
) -> None:
    """Find the k and the draft length that are fastest for this pair here, by measurement."""
    PLOT.require(picture)
    target, drafter = files_of(model, target, drafter)
    if isinstance(drafter, OwnBlock) or is_block_alone(GGUFFile(drafter)):
        raise click.UsageError(
            f"--draft {drafter}: a plan is for a drafter of its own; rows of an MTP block are chosen by `trim --mtp`"
        )
    ranking = _ranking(target, drafter, counts)
    file, target_file = GGUFFile(drafter), GGUFFile(target)
    file.require_loadable()  # now, and not after the target has answered
    state_fed = file.architecture == EAGLE3
    if state_fed and temp > 0:
        raise click.UsageError("--temp is for drafters that read the text themselves")
    with tempfile.TemporaryDirectory(prefix="gguf-trim-") as name:
        folder = Path(name)
        if answers is not None:
            judged = read_answers(answers, len(Vocabulary(target_file)))
        else:
            judged = target_answers(target, prompts, limit, tokens, folder, threads)
        verify = None if no_measure else verify_cost(target, threads)
        reading = TeacherForced.of(
            drafter, calibration(target_file if state_fed else file), n_threads=threads, target=target
        )
        speculator = reading.fitted(target_file if state_fed and HEAD not in file.tensors else file)
        plans = [
            make_plan(target, drafter, ranking, judged, folder, verify, type_, speculator, threads)
            for type_ in [AS_SHIPPED, *types]
        ]
    chosen = max(plans, key=lambda plan: plan.best.tokens_per_second or plan.best.mbsu_bytes)
    if as_json:
        click.echo(json.dumps([{**asdict(choice), "type": plan.type} for plan in plans for choice in plan.choices]))
    else:
        for plan in plans:
            click.echo(_table(plan, chosen.best.draft_max))
        click.echo(_groups(chosen))
        click.echo(_verdict(chosen, verify))
        if not no_measure and (costs := type_costs(target, threads)) is not None:
            click.echo(str(costs))
        if state_fed:
            click.echo("judged by first drafts, from the target's own states: later ones are right less often")
    if temp > 0:
        sizes = grid(len(chosen.order))[::2]
        rates = sampled_acceptance(target, drafter, judged, chosen.order, sizes, Sampling(temp=temp), threads)
        for k, rate in rates.items():
            click.echo(f"temperature {temp:g}, k {k:6d}: expected acceptance {rate:.3f}", err=as_json)
    if picture is not None:
        _plot(plans, picture)
        stderr.print(str(picture), markup=False)


def auto_k(target: Path, drafter: Path, counts: Path | None) -> int:
    """The k of the fastest choice for this pair on this machine, from a short plan."""
    ranking = _ranking(target, drafter, counts)
    with tempfile.TemporaryDirectory(prefix="gguf-trim-") as folder:
        judged = target_answers(target, None, 16, 64, Path(folder))
        return make_plan(target, drafter, ranking, judged, Path(folder), verify_cost(target)).best.k


def _ranking(target: Path, drafter: Path, counts: Path | None) -> Counts:
    """The counts that rank a drafter's rows; raises VocabularyMismatch if the target has other tokens."""
    file, theirs = GGUFFile(drafter), Vocabulary(GGUFFile(target))
    if file.architecture == ASSISTANT:
        raise FileFormatError(f"{file.path}: Gemma 4's assistants cannot be planned for; give `trim` a --k")
    if file.architecture == EAGLE3:
        Eagle3Head.of(file).require_target(GGUFFile(target), theirs)
        return ranking_counts(theirs, counts)
    vocabulary = Vocabulary(file)
    require_same(theirs, vocabulary)
    return ranking_counts(vocabulary, counts)


def target_answers(
    target: Path, prompts: Path | None, limit: int, tokens: int, folder: Path, threads: int | None = None
) -> list[TargetAnswer]:
    """The target's greedy answers to prompts that rank nothing."""
    chosen = load_prompts(prompts)
    chosen = spread(split(chosen, "judge") if prompts is None else chosen, limit)
    out = folder / "answers.jsonl"
    with Model(target) as model:
        generate(chosen, model, out, max_tokens=tokens, sampling=GREEDY, n_threads=threads)
    return read_answers(out)


def _table(plan: Plan, draft_max: int) -> str:
    lines = [
        f"drafter {plan.type}: {plan.matches.positions} positions, draft length {draft_max}",
        f"{'vocab':7s} {'k':>8s} {'acceptance':>10s} {'tau':>6s} {'MBSU params':>11s} {'bytes':>6s} {'tok/s':>7s}",
    ]
    for choice in plan.choices:
        if choice.draft_max == draft_max:
            tokens_per_second = f"{choice.tokens_per_second:.1f}" if choice.tokens_per_second else "-"
            lines.append(
                f"{choice.vocab:7s} {choice.k:8d} {choice.acceptance_rate:10.3f} {choice.tau:6.2f} "
                f"{choice.mbsu_params:11.2f} {choice.mbsu_bytes:6.2f} {tokens_per_second:>7s}"
            )
    return "\n".join(lines)


def _groups(plan: Plan) -> str:
    """Each task and language with the best choice and with the whole head: a language the cut breaks shows here."""
    best, whole, rights = plan.best, plan.matches.right(plan.matches.n_vocab), plan.rights(plan.best)
    lines = [f"{'':14s} {'positions':>9s} {'tau full':>8s} {'best':>6s} {'loss':>6s}"]
    for label in sorted(set(plan.matches.labels)):
        chosen = [i for i, name in enumerate(plan.matches.labels) if name == label]
        full, cut = (tau_of([right[i] for i in chosen], best.draft_max) for right in (whole, rights))
        positions = sum(len(whole[i]) for i in chosen)
        lines.append(f"{label[:14]:14s} {positions:9d} {full:8.2f} {cut:6.2f} {1 - cut / full:6.1%}")
    return "\n".join(lines)


def _verdict(plan: Plan, verify: StepCost | None) -> str:
    """One paragraph: what is best, and whether it pays."""
    best = plan.best
    text = f"best: vocabulary {best.vocab}, k = {best.k}, draft length {best.draft_max}, drafter {plan.type}"
    if verify is None or best.tokens_per_second is None:
        return f"{text}; memory-bound speed-up {best.mbsu_bytes:.2f} by bytes (no step was timed)"
    plain = 1 / verify.of(1)
    speedup = best.tokens_per_second / plain
    text += f": {best.tokens_per_second:.1f} tok/s, plain decoding {plain:.1f} ({speedup:.2f} x)"
    if speedup < 1:
        text += "\nspeculation does not pay on this machine for this pair: decode plainly (--draft-max 0)"
    return text


def _plot(plans: list[Plan], path: Path) -> None:
    """Acceptance and MBSU by bytes against k, as a PNG. Needs the extra [plot]."""
    with drawing(path) as figure:
        left = figure.subplots()
        right = left.twinx()
        for plan in plans:
            n = plan.best.draft_max
            line = [choice for choice in plan.choices if choice.draft_max == n and choice.vocab in ("trim", "full")]
            every_k = plan.matches.curve()[1:] / plan.matches.positions
            left.plot(range(1, len(every_k) + 1), every_k, label=f"acceptance, {plan.type}")
            mbsu_bytes = [choice.mbsu_bytes for choice in line]
            right.plot([choice.k for choice in line], mbsu_bytes, "--o", label=f"MBSU by bytes, {plan.type}")
        left.set(xscale="log", xlabel="k (rows kept)", ylabel="acceptance")
        right.set_ylabel("MBSU")
        figure.legend(loc="outside lower center", ncols=2, fontsize="small")
