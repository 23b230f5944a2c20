"""python -m gguf_trim: trim, verify, card, speculator, export, inspect, models, prepare, plan, cache.

Data on stdout, the rest on stderr.
"""

from __future__ import annotations

from llamabase.cli.interrupt import leave_to_the_system

if __name__ == "__main__":
    leave_to_the_system()  # until the command begins; the imports take a while

import contextlib
import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal

import click

from corpus.__main__ import main as counting_commands
from corpus.counts import Counts
from corpus.ready import ranking_counts
from gguf_trim.exchange.checkpoint import MARK, Checkpoint
from gguf_trim.exchange.token_ids import TOKEN_IDS, write_json, write_pt
from gguf_trim.fit.calibrate import TeacherForced, calibration
from gguf_trim.fit.closed_form import attach
from gguf_trim.format.assistant import KEPT
from gguf_trim.format.companion import Trimmed, companion_path
from gguf_trim.format.memory_bound import draft_weights, step_bytes
from gguf_trim.format.mtp import OWN_BLOCK, DrafterSource
from gguf_trim.pairs.cached import cache_command
from gguf_trim.pairs.catalog import USER_CATALOG, load_catalog
from gguf_trim.pairs.prepare import NONE, is_this_cut, prepare
from gguf_trim.plan.command import COUNTS, auto_k, pair_options, plan_command
from llamabase.cli.command import FILE, THREADS, VERSION, Commands, quantisation
from llamabase.cli.progress import progress, stderr
from llamabase.errors import TrimError
from llamabase.files import cache_folder, work_folder
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import EMBEDDING, HEAD
from llamabase.llama.quantize import quantize

from .cut import Cut, lay_out, move, require_outputs, write
from .describe import describe
from .export import chosen_ids, listed_ids
from .keep import DEFAULT_K, MULTIPLE, Keep, choose_rows
from .model_card import CARD, card_path, chosen_by, is_requantised, model_card, require_source, write_card
from .prove import prove

Auto = Literal["auto"]
WRITERS = {"vllm": (".json", write_json), "sglang": (".pt", write_pt)}  # vLLM reads any other ending as a .pt
STATES_OF = click.option("--target", type=FILE, help="The target, if DRAFTER or TRIMMED reads its states.")


def rows(value: str) -> int | Auto:
    """For --k: a number of rows, or the word auto."""
    try:
        return "auto" if value == "auto" else int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor auto") from None


@click.group(cls=Commands, commands=[plan_command, cache_command, *counting_commands.commands.values()])
@VERSION
def main() -> None:
    """Cut the output head of a drafter's GGUF to the tokens that matter, and prove the cut."""


@main.command("trim")
@click.argument("drafter", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The trimmed GGUF; companion and card go beside it.")
@click.option("--k", "-k", type=rows, help=f"Rows to keep, or auto (with --target).  [default: {DEFAULT_K}]")
@click.option("--top-p", type=click.FloatRange(0, 1), help="Keep what makes up this share of the counts, instead.")
@click.option("--min-count", type=click.IntRange(1), help="Keep what was counted at least this often, instead.")
@click.option("--target", type=FILE, help="The target, for --k auto, which measures, and for an EAGLE-3 head.")
@click.option("--requant", type=quantisation, metavar="TYPE", help="Requantise the trimmed file, to Q4_0 say.")
@COUNTS
@click.option("--keep", "keep_file", type=FILE, help="Token ids to keep: a text, .json, .pt, .safetensors or .gguf.")
@click.option("--exact-k", is_flag=True, help=f"Keep exactly K rows, not the next multiple of {MULTIPLE}.")
@click.option("--mtp", is_flag=True, help="DRAFTER is a target: choose the rows that its own MTP block drafts from.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--if-needed", is_flag=True, help="Do nothing if OUTPUT is already this cut of this drafter.")
def trim_command(
    drafter: Path,
    output: Path,
    k: int | Auto | None,
    top_p: float | None,
    min_count: int | None,
    target: Path | None,
    requant: str | None,
    counts: Path | None,
    keep_file: Path | None,
    exact_k: bool,
    mtp: bool,
    dry_run: bool,
    if_needed: bool,
) -> None:
    """Write DRAFTER with its head cut to K rows, the companion that keeps the full tables, and a model card."""
    if counts is not None and keep_file is not None:
        raise click.UsageError("give --counts or --keep, not both")
    if sum(rule is not None for rule in (k, top_p, min_count)) > 1:
        raise click.UsageError("give one of --k, --top-p, --min-count")
    if top_p is not None and top_p != top_p:
        raise click.UsageError("--top-p nan: is no share; give a number from 0 to 1")
    if mtp and (k == "auto" or requant is not None):
        raise click.UsageError("--mtp takes no --k auto and no --requant")
    require_outputs(drafter, output)
    if k == "auto":
        if target is None:
            raise click.UsageError("--k auto needs --target")
        k = auto_k(target, drafter, counts)
        stderr.print(f"k = {k} is the fastest here")
    choose = partial(choose_rows, k=k, counts=counts, keep_file=keep_file, top_p=top_p, min_count=min_count)
    multiple = 1 if exact_k else MULTIPLE
    cut = lay_out(OWN_BLOCK if mtp else drafter, choose, drafter if mtp else target, multiple)
    # The plan is the result of a dry run, and commentary otherwise.
    click.echo(_plan_text(cut, output, mtp), err=not dry_run)
    _warn_of_forced(cut.keep)
    if dry_run:
        return
    if if_needed and is_this_cut(output, cut):
        stderr.print(f"{output} is already this cut", markup=False)
        return
    with contextlib.ExitStack() as stack:
        made = output if requant is None else stack.enter_context(work_folder(output)) / output.name
        with progress(f"trimming to {cut.keep.k}", cut.n_bytes, "B") as advance:
            write(cut, made, advance)
        if requant is not None:
            quantize(made, made, requant, KEPT)
            move(made, output)
    card = card_path(output)
    if card.exists() and not (card.is_file() and CARD.known(card)):
        stderr.print(f"{card}: {CARD.differs}, and is left as it is", markup=False)
    else:
        write_card(card, model_card(output, cut.source.path, _named(cut.keep.counts, counts), keep_file))
    click.echo(str(output))


def _warn_of_forced(keep: Keep) -> None:
    if keep.n_forced_left_out:
        stderr.print(
            f"Warning: k = {keep.k} leaves out {keep.n_forced_left_out} of the tokens that are otherwise "
            f"always kept (byte and control tokens); k = {keep.k + keep.n_forced_left_out} holds them all"
        )


def _named(found: Counts | None, path: Path | None) -> Counts | None:
    """Counts under a name for strangers: that of their file, or of those that ship for None."""
    name = "the counts that ship with gguf-trim" if path is None else path.name
    return None if found is None else replace(found, name=name)


def _plan_text(cut: Cut, output: Path, mtp: bool) -> str:
    keep, source = cut.keep, cut.source
    rows = next(piece.tensor.n_rows for piece in cut.companion.pieces if piece.tensor.name in (HEAD, EMBEDDING))
    before, after = float(step_bytes(source)), float(cut.step_bytes)
    if mtp:
        weights = draft_weights(OWN_BLOCK, source.path)
        before, after = weights.bytes_at(rows), weights.bytes_at(keep.k)
    covered = "" if keep.coverage is None else f", {keep.coverage:.2%} of what was counted"
    lines = {
        "drafter": f"{source.path} ({source.architecture}, {'tied' if cut.tied else 'untied'} head)",
        "rows kept": f"{keep.k} of {rows}{covered}",
        "forced tokens": f"{keep.n_forced}",
        "file": f"{'' if mtp else f'{source.size / 1e6:.1f} MB -> '}{cut.trimmed.n_bytes / 1e6:.1f} MB  {output}",
        "companion": f"{cut.companion.n_bytes / 1e6:.1f} MB (memory-mapped)  {companion_path(output)}",
        "read per draft step": f"{before / 1e6:.1f} MB -> {after / 1e6:.1f} MB ({after / before:.2f} x)",
    }
    return "\n".join(f"{name:20s} {text}" for name, text in lines.items())


@main.command("verify")
@click.argument("trimmed", type=FILE)
@click.option("--source", type=FILE, required=True, help="The drafter it was cut from; of an MTP block, the target.")
@STATES_OF
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def verify_command(trimmed: Path, source: Path, target: Path | None, as_json: bool) -> None:
    """Prove that TRIMMED is its source: same bytes, and the same logits at the kept ids. Exit 1 if not."""
    result = prove(trimmed, source, target)
    if as_json:
        click.echo(json.dumps({**asdict(result), "ok": result.ok}))
    elif result.ok:
        click.echo(
            f"ok: {result.kept} rows equal as bytes, other tensors untouched; greatest logit difference "
            f"{result.max_logit_difference:g} over {result.positions} positions"
        )
        if (gpu := result.gpu) is not None:
            click.echo(
                f"on {', '.join(gpu.names)}: greatest logit difference {gpu.max_logit_difference:g}; the source itself "
                f"parts by up to {gpu.allowed:g} from its logits on the CPU"
            )
    if not result.ok:
        raise TrimError(result.differences[0])


@main.command("card")
@click.argument("trimmed", type=FILE)
@click.option(
    "--source", type=FILE, help="The drafter it was cut from: adds its hash, and proves a cut that was not requantised."
)
@STATES_OF
@COUNTS
@click.option("-o", "--output", type=FILE, help="Where the card goes.  [default: X.md beside X.gguf]")
def card_command(
    trimmed: Path, source: Path | None, target: Path | None, counts: Path | None, output: Path | None
) -> None:
    """Write a model card for TRIMMED, which in a repository of the Hugging Face Hub is its README.md.

    Counts are described if they ranked the rows of TRIMMED. A card that you edited is not replaced.
    """
    output = output or card_path(trimmed)
    CARD.require(output)
    opened, proof = Trimmed.open(trimmed), None
    if source is not None:
        require_source(opened, source)
        proof = None if is_requantised(opened) else prove(trimmed, source, target)
    if proof is not None and not proof.ok:
        raise TrimError(proof.differences[0])
    ranking = ranking_counts(opened.vocabulary, counts)
    if counts is not None and not chosen_by(opened, ranking):
        raise TrimError(f"{counts}: did not rank the rows of {trimmed}; give the counts that did, or leave them out")
    write_card(output, model_card(trimmed, source, _named(ranking, counts), proof=proof))
    click.echo(str(output))


@main.command("speculator")
@click.argument("trimmed", type=FILE)
@click.option(
    "--calibration", "texts", type=FILE, help="Answers from `python -m corpus generate`.  [default: those that ship]"
)
@click.option("--rank", "-r", type=click.IntRange(1), help="Numbers that score a token.  [default: n_embd / 8]")
@THREADS
@click.option("--train", "steps", type=click.IntRange(0), default=0, help="Steps of training after the fit ([train]).")
@STATES_OF
def speculator_command(
    trimmed: Path, texts: Path | None, rank: int | None, threads: int | None, steps: int, target: Path | None
) -> None:
    """Fit a low-rank speculator to TRIMMED, for rows beyond the kept ones at every step; its companion keeps it."""
    opened = Trimmed.open(trimmed)
    if target is None and opened.reads_states:
        raise TrimError(f"{trimmed}: reads its target's states; give the model it was made for as --target")
    answers = calibration(opened.companion if target is None else GGUFFile(target), texts)
    speculator = TeacherForced.of(trimmed, answers, opened, threads, target=target).fitted(
        opened.companion, rank, steps
    )
    attach(opened, speculator)
    stderr.print(f"rank {speculator.rank}, fitted on {speculator.n_positions} positions")
    rates = ", ".join(f"{vocab} {rate:.3f}" for vocab, rate in speculator.acceptance.items())
    stderr.print(f"acceptance on answers that it was not fitted to: {rates}")
    click.echo(str(companion_path(trimmed)))


@main.command("export")
@click.argument("ids", type=FILE)
@click.option("--to", type=click.Choice(["vllm", "sglang"]), help="Write their list: a .json or a .pt.")
@click.option("--checkpoint", type=FILE, help="Cut this EAGLE-3 checkpoint instead, a .safetensors.")
@click.option("-o", "--output", type=FILE, required=True)
@click.option("--k", "-k", type=int, help=f"Ids to keep of counts.  [default: {DEFAULT_K}]")
@click.option("--tokenizer", type=FILE, help="For counts: a GGUF of their vocabulary, for the tokens always kept.")
def export_command(
    ids: Path, to: str | None, checkpoint: Path | None, output: Path, k: int | None, tokenizer: Path | None
) -> None:
    """Write the ids of a trim for vLLM or SGLang. IDS: counts (.npz), a trimmed .gguf, or what --keep of trim takes."""
    if (to is None) == (checkpoint is None):
        raise click.UsageError("give one of --to and --checkpoint")
    counted = ids.suffix == ".npz"
    if counted and tokenizer is None:
        raise click.UsageError(f"{ids} holds counts: give a GGUF of the same vocabulary as --tokenizer")
    if not counted and (k is not None or tokenizer is not None):
        raise click.UsageError(f"--k and --tokenizer are for counts (.npz), and {ids} names its ids")
    head = None if checkpoint is None else Checkpoint.open(checkpoint)
    if head is not None:
        head.require_output(output)
    else:
        ending, write_ids = WRITERS[str(to)]
        if output.suffix != ending:
            raise TrimError(f"{output}: the output's name must end in {ending} for {to}")
        TOKEN_IDS.require(output)
    if counted and tokenizer is not None:
        keep = chosen_ids(ids, tokenizer, k, None if head is None else head.has_row)
        _warn_of_forced(keep)
        kept = keep.ids
        stderr.print(f"{keep.k} ids, {keep.coverage:.2%} of what was counted")
    else:
        kept = listed_ids(ids) if head is None else listed_ids(ids, head.n_vocab)
        stderr.print(f"{len(kept)} ids")
    if head is None:
        write_ids(kept.tolist(), output)
    else:
        cut = head.cut(kept)
        with progress("cutting the checkpoint", cut.n_bytes, "B") as advance:
            head.write(cut, output, advance)
        if head.config is None:
            stderr.print(f"No config.json beside the checkpoint: set draft_vocab_size to {cut.metadata[MARK]} in yours")
    click.echo(str(output))


@main.command("inspect")
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect_command(file: Path, as_json: bool) -> None:
    """Say what FILE is: its head, what a draft step reads, whether and how it can be trimmed."""
    facts = describe(file)
    if as_json:
        click.echo(json.dumps(facts))
        return
    for key, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        if isinstance(value, float):
            text = f"{value:.4f}"
        if value is not None:
            click.echo(f"{key.replace('_', ' '):22s} {text}")


@main.command("models")
def models_command() -> None:
    """List the pairs of the catalog, and where files are kept."""
    for pair in load_catalog().pairs.values():
        click.echo(f"{pair.name:20s} target {pair.target.name}, drafter {pair.drafter.name}")
    stderr.print(f"files: {cache_folder()}\nyour own pairs: {USER_CATALOG}", markup=False)


@main.command("prepare")
@pair_options
@click.option("--k", "-k", type=int, help=f"Rows to keep.  [default: {DEFAULT_K}]")
@COUNTS
@click.option(
    "--requant",
    type=lambda text: text if text == NONE else quantisation(text),
    metavar="none|TYPE",
    help="The trimmed drafter's quantisation, none for as shipped.  [default: the quickest with this target here]",
)
def prepare_command(
    model: str | None,
    target: Path | None,
    drafter: DrafterSource | None,
    k: int | None,
    counts: Path | None,
    requant: str | None,
) -> None:
    """Fetch a pair, trim its drafter, prove it and make it quick; print the paths of target and trimmed drafter.

    A model card goes beside the latter.
    """
    ready = prepare(model, target, drafter, partial(choose_rows, k=k, counts=counts), requant)
    if not card_path(ready.trimmed).exists():
        source = ready.drafter if isinstance(ready.drafter, Path) else ready.target
        ranking = ranking_counts(Trimmed.open(ready.trimmed).vocabulary, counts)
        write_card(card_path(ready.trimmed), model_card(ready.trimmed, source, _named(ranking, counts)))
    click.echo(f"{ready.target}\n{ready.trimmed}")


if __name__ == "__main__":
    sys.exit(main(prog_name="python -m gguf_trim"))
