"""Ctrl-C while a command is still importing. Itself it imports nothing slow."""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from typing import NoReturn


def leave_to_the_system() -> None:
    """Let Ctrl-C end the process at once and without a traceback, until `take_back`. A shell sees 130."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a process in the background ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(module: str, name: str) -> NoReturn:
    """Run the console script `name`: the `main` of a module that takes a while to import."""
    leave_to_the_system()
    sys.exit(import_module(module).main(prog_name=name))


def take_back() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
