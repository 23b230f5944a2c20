"""python -m corpus: count, generate, merge, show. Data on stdout, everything else on stderr."""

from __future__ import annotations

from llamabase.cli.interrupt import leave_to_the_system

if __name__ == "__main__":
    leave_to_the_system()  # until the command begins; the imports take a while

import sys
import time
from pathlib import Path

import click

from llamabase.cli.command import FILE, THREADS, Commands
from llamabase.cli.progress import progress, stderr
from llamabase.errors import TrimError
from llamabase.files import PLOT
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.model import Model
from llamabase.sampling.settings import Sampling

from .answers import ANSWERS
from .count import count
from .counts import COUNTS, Counts, merge
from .generate import generate
from .prompts import load_prompts, split, spread
from .show import coverage_table, plot
from .sources import LeftOut, files_of

HEAVIEST = 1e6  # weight of a table: counts times it still fit 64 bits


@click.group(cls=Commands)
def main() -> None:
    """Count which tokens a target emits."""


@main.command("count")
@click.argument("sources", nargs=-1, required=True)
@click.option("--tokenizer", type=FILE, required=True, help="A GGUF of the target's family.")
@click.option("-o", "--output", type=FILE, required=True, help="The counts file (.npz).")
@click.option("--field", default="text", show_default=True, help="The field that holds the text.")
@click.option("--max-tokens", type=click.IntRange(1), help="Tokens to read of each source, about.")
@click.option("--skip-bad", is_flag=True, help="Leave out rows that cannot be read, and say how many.")
@click.option("--dask", metavar="ADDRESS", help="Count on an existing Dask cluster, file by file.")
def count_command(
    sources: tuple[str, ...],
    tokenizer: Path,
    output: Path,
    field: str,
    max_tokens: int | None,
    skip_bad: bool,
    dask: str | None,
) -> None:
    """Count the tokens of SOURCES.

    A source is a text file, a folder of them, a .jsonl, .json, .parquet or .csv file (--field), a chat file in the form
    of OpenAI or ShareGPT (what the assistant says is counted), or hf:DATASET[:CONFIG[:SPLIT]].
    """
    if dask is not None and (max_tokens is not None or any(source.startswith("hf:") for source in sources)):
        raise click.UsageError("--dask counts whole files: no --max-tokens, no hf:")
    files = [Path(file) for source in sources for file in files_of(source) if not file.startswith("hf:")]
    for path in (tokenizer, *files):
        if output.exists() and path.exists() and output.samefile(path):
            raise TrimError(f"{output}: is one of the inputs; choose another output name")
    COUNTS.require(output)
    total = sum(path.stat().st_size for path in files)
    started = time.perf_counter()
    left_out = LeftOut([] if skip_bad else None)
    try:
        if dask is not None:
            from .cluster import count_on

            counts = count_on(dask, sources, tokenizer, field, left_out)
        else:
            with progress("counting", total or None, "B") as advance:
                counts = count(sources, tokenizer, field, max_tokens=max_tokens, left_out=left_out, advance=advance)
    finally:  # also if nothing was left to count
        for what, lines in (("file", left_out.files), ("row", left_out.rows)):
            if lines:
                were = f"1 {what} was" if len(lines) == 1 else f"{len(lines)} {what}s were"
                stderr.print(f"Warning: {were} left out; the first: {lines[0]}", markup=False)
    if not counts.total:
        counts = counts.with_held_out()
    counts.save(output)
    seconds = time.perf_counter() - started
    stderr.print(f"{counts.total} tokens, {len(counts.ids)} different ones, {counts.total / seconds:,.0f} tok/s")
    click.echo(str(output))


@main.command("generate")
@click.argument("prompts", type=FILE, required=False)
@click.option("--target", type=FILE, required=True, help="The model that answers; it may be a drafter.")
@click.option(
    "-o", "--output", type=FILE, required=True, help="Answers, one JSON line each; an existing file is continued."
)
@click.option("-n", "--tokens", type=click.IntRange(1), default=256, show_default=True, help="Most tokens per answer.")
@click.option("-np", "--parallel", type=click.IntRange(1, 64), default=16, show_default=True, help="Answers at a time.")
@click.option(
    "--split",
    "part",
    type=click.Choice(["all", "calibrate", "judge"]),
    default="all",
    show_default=True,
    help="The four of five prompts that are counted, or the one that judges.",
)
@click.option("--limit", type=click.IntRange(1), help="Number of prompts, evenly spread.  [default: all]")
@click.option("--temp", type=float, default=0.0, show_default=True, help="Temperature; 0 is greedy.")
@click.option("-s", "--seed", type=click.IntRange(0), default=0, show_default=True)
@THREADS
def generate_command(
    prompts: Path | None,
    target: Path,
    output: Path,
    tokens: int,
    parallel: int,
    part: str,
    limit: int | None,
    temp: float,
    seed: int,
    threads: int | None,
) -> None:
    """Have the target answer PROMPTS (JSON lines; the bundled ones by default), many at a time. Resumes."""
    ANSWERS.require(output)
    chosen = spread(split(load_prompts(prompts), part), limit)
    with Model(target) as model:
        started = time.perf_counter()
        total = generate(
            chosen,
            model,
            output,
            n_parallel=parallel,
            max_tokens=tokens,
            sampling=Sampling(temp=temp),
            seed=seed,
            n_threads=threads,
        )
        seconds = time.perf_counter() - started
    stderr.print(f"{total} tokens, {total / seconds:.1f} tok/s")
    click.echo(str(output))


@main.command("merge")
@click.argument("tables", nargs=-1, required=True, type=FILE)
@click.option("--weights", help="One number for each table, separated by commas.")
@click.option("-o", "--output", type=FILE, required=True)
def merge_command(tables: tuple[Path, ...], weights: str | None, output: Path) -> None:
    """Add up counts files: shards of a corpus, or different corpora."""
    try:
        factors = [float(weight) for weight in weights.split(",")] if weights else None
    except ValueError:
        raise click.UsageError(f"--weights {weights}: numbers separated by commas") from None
    if factors is not None and (len(factors) != len(tables) or not all(0 <= factor <= HEAVIEST for factor in factors)):
        raise click.UsageError(f"--weights: {len(tables)} tables need as many numbers from 0 to {HEAVIEST:g}")
    COUNTS.require(output)
    merge([Counts.load(table) for table in tables], factors).save(output)
    click.echo(str(output))


@main.command("show")
@click.argument("table", type=FILE)
@click.option("--tokenizer", type=FILE, help="A GGUF of the vocabulary; adds the tokens that are always kept.")
@click.option("--plot", "picture", type=FILE, help="Also draw coverage against k, as a PNG.")
def show_command(table: Path, tokenizer: Path | None, picture: Path | None) -> None:
    """Show what share of each source and language the k most frequent tokens cover."""
    if picture is not None and picture.suffix != ".png":
        raise TrimError(f"{picture}: a plot's name must end in .png")
    PLOT.require(picture)
    counts = Counts.load(table)
    forced: list[int] = []
    if tokenizer is not None:
        vocabulary = Vocabulary(GGUFFile(tokenizer))
        counts.require_vocabulary(vocabulary)
        forced = vocabulary.forced
    click.echo(coverage_table(counts, forced))
    if picture is not None:
        plot(counts, forced, picture)
        click.echo(str(picture))


if __name__ == "__main__":
    sys.exit(main(prog_name="python -m corpus"))
