"""Stop strings: where a text ends that comes in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


class StopFilter:
    """Ends a text before the stop string that is complete first (of several that end together, the longest).

    What may yet become one waits, so no half of one is given out, however the text is cut into pieces: each is a text
    and whether it was drafted. `stopped`: one is complete; `given`: characters that were given out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, list[tuple[str, bool]]()
        self.stopped, self.given = False, 0

    def through(self, pieces: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
        """What can be given out as they come; after a stop string the rest of them is left unread."""
        for piece in pieces:
            self._held += [piece] if piece[0] else []
            whole = "".join(text for text, _ in self._held)
            if found := [(at + len(stop), at) for stop in self._stops if (at := whole.find(stop)) >= 0]:
                self.stopped = True
                yield from self._out(min(found)[1])
                return
            begun = (n for stop in self._stops for n in range(1, len(stop)) if whole.endswith(stop[:n]))
            yield from self._out(len(whole) - max(begun, default=0))
        yield from self.rest()

    def rest(self) -> Iterator[tuple[str, bool]]:
        """What is held back: the stop string and what came with it, or what did not become one."""
        yield from self._out(sum(len(text) for text, _ in self._held))

    def _out(self, n: int) -> Iterator[tuple[str, bool]]:
        for piece in first_of(self._held, n):
            self.given += len(piece[0])
            yield piece


def first_of(held: list[tuple[str, bool]], n: int) -> Iterator[tuple[str, bool]]:
    """Take the first n characters out of pieces that are held back; one that goes on after them is cut."""
    while held and n > 0:
        text, drafted = held.pop(0)
        if len(text) > n:
            held.insert(0, (text[n:], drafted))
        yield text[:n], drafted
        n -= len(text)
