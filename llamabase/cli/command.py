"""What every command of the project shares: errors become one sentence and exit code 1, Ctrl-C becomes 130.

`--help` is a screen of at most 40 lines; the options that it leaves out are `more`, and `--help-all` lists them too.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import llama_cpp

from llamabase import __version__
from llamabase.errors import EngineError, TrimError
from llamabase.llama.ggml import build
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


_ALL = f"{__name__}.all"  # in a context's meta: every option is asked for


class _More(click.Option):
    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        return super().get_help_record(ctx) if _ALL in ctx.meta else None


more = partial(click.option, cls=_More)  # as click.option; `--help` leaves it to `--help-all`


def _help_all(ctx: click.Context, option: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        ctx.meta[_ALL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


HELP_ALL = click.Option(
    ["--help-all"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_help_all,
    help="Show every option and exit.",
)


def _version(ctx: click.Context, option: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        llama = f"llama-cpp-python {version('llama-cpp-python')}, llama.cpp {llama_cpp.llama_version().decode()}"
        click.echo(f"{ctx.info_name} {__version__}, {llama}, ggml {build()}")
        ctx.exit()


VERSION = click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the versions of this program and of llama.cpp, and exit.",
)


class OneCommand(click.Command):
    """A command that reports TrimError as one sentence; click itself exits with 2 on wrong usage."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Its options, `--help`, and `--help-all` if that says more."""
        params = super().get_params(ctx)
        return [*params, HELP_ALL] if any(isinstance(param, _More) for param in params) else params

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

    command_class = OneCommand
