"""python -m runner, or gguf-run: chat, serve, bench, exact, cache."""

from __future__ import annotations

from llamabase.cli.interrupt import leave_to_the_system

if __name__ == "__main__":
    leave_to_the_system()  # until the command begins; the imports take a while

import sys

import click

from gguf_trim.pairs.cached import cache_command
from llamabase.cli.command import VERSION, Commands
from runner.bench.__main__ import main as bench
from runner.chat.__main__ import main as chat
from runner.serve.__main__ import main as serve

from .exact import main as exact

NAMED = {"chat": chat, "serve": serve, "bench": bench, "exact": exact, "cache": cache_command}


@click.group(cls=Commands, commands=NAMED)
@VERSION
def main() -> None:
    """Run a target with a trimmed drafter ahead of it; the text is exactly the target's."""


if __name__ == "__main__":
    sys.exit(main(prog_name="python -m runner"))
