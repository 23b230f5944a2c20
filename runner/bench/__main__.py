"""python -m runner.bench: what trimming gains, measured here.

Both sides of a comparison run in one process, by turns, on the same prompts, and count the same tokens. The last line
of stdout is a JSON record, except in a terminal, where it would push the tables off the screen.
"""

from __future__ import annotations

from llamabase.cli.interrupt import leave_to_the_system

if __name__ == "__main__":
    leave_to_the_system()  # until the command begins; the imports take a while

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from corpus.prompts import Prompt, spread
from gguf_trim.pairs.target_types import type_costs
from llamabase.cli.command import FILE, Commands, more, quantisation
from llamabase.cli.progress import stderr
from llamabase.errors import FileFormatError
from llamabase.files import PLOT
from llamabase.llama.rounds import LONGEST
from llamabase.sampling.settings import Sampling
from runner.draft.contracts import FULL
from runner.options import LOADING, Models, draft_max_option, model_options

from . import demo, peers, runs
from .card import REPORT, block, report_of, reports
from .clients import CLIENTS, clients_table, measure
from .figures import ALL, figures
from .machine import bandwidth, describe, machine
from .modes import AGAIN, AUTO, FIRST, KINDS, PLAIN, QUANT, RIVALS, SPEC, Files, find_files, names_of, with_rivals
from .report import compare, plot, report
from .steps import STEPS, acceptance_in, paying, paying_table, promised, ratios, shaped, steps_table, time_steps

# What a report measures if no records are given: turns of every step, prompts, tokens of an answer, ways to decode.
TURNS, PROMPTS, TOKENS, MODES = 7, 4, 48, [PLAIN, FULL, "trim", SPEC, AUTO]
SHAPED_KS = (16384, 32768)  # rows of the cuts of a --shape


def names(text: str) -> list[str]:
    """Values with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def sizes(text: str) -> list[int]:
    return [click.IntRange(1)(k) for k in names(text)]


def modes(text: str) -> list[str]:
    """Kinds of modes, each with an optional draft length of its own after a colon: spec:2."""
    for name in names(text):
        kind, colon, n = name.partition(":")
        click.Choice((*KINDS, *RIVALS, AGAIN))(kind)
        if colon:
            click.IntRange(1, LONGEST)(n)
    return list(dict.fromkeys(names(text)))


def ways(text: str) -> list[str]:
    """Ways to draft: plain, auto, or numbers of drafts."""
    return [way if way in (PLAIN, AUTO) else str(click.IntRange(1, LONGEST)(way)) for way in names(text)]


def named_url(text: str) -> tuple[str, str]:
    """A server by a name of its own: NAME=http://HOST:PORT."""
    name, equals, url = text.partition("=")
    if not equals or name in ("", PLAIN, AUTO) or name.isdigit() or not url.startswith(("http://", "https://")):
        raise click.BadParameter(f"{text!r} is not NAME=http://HOST:PORT, with a name that no mode has")
    return name, url.rstrip("/")


class Default(Commands):
    """A group whose command `run` needs no name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        completing = ctx.resilient_parsing and not args  # then the names of its commands, too
        if not completing and "--help" not in args[:1] and (not args or args[0] not in self.commands):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Default)
def main() -> None:
    """Measure what drafting brings on this machine; without a command: run."""


full_option = click.option("--full", type=FILE, help="The uncut drafter, with --target.")


def files_options(command: Any) -> Any:
    """The files to compare: the command receives what `find_files` takes."""
    for name, whose in (("target", "target"), ("draft", "drafter")):
        text = f"Requantise the {whose} first, to Q4_0 or Q8_0 for example."
        command = more(f"--{name}-quant", type=quantisation, default="", metavar="TYPE", help=text)(command)
    text = "Cut to each of these.  [default: --draft's]"
    return full_option(more("--k", "ks", type=sizes, default="", metavar="K,K,...", help=text)(command))


@main.command("run")
@model_options
@files_options
@click.option(
    "--modes",
    type=modes,
    default=",".join(KINDS),
    metavar="MODE[:N],...",
    help=f"Some of {', '.join(KINDS)}; spec:2 sets a draft length; again: plain once more; quant: the uncut drafter, "
    "requantised to what is quickest here; first: the first ids kept, uncounted.  [default: all but the last three]",
)
@click.option("--prompts", type=FILE, help="JSON lines.  [default: Spec-Bench if it is found, else the bundled ones]")
@more("--spec-bench", metavar="PATH|auto", help="Spec-Bench's question.jsonl.")
@more("--tasks", type=names, default="", metavar="A,B,...", help="Only these tasks.")
@click.option("--limit", type=click.IntRange(1), help="How many prompts, spread over the tasks.")
@click.option("-n", "--max-tokens", type=click.IntRange(2), default=128, show_default=True, help="Most per answer.")
@more("--temp", type=click.FloatRange(0), default=0.0, show_default=True, help="Temperature; 0 is greedy.")
@more("-s", "--seed", type=click.IntRange(0), default=0, show_default=True)
@draft_max_option("3")
@more("--repeat", type=click.IntRange(1), default=1, show_default=True, help="Answers of each prompt and mode.")
@more("--llama-cpp", type=FILE, help="A folder with llama.cpp's own tools, to run beside (docs/peers.md).")
@click.option("-o", "--output", type=FILE, help="Keep the record here, after every answer; continue one that is there.")
@click.option("--plot", "picture", type=FILE, help="Draw the speeds by task, as a PNG.")
def run_command(
    models: Callable[[], Models],
    full: Path | None,
    ks: list[int],
    target_quant: str,
    draft_quant: str,
    prompts: Path | None,
    spec_bench: str | None,
    tasks: list[str],
    limit: int | None,
    llama_cpp: Path | None,
    output: Path | None,
    picture: Path | None,
    temp: float,
    **settings: Any,
) -> None:
    """Answer prompts in every mode by turns: tau, acceptance, tokens per second, and where the time goes."""
    left = runs.left_in(output)
    PLOT.require(picture)
    chosen = runs.chosen(runs.prompts_of(prompts, spec_bench), tasks, limit)
    tools = peers.find(llama_cpp) if llama_cpp else None
    pair = models()
    with tempfile.TemporaryDirectory(prefix="gguf-trim-") as folder:
        files = find_files(pair, Path(folder), full, ks, target_quant, draft_quant)
        files = with_rivals(files, settings["modes"], Path(folder))
        record = _unmeasured(files, pair, chosen, temp, settings)
        if left.get("settings", record["settings"]) != record["settings"]:
            raise FileFormatError(f"{output}: holds the record of another run; name another file, or remove it")
        record |= {"answers": left.get("answers", []), "modes": left.get("modes", {})}
        if n := len(record["answers"]):
            stderr.print(f"{output}: continues after the {n} answers there (remove it to begin anew)", markup=False)
        record["missing"] -= n
        with contextlib.suppress(KeyboardInterrupt):  # the report says what is missing
            runs.measure(record, files, pair, chosen, tools, output)
    record["figures"] = figures(record)
    if not record["missing"]:
        del record["missing"]
    runs.write_record(record, output)
    if picture is not None and record["answers"]:
        plot(list(record["figures"]), list(record["figures"].values()), picture)
    click.echo(report(record))
    _print_json(record)
    if "missing" in record:
        sys.exit(130)


def _unmeasured(
    files: Files, pair: Models, prompts: Sequence[Prompt], temp: float, settings: dict[str, Any]
) -> dict[str, Any]:
    """A record of `run` that `runs.measure` fills."""
    described = {
        "target": [describe(files.target)],
        "full": [describe(files.full)] if isinstance(files.full, Path) else [],
        "trimmed": [describe(path) for path in files.trimmed.values()],
    }
    if files.quant is not None:
        described[QUANT] = [describe(files.quant)]
    if files.first:
        described[FIRST] = [describe(path) for path in files.first.values()]
    settings = settings | {
        "modes": names_of(settings["modes"], files),
        "prompts": [prompt.id for prompt in prompts],
        "sampling": json.loads(json.dumps(asdict(Sampling(temp=temp)))),
        **json.loads(json.dumps({name: asdict(pair)[name] for name in LOADING[2:]})),  # all but target and draft
        "sha256": [entry["sha256"] for entries in described.values() for entry in entries],
    }
    answers = sum(1 + len(prompt.more) for prompt in prompts) * len(settings["modes"]) * settings["repeat"]
    record = {"machine": machine(), "files": described, "settings": settings}
    return record | {"answers": [], "modes": {}, "missing": answers}


def _print_json(record: dict[str, Any]) -> None:
    if not sys.stdout.isatty():
        click.echo(json.dumps(record, ensure_ascii=False))


@main.command("demo")
@model_options
@full_option
@click.option("-n", "--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Most per answer.")
@draft_max_option()
def demo_command(models: Callable[[], Models], full: Path | None, max_tokens: int, draft_max: int | None) -> None:
    """Show what the cut brings to a draft step, three answers with drafts and without, and whether drafting pays."""
    pair = models()
    record: dict[str, Any] = {"machine": machine(), "draft_max": draft_max}
    files = find_files(pair, Path(), full)
    if files.full is not None:
        files = with_rivals(files, [QUANT], Path())
        record["cut"] = cut = demo.the_cut(pair, files, max_tokens)
        click.echo(f"{demo.cut_table(cut)}\n{demo.legend(cut)}\n")
        if pair.prepared is not None and pair.prepared.drafter != files.target:
            _beside(record, pair)
    record["prompts"] = demo.answers(pair, max_tokens, draft_max)
    click.echo(demo.texts(record["prompts"]))
    if (costs := type_costs(pair.target, pair.n_threads)) is not None:
        record["target_types"] = costs.seconds
        click.echo(f"{costs}\n")
    if files.full is not None:
        click.echo(demo.verdict(record))
    _print_json(record)


def _beside(record: dict[str, Any], pair: Models) -> None:
    """Add what a step of a drafter with a larger head takes, or say how to see it."""
    record["beside"] = found = demo.beside(pair)
    if found is None:
        click.echo(f"A drafter whose head is most of a step: make demo MODEL={demo.BESIDE}\n")
    else:
        click.echo(f"{demo.BESIDE}, whose head is most of a step:\n\n{demo.cut_table(found)}\n")


@main.command("steps")
@model_options
@files_options
@click.option("--shape", metavar="TARGET+DRAFTER", help="Random weights of these shapes, not files; or TARGET+mtp.")
@click.option("--quant", type=quantisation, default="Q4_K_M", show_default=True, help="Quantisation of the shapes.")
@click.option("--acceptance", type=FILE, help='Acceptance to compute with: {"draft_max": n, "tau": {step: tau}}.')
@click.option("--repeat", type=click.IntRange(1), default=40, show_default=True, help="Timed steps of each kind.")
@click.option(
    "--answers",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Also how many first drafts are accepted, in this many of the target's answers.",
)
@click.option("--rivals", is_flag=True, help="Also the uncut drafter requantised, which takes minutes the first time.")
@click.option("-o", "--output", type=FILE, help="Keep the record here.")
def steps_command(
    models: Callable[..., Models],
    shape: str | None,
    quant: str,
    acceptance: Path | None,
    repeat: int,
    answers: int,
    rivals: bool,
    output: Path | None,
    **wanted: Any,
) -> None:
    """Time single steps by turns: drafting, by what is drafted from; verifying, by batch size; the head alone.

    Then compute from which acceptance per draft drafting pays.
    """
    STEPS.require(output)
    given = None if acceptance is None else acceptance_in(acceptance)
    with tempfile.TemporaryDirectory(prefix="gguf-trim-") as folder:
        if shape is not None:
            files = shaped(shape, quant, wanted["ks"] or SHAPED_KS, Path(folder))
            pair = models(files.target)
        else:
            pair = models()
            files = with_rivals(find_files(pair, Path(folder), **wanted), [QUANT] * rivals, Path(folder))
        record = _stepped(files, pair, repeat, shape, answers)
    parts = [steps_table(record), paying_table(record)]
    if acceptance is not None and given is not None:
        parts.append(promised(record, acceptance, *given))
    click.echo("\n\n".join(parts))
    runs.write_record(record, output, STEPS)
    _print_json(record)


def _stepped(files: Files, pair: Models, repeat: int, shape: str | None = None, n_answers: int = 0) -> dict[str, Any]:
    """A record of `steps`."""
    record: dict[str, Any] = {
        "machine": machine(),
        "shape": shape,
        "target": files.target.name,
        "full": files.full.name if files.full else None,
        "quant": files.quant.name if files.quant else None,
        "trimmed": [path.name for path in files.trimmed.values()],
        **time_steps(files, pair, repeat, n_answers),
        "copy_bytes_per_second": bandwidth(pair.n_threads),
    }
    record["median_ratios"] = {name: quartiles[1] for name, quartiles in ratios(record).items()}
    record["paying"] = paying(record)
    return record


@main.command("clients")
@model_options
@click.option(
    "--clients", type=sizes, default="1,2,4,8", show_default=True, metavar="N,N,...", help="How many at once."
)
@click.option(
    "--modes",
    type=ways,
    default="plain,1,3,auto",
    show_default=True,
    metavar="MODE,...",
    help="plain, auto, or a number of drafts in every round.",
)
@click.option(
    "--server",
    "servers",
    type=named_url,
    multiple=True,
    metavar="NAME=URL",
    help="Ask a server that runs already, too: ours or llama-server, of the same files.",
)
@click.option("--prompts", type=FILE, help="JSON lines.  [default: Spec-Bench if it is found, else the bundled ones]")
@click.option("--limit", type=click.IntRange(1), help="How many prompts, spread over the tasks.")
@click.option("-n", "--max-tokens", type=click.IntRange(2), default=96, show_default=True, help="Most per answer.")
@click.option("--repeat", type=click.IntRange(1), default=1, show_default=True, help="Runs of each kind.")
@click.option("-o", "--output", type=FILE, help="Keep the record here.")
def clients_command(
    models: Callable[[], Models],
    clients: list[int],
    modes: list[str],
    servers: tuple[tuple[str, str], ...],
    prompts: Path | None,
    limit: int | None,
    max_tokens: int,
    repeat: int,
    output: Path | None,
) -> None:
    """Answer several clients at once, each of which asks anew as soon as it is answered: tokens per second of all."""
    CLIENTS.require(output)
    chosen = runs.chosen(runs.prompts_of(prompts, None), [], limit)
    pair = replace(models(), share_answers=False)  # a mode must not draft from the answers of others
    with pair.open(max(clients)) as engine:
        asked = [engine.prompt(list(prompt.messages)) for prompt in chosen]
        record: dict[str, Any] = {
            "machine": machine(),
            "clients": clients,
            "files": [describe(path) for path in (pair.target, pair.draft) if isinstance(path, Path)],
            "prompts": [prompt.id for prompt in chosen],
            "max_tokens": max_tokens,
            "runs": measure(engine, asked, clients, modes, dict(servers), max_tokens, repeat),
        }
    click.echo(clients_table(record))
    runs.write_record(record, output, CLIENTS)
    _print_json(record)


@main.command("report")
@click.argument("records", type=FILE, nargs=-1)
@model_options
@full_option
@click.option("-o", "--output", type=FILE, help="Keep the report here, as JSON.")
def report_command(
    records: tuple[Path, ...], models: Callable[[], Models], full: Path | None, output: Path | None
) -> None:
    """What this machine is and how quick: a Markdown block and a small JSON to post, without paths.

    RECORDS are those of `steps` and `run` of one machine, or reports, which are shown again. Without any, the pair is
    measured now, briefly.
    """
    REPORT.require(output)
    found = reports(records) if records else [report_of(_brief(models(), full), "this machine")]
    if output is not None and len(found) > 1:
        raise click.UsageError("-o takes one report")
    click.echo("\n\n".join(map(block, found)))
    runs.write_record(found[0], output, REPORT)
    for each in found:
        _print_json(each)


def _brief(pair: Models, full: Path | None) -> list[dict[str, Any]]:
    """A record of `steps` and one of `run`, of a few turns each."""
    with tempfile.TemporaryDirectory(prefix="gguf-trim-") as folder:
        files = find_files(pair, Path(folder), full)
        steps = _stepped(files, pair, TURNS)
        prompts = spread(runs.prompts_of(None, None), PROMPTS)
        settings = {"modes": MODES, "max_tokens": TOKENS, "seed": 0, "draft_max": 3, "repeat": 1}
        record = _unmeasured(files, pair, prompts, 0.0, settings)
        runs.measure(record, files, pair, prompts, None, None)
    return [steps, record]


@main.command("compare")
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("--labels", type=names, metavar="A,B", help="Names of the two in the plot.  [default: their files']")
@click.option("--plot", "picture", type=FILE, help="Draw the speeds of both, as a PNG.")
def compare_command(a: Path, b: Path, labels: list[str] | None, picture: Path | None) -> None:
    """Compare two records of `run`, mode by mode."""
    PLOT.require(picture)
    if labels is not None and len(labels) != 2:
        raise click.UsageError("--labels: two names with a comma between them")
    first, second = (runs.read_record(path, f"make one with `run -o {path}`") for path in (a, b))
    click.echo(compare(first, second, (str(a), str(b))))
    if picture is not None:
        plot(labels or [a.stem, b.stem], [first["figures"][ALL], second["figures"][ALL]], picture)


if __name__ == "__main__":
    sys.exit(main(prog_name="python -m runner.bench"))
