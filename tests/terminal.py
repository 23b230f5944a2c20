"""A program in a terminal: its keyboard, its screen, and the width of both."""

from __future__ import annotations

import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import pytest

from . import NO_SPINNING

# Windows has none: the tests that use one are left out there.
fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))

ROOT = Path(__file__).parent.parent


def _prepare() -> None:
    # A job in the background, as CI may be, inherits an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C typed there is a signal


class Terminal:
    """Python with these arguments on a pseudo-terminal; `screen` is all that has come so far."""

    def __init__(
        self,
        *arguments: str,
        home: Path,
        columns: int = 80,
        stdout: IO[bytes] | None = None,
        **environment: str,
    ) -> None:
        self._keyboard, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        clean = {"PATH": os.environ["PATH"], "HOME": str(home), "XDG_STATE_HOME": str(home), "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=slave,
            stdout=stdout or slave,
            stderr=slave,
            cwd=ROOT,
            env=clean | {"LANG": "C.UTF-8"} | NO_SPINNING | environment,
            start_new_session=True,
            preexec_fn=_prepare,
        )
        os.close(slave)
        self.bytes = b""

    @property
    def screen(self) -> str:
        """What came so far, line ends as the program wrote them."""
        return self.bytes.decode("utf-8", "replace").replace("\r\n", "\n")

    @property
    def plain(self) -> str:
        """The screen without lines that were erased, and without escape sequences, which readline writes as well."""
        left = re.sub(r"[^\n]*\r\x1b\[2K", "", self.screen)
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", left).replace("\r", "")

    def _more(self, timeout: float) -> bool:
        if not select.select([self._keyboard], [], [], timeout)[0]:
            return False
        try:
            data = os.read(self._keyboard, 65536)
        except OSError:  # how Linux says that the other end is closed
            return False
        self.bytes += data
        return bool(data)

    def until(self, text: str, timeout: float = 30) -> Terminal:
        """Wait for a text that was not there before the last `type`."""
        end = time.monotonic() + timeout
        seen = getattr(self, "_seen", 0)
        while text not in self.plain[seen:]:
            assert time.monotonic() < end and (self._more(1) or self.process.poll() is None), self.screen
        self._seen = seen + self.plain[seen:].index(text) + len(text)
        return self

    def type(self, text: str) -> Terminal:
        os.write(self._keyboard, text.encode("utf-8", "surrogateescape"))
        return self

    def interrupt(self) -> Terminal:
        """Ctrl-C, as a person presses it: readline misses the one that comes in the instant after its prompt."""
        time.sleep(0.3)
        return self.type("\x03")

    def end(self, timeout: float = 30) -> int:
        """Wait for the program to end; its exit code."""
        stop = time.monotonic() + timeout
        while self._more(0.2) or self.process.poll() is None:
            assert time.monotonic() < stop, self.screen
        return self.process.wait()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._keyboard)
