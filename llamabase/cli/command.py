"""What every command of the project shares: errors become one sentence and exit code 1, Ctrl-C becomes 130."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import click

from llamabase.errors import EngineError, TrimError
from llamabase.llama.quantize import require_type

from .interrupt import take_back
from .progress import stderr

# Whether a file can be read is found out by reading it, in one sentence and with exit code 1.
FILE = click.Path(path_type=Path, readable=False)
THREADS = click.option(
    "-t", "--threads", type=click.IntRange(1, 512), help="Threads.  [default: as many as physical cores]"
)


def quantisation(text: str) -> str:
    """The type of an option: one that llama.cpp quantises to; nothing stays nothing."""
    try:
        return text and require_type(text.upper())
    except EngineError as error:
        raise click.BadParameter(str(error)) from None


class OneCommand(click.Command):
    """A command that reports TrimError as one sentence; click itself reports wrong usage with 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        take_back()
        # A stream that was closed is read and written as if it were empty.
        sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
        sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows another
        try:
            return super().main(*args, **kwargs)
        except TrimError as error:
            stderr.print(f"Error: {error}", markup=False)
        except OSError as error:
            # What no caller could name better: a folder that may not be entered, a name too long, a full stdout.
            where = "the output" if error.filename is None else error.filename
            stderr.print(f"Error: {where}: {error.strerror or error}", markup=False)
            with contextlib.suppress(OSError):
                sys.stdout.close()  # or Python says it again at exit
        sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        """Click itself would exit with 1, as for an error."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            stderr.print("Interrupted")
            ctx.exit(130)


class Commands(OneCommand, click.Group):
    """The same for a group of commands."""
