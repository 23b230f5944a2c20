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

# Not checked by click: reading an unreadable file raises TrimError, which is one sentence and exit code 1.
FILE = click.Path(path_type=Path, readable=False)
THREADS = click.option(
    "-t", "--threads", type=click.IntRange(1, 512), help="Threads.  [default: as many as physical cores]"
)


def quantisation(text: str) -> str:
    """The type of an option that names a quantisation of llama.cpp's; an empty text stays empty."""
    try:
        return text and require_type(text.upper())
    except EngineError as error:
        raise click.BadParameter(str(error)) from None


class OneCommand(click.Command):
    """A command that reports TrimError as one sentence; click itself exits with 2 on wrong usage."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        take_back()
        # A closed stream is read and written like an empty file.
        sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
        sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal without a character shows another
        try:
            return super().main(*args, **kwargs)
        except TrimError as error:
            stderr.print(f"Error: {error}", markup=False)
        except OSError as error:
            # No caller named it better: a folder without access, a name too long, a full stdout.
            where = "the output" if error.filename is None else error.filename
            stderr.print(f"Error: {where}: {error.strerror or error}", markup=False)
            with contextlib.suppress(OSError):
                sys.stdout.close()  # or Python reports it again at exit
        sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        """Exit with 130 on Ctrl-C; click itself exits with 1, as for an error."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            stderr.print("Interrupted")
            ctx.exit(130)


class Commands(OneCommand, click.Group):
    """A group of such commands."""
