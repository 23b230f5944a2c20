"""The calls of an answer that comes piece by piece, and its other text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from runner.loop.stops import TextPiece, first_of

from .calls import LOOSE, Call, CallScanner, Form, Tools

GROWTH = 16  # What may become a call is read again once it has grown by this fraction (1/16) of its length.


@dataclass
class CallReader:
    """Takes the calls out of an answer as it comes; everything else is its text.

    `reached`: characters of the answer that were given out or read as calls.
    """

    form: Form
    tools: Tools
    calls: list[Call] = field(default_factory=list)
    reached: int = 0

    def __post_init__(self) -> None:
        self._forms = [self.form, *(form for form in LOOSE if form != self.form)]
        openings = {opening for form in self._forms for opening in form.openings if opening}
        self._openings = re.compile("|".join(re.escape(opening) for opening in sorted(openings)))
        self._beginnings = {opening[:n] for opening in openings for n in range(1, len(opening))}
        self._longest = max(map(len, self._beginnings))
        self._has_text = False  # whether anything but white space was given out since the last call
        self._enough = 0  # characters held back at which they are read again
        self._held = list[TextPiece]()

    def through(self, pieces: Iterable[TextPiece]) -> Iterator[TextPiece]:
        """The text of an answer; what follows the only call that is allowed is left unread."""
        size = 0
        for piece in pieces:
            self._held += [piece] if piece.text else []
            size += len(piece.text)
            if size < self._enough:
                continue
            yield from self._read(ended=False)
            size = sum(len(piece.text) for piece in self._held)
            self._enough = size + size // GROWTH  # so that reading a long call takes time linear in its length
            if self.full:
                return
        yield from self._read(ended=True)

    @property
    def full(self) -> bool:
        """Whether no more calls may follow."""
        return bool(self.calls) and not self.tools.several

    def _read(self, ended: bool) -> Iterator[TextPiece]:
        while self._held and not self.full:
            text = "".join(piece.text for piece in self._held)
            if self.calls and not self._has_text and text[0].isspace():  # between calls
                self._drop(len(text) - len(text.lstrip()))
                continue
            start = self._start(text, ended)
            if start and (self._has_text or text[:start].strip() or (ended and start == len(text))):
                yield from self._out(start)
                continue
            if start == len(text) or (not ended and text[start:] in self._beginnings):
                return
            calls, end = self._block(text[start:], ended)
            if end is None:
                return
            if calls:
                self.calls += calls if self.tools.several else calls[:1]
                self._drop(start + end)
                self._has_text = False
            else:
                yield from self._out(start + 1)

    def _start(self, text: str, ended: bool) -> int:
        """Where a block may begin; the text's length if none does."""
        if not self._has_text:
            blank = len(text) - len(text.lstrip())
            if text[blank : blank + 1] in ("{", "["):
                return blank
        if (opening := self._openings.search(text)) is not None:
            return opening.start()
        begun = () if ended else (n for n in range(self._longest, 0, -1) if text[-n:] in self._beginnings)
        return len(text) - min(next(iter(begun), 0), len(text))

    def _block(self, text: str, ended: bool) -> tuple[list[Call], int | None]:
        """The calls with which a text begins, if any, and where they end; None for the end if more text must come."""
        for form in self._forms:
            if text.startswith(form.openings) and not (self._has_text and "" in form.openings):
                reader = CallScanner(text)
                calls = form.read(reader, self.tools)
                if reader.short and not ended:
                    return [], None
                if calls:
                    return calls, reader.at
        return [], 0

    def _drop(self, n: int) -> None:
        for piece in first_of(self._held, n):
            self.reached += len(piece.text)

    def _out(self, n: int) -> Iterator[TextPiece]:
        for piece in first_of(self._held, n):
            self.reached += len(piece.text)
            self._has_text = self._has_text or bool(piece.text.strip())
            yield piece
