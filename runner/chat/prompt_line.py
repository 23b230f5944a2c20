"""What a user types: line editing, history, completion, and texts of several lines."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from llamabase.files import APP

try:
    import readline
except ImportError:  # absent on Windows, whose console edits lines itself
    readline = None  # type: ignore[assignment]

HISTORY_LINES = 1000
BLOCK = '"""'


def history_file() -> Path:
    """The file that keeps typed lines from one session to the next."""
    return platformdirs.user_state_path(APP) / "chat_history"


class PromptLine:
    """Reads one text after another from the terminal; the tab key completes `commands`.

    If the history cannot be read or written, there is none, and no message.
    """

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = commands
        self._history = history_file()
        if readline is None:
            return
        readline.set_history_length(HISTORY_LINES)
        with contextlib.suppress(OSError):
            readline.read_history_file(self._history)
        readline.set_completer(self._complete)
        readline.set_completer_delims(" \t\n")
        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")

    def read(self) -> str:
        r"""The next text. A line that ends in \ goes on in the next; a block ends with the quotes it began with.

        A block keeps its quotes, so nothing in it is taken for a command; `unquoted` removes them. Raises EOFError on
        Ctrl-D and KeyboardInterrupt on Ctrl-C.
        """
        text = self._line("> ").strip()
        if text.startswith(BLOCK):
            while not text[len(BLOCK) :].rstrip().endswith(BLOCK):
                text += "\n" + self._line("... ")
        else:
            while text.endswith("\\"):
                text = text[:-1] + "\n" + self._line("... ").rstrip()
        return text.strip()

    def _line(self, prompt: str) -> str:
        if sys.stdout.isatty():
            line = input(prompt)
        else:  # input() would write the prompt among the answers
            sys.stderr.write(prompt)
            sys.stderr.flush()
            line = input()
        # Saved after every line, because there is no time for it when a terminal is closed.
        if readline is not None:
            with contextlib.suppress(OSError):
                self._history.parent.mkdir(parents=True, exist_ok=True)
                self._history.touch(mode=0o600)
                if self._history.is_file():
                    readline.write_history_file(self._history)
        return line

    def _complete(self, text: str, state: int) -> str | None:
        if not text or readline.get_begidx() > 0:
            return None
        fitting = [command for command in self._commands if command.startswith(text)]
        return fitting[state] if state < len(fitting) else None


def unquoted(text: str) -> str:
    """A text without the quotes of its block."""
    return text.removeprefix(BLOCK).removesuffix(BLOCK).strip() if text.startswith(BLOCK) else text
