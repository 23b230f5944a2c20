"""Prompt lookup: what followed the same tokens before, whatever the index has been through."""

from __future__ import annotations

import contextlib
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from types import CodeType

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from llamabase.errors import EngineError
from llamabase.sampling.settings import Sampling
from runner.draft import lookup as module
from runner.draft.drafters import Proposal
from runner.draft.lookup import DISCOUNT, END, REACH, SEEN, Answers, Index, Lookup
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions
from runner.options import Models
from runner.serve.__main__ import main as serve

TEXT = st.lists(st.integers(0, 3), max_size=30)


def worth(length: float) -> float:
    return 1 - 3 / (3 + length**1.5)


def proposals(tokens: Sequence[int], length: int, discount: int = 1) -> list[Proposal]:
    """Those after a single match."""
    return [Proposal(token, worth((length + i) / discount)) for i, token in enumerate(tokens)]


def longest(said: list[int], end: list[int]) -> tuple[int, list[int]]:
    """The length of the longest match, and where in `said` such matches end."""

    def length(place: int) -> int:
        return max(n for n in range(min(REACH, place, len(end)) + 1) if said[place - n : place] == end[len(end) - n :])

    lengths = {place: length(place) for place in range(len(said))}
    most = max(lengths.values(), default=0)
    return most, [place for place in lengths if lengths[place] == most]


def expected(
    text: list[int], n: int, tail: Sequence[int] = (), shortest: int = 1, answers: Sequence[list[int]] = ()
) -> list[Proposal]:
    """The definition, by brute force: the most frequent next token after the longest match, the latest at a tie."""
    said, end = [*text, *tail], [*text, *tail]
    (most, places), discount = longest(text, end), 1
    most = most if most >= shortest else 0
    earlier = [token for answer in answers for token in (*answer, END)]
    if (other := longest(earlier, end))[0] >= max(shortest, DISCOUNT * most + 1):
        (most, places), said, discount = other, earlier, DISCOUNT
    found = list[Proposal]()
    while most and len(found) < n:
        nexts = [said[place + len(found)] for place in places]
        token = max(nexts, key=lambda each: (nexts.count(each), max(i for i, t in enumerate(nexts) if t == each)))
        if token == END:
            break
        places = [place for place, each in zip(places, nexts, strict=True) if each == token]
        alone = worth((most + len(found)) / discount)
        found.append(Proposal(token, (len(places) - 1 + alone) / len(nexts)))
        said.append(token)
    return found


@given(st.lists(TEXT, min_size=1, max_size=6), st.integers(1, 8), st.lists(st.integers(0, 3), max_size=3))
def test_guesses_as_a_fresh_index_would(texts: list[list[int]], n: int, tail: list[int]) -> None:
    """After any sequence of texts, so after any rewind."""
    lookup = Lookup()
    for text in texts:
        lookup.follow(text)
        assert lookup.guess(n) == expected(text, n)
        assert lookup.guess(n, tail) == expected(text, n, tail)
        assert lookup.guess(n, tail, shortest=2) == expected(text, n, tail, shortest=2)


@given(st.lists(TEXT, max_size=5), st.lists(TEXT, min_size=1, max_size=3), st.integers(1, 8), TEXT)
def test_earlier_answers_are_used_if_they_match_further(
    answers: list[list[int]], texts: list[list[int]], n: int, tail: list[int]
) -> None:
    pool = Answers()
    lookup, added = Lookup(pool), list[list[int]]()
    for text in texts:
        for answer in answers:
            pool.add(answer)
        lookup.follow(text)
        added += answers
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "SEEN", sys.maxsize)
            assert lookup.guess(n, tail, shortest=2) == expected(text, n, tail, 2, added)


def test_continues_a_repetition_over_its_own_end() -> None:
    lookup = Lookup()
    lookup.follow([1, 2, 3, 1, 2, 3])
    assert lookup.guess(7) == proposals([1, 2, 3, 1, 2, 3, 1], 3)


def test_goes_on_as_most_do_that_agree_so_far() -> None:
    """After 7: 1 2 twice, 1 3 once, and 4 last; then what alone began so."""
    lookup = Lookup()
    lookup.follow([7, 1, 2, 5, 7, 1, 2, 6, 7, 1, 3, 7, 4, 7])
    assert [proposal.token for proposal in lookup.guess(4)] == [1, 2, 6, 7]


def test_a_match_in_an_earlier_answer_must_be_more_than_twice_as_long() -> None:
    pool = Answers()
    pool.add([4, 5, 8, 1, 2, 7])
    lookup = Lookup(pool)
    lookup.follow([1, 2, 9, 5, 8, 1, 2])
    assert lookup.guess(1) == proposals([9], 2)
    lookup.follow([1, 2, 9, 4, 5, 8, 1, 2])
    assert lookup.guess(1) == proposals([7], 5, DISCOUNT)


def test_drafts_never_run_from_one_answer_into_the_next() -> None:
    pool = Answers()
    for answer in ([1, 2, 3, 4], [5, 6]):
        pool.add(answer)
    lookup = Lookup(pool)
    lookup.follow([1, 2])
    assert lookup.guess(9) == proposals([3, 4], 2, DISCOUNT)
    lookup.follow([3, 4])
    assert lookup.guess(9) == []


@pytest.mark.parametrize("size", [1, 5, 16, 40])
def test_a_full_pool_forgets_its_oldest_answers(size: int) -> None:
    most = 32
    pool = Answers(most)
    for first in range(0, 2000, size):
        pool.add(range(first, first + size))
        held = [token for part in reversed(pool.parts) for token in part.tokens]
        assert min(2 * first, most // 2 - size) <= len(held) <= most
        assert held[-2] >= first  # of an answer that is longer than half the pool the beginning


def test_a_pool_takes_no_more_than_documented() -> None:
    """64 bytes a token, if no text shares its tokens, and a megabyte for the tables of each half."""
    n = 1 << 13
    answer = list(range(1000, 1000 + n))
    tracemalloc.start()
    try:
        empty = Answers()
        empty.add([1])
        tables = tracemalloc.get_traced_memory()[0]
        empty.add([token + 1 for token in answer])
        taken = tracemalloc.get_traced_memory()[0] - tables
    finally:
        tracemalloc.stop()
    assert tables < 1 << 20 and taken < 64 * n


def interrupted(codes: Sequence[CodeType], call: Callable[[], object], at: int) -> None:
    """Call and press Ctrl-C before the at-th line of Python among these functions'."""
    lines = iter(range(at))

    def trace(frame, event, arg):
        if frame.f_code not in codes:
            return None
        if event == "line" and next(lines, None) is None:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            call()
    finally:
        sys.settrace(before)


CHANGES = [Index.extend.__code__, Index.cut.__code__]


def test_guesses_as_a_fresh_index_would_after_a_ctrl_c_at_any_line() -> None:
    first, second, third = [1, 2, 3, 1, 2], [1, 2, 0, 3, 2, 1], [1, 2, 3, 1, 2, 3]
    for at in range(120):
        lookup = Lookup()
        lookup.follow(first)
        interrupted([*CHANGES, Lookup.follow.__code__], lambda lookup=lookup: lookup.follow(second), at)
        for text in (third, second):
            lookup.follow(text)
            assert lookup.guess(4) == expected(text, 4)


def test_a_ctrl_c_at_any_line_costs_the_pool_answers_at_most() -> None:
    for at in range(120):
        lookup = Lookup(pool := Answers())
        pool.add([1, 2, 3])
        interrupted([*CHANGES, Answers.add.__code__], lambda pool=pool: pool.add([4, 5, 6]), at)
        pool.add([7, 8, 9])
        for text, guess in (([7], [8, 9]), ([8], [9]), ([1], [2, 3]), ([4], [5, 6])):
            lookup.follow(text)
            assert [proposal.token for proposal in lookup.guess(9)] in ([], guess)
            assert lookup.guess(9) or text[0] < 7


def test_no_more_than_the_latest_places_are_compared() -> None:
    """After 7 came 1 a hundred times, then 2 a little more often than half of SEEN."""
    lookup, n = Lookup(), SEEN // 2 + 1
    nexts = [1] * 100 + [2] * n
    lookup.follow([token for i, following in enumerate(nexts) for token in (100 + i, 7, following)] + [99, 7])
    assert lookup.guess(1) == [Proposal(2, (n - 1 + worth(1)) / SEEN)]


HOT = Sampling(temp=1.5)  # what the toy says then repeats little of itself


@pytest.mark.parametrize("share", [True, False])
def test_conversations_draft_from_each_other_only_if_they_may(toys, share: bool, eager) -> None:
    options = LoadOptions(toys["target"], n_ctx=256, share_answers=share)
    with Engine(options) as engine, engine.share_weights() as other:
        prompt = engine.model.tokenize("the sea and the tea")
        first, again = (list(each.rounds(prompt, HOT, max_tokens=100, seed=1)) for each in (engine, other))
        assert [token for r in first for token in r.tokens] == [token for r in again for token in r.tokens]
        accepted = sum(round_.accepted for round_ in again)
        assert accepted > 60 if share else accepted < 40


@pytest.mark.parametrize("draft_max", [0, None])
def test_an_answer_that_ends_early_is_kept_as_far_as_it_came(toys, draft_max: int | None, eager) -> None:
    with Engine(LoadOptions(toys["target"], n_ctx=256)) as engine:
        prompt, said = engine.model.tokenize("the sea and the tea"), list[int]()
        rounds = engine.rounds(prompt, HOT, max_tokens=100, seed=1, draft_max=draft_max)
        for _ in range(3):
            said += next(rounds).tokens
        rounds.close()
        assert engine.weights.answers is not None
        assert engine.weights.answers.parts[0].tokens == [*said, END]


@pytest.mark.parametrize("flags", [[], ["--share-answers"]])
def test_a_server_shares_answers_only_if_it_is_told_to(toys, monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    def loading(models: Callable[[], Models], measure: bool, n_parallel: int) -> Engine:
        raise EngineError(f"share_answers={models().share_answers}")

    monkeypatch.setattr("runner.serve.__main__.open_measured", loading)
    done = CliRunner().invoke(serve, ["--target", str(toys["target"]), "--port", "0", *flags])
    assert f"share_answers={bool(flags)}" in done.output
