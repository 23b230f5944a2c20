"""Prompt lookup: what followed the same tokens before, whatever the index has been through."""

from __future__ import annotations

import contextlib
import sys

from hypothesis import given
from hypothesis import strategies as st

from runner.draft.drafters import Proposal
from runner.draft.lookup import LONGEST, REACH, Lookup

TEXT = st.lists(st.integers(0, 3), max_size=30)


def proposals(tokens: list[int], length: int) -> list[Proposal]:
    return [Proposal(token, 1 - 3 / (3 + (length + i) ** 1.5)) for i, token in enumerate(tokens)]


def expected(text: list[int], n: int, tail: list[int], shortest: int = 1) -> list[Proposal]:
    """The definition, by brute force: the latest place after the longest suffix of at most LONGEST tokens."""
    whole = text + tail
    for length in range(min(LONGEST, len(whole)), shortest - 1, -1):
        places = [i for i in range(length, len(text)) if text[i - length : i] == whole[len(whole) - length :]]
        if places:
            place = places[-1]
            reach = min(REACH, len(whole) - 1, place)
            while length < reach and whole[len(whole) - length - 1] == text[place - length - 1]:
                length += 1
            continued = list(whole)
            for i in range(n):
                continued.append(continued[place + i])
            return proposals(continued[len(whole) :], length)
    return []


@given(st.lists(TEXT, min_size=1, max_size=6), st.integers(1, 8), st.lists(st.integers(0, 3), max_size=3))
def test_guesses_as_a_fresh_index_would(texts: list[list[int]], n: int, tail: list[int]) -> None:
    """After any sequence of texts, so after any rewind."""
    lookup = Lookup()
    for text in texts:
        lookup.follow(text)
        assert lookup.guess(n) == expected(text, n, [])
        assert lookup.guess(n, tail) == expected(text, n, tail)
        assert lookup.guess(n, tail, shortest=2) == expected(text, n, tail, shortest=2)


def test_continues_a_repetition_over_its_own_end() -> None:
    lookup = Lookup()
    lookup.follow([1, 2, 3, 1, 2, 3])
    assert lookup.guess(7) == proposals([1, 2, 3, 1, 2, 3, 1], 3)


def interrupted(lookup: Lookup, text: list[int], at: int) -> None:
    """Follow a text and press Ctrl-C before the at-th line of Python."""
    lines = iter(range(at))

    def trace(frame, event, arg):
        if frame.f_code is not Lookup.follow.__code__:
            return None
        if event == "line" and next(lines, None) is None:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            lookup.follow(text)
    finally:
        sys.settrace(before)


def test_guesses_as_a_fresh_index_would_after_a_ctrl_c_at_any_line() -> None:
    first, second, third = [1, 2, 3, 1, 2], [1, 2, 0, 3, 2, 1], [1, 2, 3, 1, 2, 3]
    for at in range(120):
        lookup = Lookup()
        lookup.follow(first)
        interrupted(lookup, second, at)
        for text in (third, second):
            lookup.follow(text)
            assert lookup.guess(4) == expected(text, 4, [])
