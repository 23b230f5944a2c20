"""Ctrl-C before a command has begun. Imports nothing that takes time: the imports are what it is about."""

from __future__ import annotations

import signal


def leave_to_the_system() -> None:
    """Let Ctrl-C end the process at once and without a traceback, until `take_back`. A shell sees 130."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def take_back() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
