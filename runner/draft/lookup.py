"""Free drafts: what followed the same tokens earlier in the text (prompt lookup, as llama.cpp's own lookup does)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import Sampling

from .contracts import NoDrafter

LONGEST = 3  # tokens of a suffix that are looked up; the match itself may reach further back
SHORTEST = 2  # a match of one token suggests too little for a fixed draft length
REACH = 16  # how far back a match is measured


class Lookup:
    """An index of a growing text by its n-grams, n = 1 to LONGEST; rewinds with it."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._after: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)  # where an n-gram was followed
        self._settled = True

    def follow(self, text: Sequence[int]) -> None:
        """Take in a text that mostly begins as the last one did."""
        if not self._settled:  # an interruption cut the last call short, and the index is of no text
            self._text, self._after = [], defaultdict(list)
        self._settled = False
        known = self._text
        same = min(len(known), len(text))
        if known[:same] != text[:same]:
            same = next(i for i in range(same) if known[i] != text[i])
        for i in reversed(range(same, len(known))):
            for n in range(1, min(LONGEST, i) + 1):
                self._after[tuple(known[i - n : i])].pop()
        del known[same:]
        known.extend(text[same:])
        for i in range(same, len(known)):
            for n in range(1, min(LONGEST, i) + 1):
                self._after[tuple(known[i - n : i])].append(i)
        self._settled = True

    def guess(self, n: int, tail: Sequence[int] = ()) -> tuple[list[int], int]:
        """(up to n tokens to follow the text and `tail`, length of the match that suggests them).

        The latest of the places that the longest suffix was seen at; a text that repeats itself is continued over its
        own end.
        """
        whole = [*self._text[-REACH - LONGEST :], *tail]
        for length in range(min(LONGEST, len(whole)), 0, -1):
            if places := self._after.get(tuple(whole[-length:])):
                place = places[-1]
                while (
                    length < min(REACH, len(whole) - 1, place) and whole[-length - 1] == self._text[place - length - 1]
                ):
                    length += 1
                rest = list(tail)
                for i in range(place, place + n):
                    rest.append(self._text[i] if i < len(self._text) else rest[i - len(self._text)])
                return rest[len(tail) :], length
        return [], 0


class LookupDrafter(NoDrafter):
    """Drafts by lookup alone: needs no model and takes no time."""

    def __init__(self) -> None:
        self._lookup = Lookup()

    def draft(self, text: Sequence[int], n: int, sampling: Sampling, noise: Noise) -> list[int]:
        self._lookup.follow(text)
        tokens, length = self._lookup.guess(n) if n > 0 else ([], 0)
        return tokens if length >= SHORTEST else []
