"""What every command shares: exit codes, and errors that are one sentence on stderr."""

from __future__ import annotations

import io

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from llamabase.cli.command import Commands, OneCommand
from llamabase.cli.progress import progress
from llamabase.errors import EngineError, FetchError, FileFormatError, TrimError, VocabularyMismatch


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
