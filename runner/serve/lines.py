"""Where llama-server's n_indent and t_max_predict_ms end an answer: at a line."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from runner.loop.stops import TextPiece


class LineLimit:
    """Ends a text that comes in pieces at a line; `reached` says that it did.

    indent: the text ends before a line, other than the first, that begins with fewer blanks; 0 for no such end. ms: it
    ends with the first line that is complete after that many milliseconds; 0 for any time.
    """

    def __init__(self, indent: int, ms: float) -> None:
        self._short = re.compile(rf"\n[ \t]{{0,{indent - 1}}}(?=[^ \t])") if indent else None  # up to its first word
        self._seconds = ms / 1000 if ms > 0 else float("inf")
        self.reached = False

    def through(self, pieces: Iterator[TextPiece]) -> Iterator[TextPiece]:
        """The text up to its end; the pieces after that are left unread."""
        began, line = float("inf"), ""
        for text, drafted in pieces:
            began = min(began, time.perf_counter())
            line += text
            short = self._short.search(line) if self._short else None
            late = "\n" in text and time.perf_counter() - began > self._seconds
            if kept := text if short is None else text[: short.end() - len(line) + len(text)]:
                yield TextPiece(kept, drafted)
            self.reached = short is not None or late
            if self.reached:
                return
            line = line[line.rfind("\n") :] if "\n" in line else ""
