"""What every command shares: exit codes, errors that are one sentence on stderr, help, versions and completion."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from corpus.__main__ import main as corpus
from gguf_trim.__main__ import main as trim
from llamabase import __version__
from llamabase.cli.command import Commands, OneCommand, more
from llamabase.cli.progress import progress
from llamabase.errors import EngineError, FetchError, FileFormatError, TrimError, VocabularyMismatch
from runner.__main__ import main as run

SCREEN = 40  # lines of 80 columns


def command(raised: BaseException, kind: str) -> tuple[click.Command, list[str]]:
    """A command of our own kind that raises, and the arguments to call it with."""

    def body() -> None:
        click.echo("data")
        raise raised

    if kind == "one":
        return OneCommand("alone", callback=body), []
    return Commands("group", commands=[click.Command("within", callback=body)]), ["within"]


@pytest.mark.parametrize("kind", ["group", "one"])
@pytest.mark.parametrize("error", [TrimError, FileFormatError, VocabularyMismatch, FetchError, EngineError])
def test_our_errors_are_a_sentence_and_exit_code_1(error: type[TrimError], kind: str) -> None:
    """Unchanged: brackets in a path are not markup, and a long line is not wrapped."""
    sentence = f"[/b]{'x' * 300}.gguf: is [red]not[/] usable"
    main, args = command(error(sentence), kind)
    result = CliRunner().invoke(main, args)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "data\n", f"Error: {sentence}\n")


@pytest.mark.parametrize("kind", ["group", "one"])
def test_ctrl_c_is_exit_code_130(kind: str) -> None:
    main, args = command(KeyboardInterrupt(), kind)
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 130 and "Interrupted" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("kind", ["group", "one"])
def test_wrong_usage_is_exit_code_2(kind: str) -> None:
    main, args = command(TrimError("never"), kind)
    assert CliRunner().invoke(main, [*args, "--no-such-option"]).exit_code == 2


def test_faults_of_the_program_are_not_hidden() -> None:
    main, args = command(ZeroDivisionError("a bug"), "group")
    assert isinstance(CliRunner().invoke(main, args).exception, ZeroDivisionError)


@pytest.mark.parametrize("columns", [40, 60])
def test_a_bar_is_one_line_and_names_its_units(columns: int, monkeypatch) -> None:
    out = Console(file=io.StringIO(), width=columns)
    monkeypatch.setattr("llamabase.cli.progress.stderr", out)
    with progress("joining qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", 1.1e9, "B") as advance:
        advance(1.1e9)
    line = out.file.getvalue()
    assert line.count("\n") == 1 and line.startswith("join") and "1.1/1.1 GB" in line


def contexts(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[click.Context]:
    """A command's context, and those of its commands."""
    context = click.Context(command, parent, info_name=name, terminal_width=80)
    yield context
    if isinstance(command, click.Group):
        for below, one in command.commands.items():
            yield from contexts(one, below, context)


EVERY = [
    one for main, name in ((trim, "gguf-trim"), (run, "gguf-run"), (corpus, "corpus")) for one in contexts(main, name)
]


@pytest.mark.parametrize("context", EVERY, ids=lambda context: context.command_path)
def test_help_is_a_screen_and_help_all_names_every_option(context: click.Context) -> None:
    """`--help` of a command that leaves something out says how to see it. Only refused options are in neither."""
    short = context.get_help()
    assert len(short.splitlines()) <= SCREEN, "declare options that are rarely wanted with `more`"
    shown = [param for param in context.command.get_params(context) if isinstance(param, click.Option)]
    shown = [param for param in shown if not param.hidden]
    left_out = [param for param in shown if param.get_help_record(context) is None]
    assert ("--help-all" in short) == bool(left_out)
    for param in left_out:
        assert f"{param.opts[-1]} " not in short
    if left_out:
        words = context.command_path.split()[1:]
        main = run if context.find_root().info_name == "gguf-run" else trim
        full = CliRunner().invoke(main, [*words, "--help-all"])
        assert full.exit_code == 0 and all(param.opts[-1] in full.stdout for param in shown)


def test_an_option_of_help_all_is_taken_like_any_other() -> None:
    @click.command(cls=OneCommand)
    @more("--rare", type=int, help="Rarely wanted.")
    def main(rare: int | None) -> None:
        click.echo(rare)

    assert CliRunner().invoke(main, ["--rare", "3"]).stdout == "3\n"
    assert "--rare" not in CliRunner().invoke(main, ["--help"]).stdout
    assert "--rare INTEGER  Rarely wanted." in CliRunner().invoke(main, ["--help-all"]).stdout


@pytest.mark.parametrize(("main", "name"), [(trim, "gguf-trim"), (run, "gguf-run")])
def test_version_names_llama_cpps_build(main: click.Command, name: str) -> None:
    said = CliRunner().invoke(main, ["--version"], prog_name=name).stdout
    assert said.startswith(f"{name} {__version__}, llama-cpp-python {version('llama-cpp-python')}, llama.cpp ")
    assert said.count("\n") == 1 and "ggml " in said


def asks(typed: str) -> dict[str, str]:
    """How bash asks for what may follow the typed words, by click's protocol."""
    variable = f"_{typed.split()[0].replace('-', '_').upper()}_COMPLETE"
    return {variable: "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(len(f"{typed}|".split()) - 1)}


def completed(answer: str) -> set[str]:
    return {line.partition(",")[2] for line in answer.splitlines()} - {""}


@pytest.mark.parametrize(
    ("main", "typed", "wanted"),
    [
        (trim, "gguf-trim c", {"cache", "card", "count"}),
        (trim, "gguf-trim trim --top", {"--top-p"}),
        (trim, "gguf-trim cache req", {"requantised"}),
        (run, "gguf-run ", {"bench", "cache", "chat", "exact", "serve"}),
        (run, "gguf-run bench st", {"steps"}),
        (run, "gguf-run chat --cache-type-k q8", {"q8_0"}),
        (run, "gguf-run chat --mirostat", set()),
        (run, "gguf-run bench --limit 3 --mo", {"--modes", "--model", "--model-draft"}),
    ],
)
def test_the_shell_completes(main: click.Command, typed: str, wanted: set[str]) -> None:
    answer = CliRunner().invoke(main, [], prog_name=typed.split()[0], env=asks(typed))
    assert completed(answer.stdout) == wanted and answer.stderr == ""


@pytest.mark.parametrize(
    ("package", "typed", "wanted"), [("gguf_trim", "gguf-trim tr", {"trim"}), ("runner", "gguf-run ch", {"chat"})]
)
def test_the_installed_commands_are_completed(package: str, typed: str, wanted: set[str]) -> None:
    words = [sys.executable, "-c", f"from {package} import command; command()"]
    done = subprocess.run(words, env=os.environ | asks(typed), capture_output=True, text=True, check=True)
    assert completed(done.stdout) == wanted and done.stderr == ""
