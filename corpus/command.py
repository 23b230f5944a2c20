"""What every command of the project shares: errors become one sentence and exit code 1, Ctrl-C becomes 130."""

from __future__ import annotations

import sys
from typing import Any

import click

from .errors import TrimError
from .progress import stderr


class Commands(click.Group):
    """A group of commands that reports TrimError as one sentence; click itself reports wrong usage with 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        return _reporting(super().main, *args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        return _interruptible(super().invoke, ctx)


class OneCommand(click.Command):
    """The same for a module with a single command."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        return _reporting(super().main, *args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        return _interruptible(super().invoke, ctx)


def _reporting(main: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return main(*args, **kwargs)
    except TrimError as error:
        stderr.print(f"Error: {error}", markup=False)
        sys.exit(1)


def _interruptible(invoke: Any, ctx: click.Context) -> Any:
    """Click itself would exit with 1, as for an error."""
    try:
        return invoke(ctx)
    except KeyboardInterrupt:
        stderr.print("Interrupted")
        ctx.exit(130)
