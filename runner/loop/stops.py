"""The text of an answer as it comes in pieces, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class TextPiece(NamedTuple):
    """A part of an answer's text, and whether it was drafted and accepted."""

    text: str
    drafted: bool


class StopFilter:
    """Ends a text before the stop string that is complete first, the longest of several that end together.

    A possible prefix of a stop string is held back, so that no half of one is given out, however the text is cut into
    pieces. `stopped`: a stop string is complete. `given`: the number of characters given out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, list[TextPiece]()
        self.stopped, self.given = False, 0

    def through(self, pieces: Iterable[TextPiece]) -> Iterator[TextPiece]:
        """What can be given out of the pieces as they come. Those after a stop string are left unread."""
        for piece in pieces:
            self._held += [piece] if piece.text else []
            whole = "".join(held.text for held in self._held)
            if ends := [(at + len(stop), at) for stop in self._stops if (at := whole.find(stop)) >= 0]:
                self.stopped = True
                yield from self._out(min(ends)[1])
                return
            begun = (n for stop in self._stops for n in range(1, len(stop)) if whole.endswith(stop[:n]))
            yield from self._out(len(whole) - max(begun, default=0))
        yield from self.rest()

    def rest(self) -> Iterator[TextPiece]:
        """What is held back: a stop string and what came with it, or what did not become one."""
        yield from self._out(sum(len(held.text) for held in self._held))

    def _out(self, n: int) -> Iterator[TextPiece]:
        for piece in first_of(self._held, n):
            self.given += len(piece.text)
            yield piece


def first_of(held: list[TextPiece], n: int) -> Iterator[TextPiece]:
    """Take the first n characters out of pieces that are held back. The last piece may be cut."""
    while held and n > 0:
        text, drafted = held.pop(0)
        if len(text) > n:
            held.insert(0, TextPiece(text[n:], drafted))
        yield TextPiece(text[:n], drafted)
        n -= len(text)
