"""Cuts the output head of a drafter's GGUF to the tokens that matter, and proves that nothing else changed."""

from typing import NoReturn

from llamabase.cli.interrupt import run


def command() -> NoReturn:
    """The console script gguf-trim."""
    run("gguf_trim.__main__", "gguf-trim")
