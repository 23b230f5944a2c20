"""Grammars in GBNF: llama.cpp's reasons are given, and no grammar ends or holds up the calling process."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llamabase.errors import EngineError, SettingError
from llamabase.llama.model import Model
from llamabase.sampling import grammar as grammar_module
from llamabase.sampling.chain import Chain
from llamabase.sampling.grammar import Grammar
from llamabase.sampling.settings import Sampling
from llamabase.sampling.worker import MEMORY, SECONDS, Worker, WorkerEnded


@pytest.fixture(scope="module")
def model(toys: dict[str, Path]) -> Iterator[Model]:
    with Model(toys["target"], vocab_only=True) as opened:
        yield opened


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("root ::= (", "expecting"),
        ("root ::= x", "Undefined rule identifier 'x'"),
        ('x ::= "a"', "does not contain a 'root' symbol"),
        ('root ::= root "a" | "b"', "left recursion"),
        ('root ::= "a" }', "expecting newline or end"),
    ],
)
def test_a_grammar_that_does_not_parse(model: Model, grammar: str, reason: str, capfd) -> None:
    with pytest.raises(EngineError, match=f"the grammar cannot be used: .*{reason}.*; correct it"):
        Chain(Sampling(grammar=grammar), [], model)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("letter", "reason"), [("\0", "NUL"), ("\udcff", "not text in UTF-8")])
def test_a_grammar_that_llama_cpp_would_not_get_whole(model: Model, letter: str, reason: str) -> None:
    with pytest.raises(EngineError, match=f"the grammar cannot be used: .*{reason}"):
        Grammar(model, f'root ::= "a" # {letter} \n | "b"')


DOUBLING = "\n".join(f'a{chr(97 + i)} ::= "" | a{chr(98 + i)} a{chr(98 + i)}' for i in range(24))


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "a"{3,1}',  # as many rules as fit 64 bits
        f'root ::= {"(" * 100_000}"a"{")" * 100_000}',  # overflows the stack
        f'root ::= "{"a" * 200_000}"' + "{2000}",  # 400 million elements
        f'root ::= aa\n{DOUBLING}\nay ::= "x"',  # two to the 24 stacks before the first token
        'root ::= a\na ::= b a "z" | "x"\nb ::= c\nc ::= "" | "y"',  # left recursion that llama.cpp does not see
    ],
    ids=["backwards", "deep", "long", "doubling", "hidden recursion"],
)
def test_a_grammar_that_takes_too_much_is_refused(model: Model, grammar: str) -> None:
    """In a bounded time, and the next one works."""
    began = time.monotonic()
    with pytest.raises(SettingError, match=r"over 2 s or 500 MB|stack"):
        Grammar(model, grammar).allowed(np.arange(model.n_vocab))
    assert time.monotonic() - began < SECONDS + 8  # with the start of the worker, on a busy machine
    assert Grammar(model, 'root ::= "a"').allowed(np.arange(model.n_vocab)).sum() == 1


def test_a_grammar_that_explodes_later_is_ended_there(model: Model) -> None:
    """Nothing is wrong with it before a `q`."""
    grammar = Grammar(model, f'root ::= "q" "q" "q" aa\n{DOUBLING}\nay ::= "x"')
    assert grammar.allowed(np.arange(model.n_vocab)).sum() == 1
    grammar.accept(model.tokenize("q")[0])
    with pytest.raises(SettingError, match="simplify it"):
        grammar.allowed(np.arange(model.n_vocab))
    with pytest.raises(SettingError, match="was lost"):
        grammar.accept(model.tokenize("q")[0])


def test_quoted_parentheses_are_not_nesting(model: Model) -> None:
    braces = "(" * 5000
    Grammar(model, f'root ::= "\\"{braces}" | # {braces}\n [\\]"{braces}]')


def test_grammars_of_several_threads(model: Model) -> None:
    """Each has its own place in its own grammar, and stderr stays the same."""
    before, wrong = os.fstat(2), []
    letters = [model.tokenize(letter)[0] for letter in "abcd"]

    def follow(i: int) -> None:
        for _ in range(5):
            grammar = Grammar(model, f'root ::= "{"abcd"[i]}"+ "{"abcd"[i - 1]}"')
            for _ in range(4):
                grammar.accept(letters[i])
                allowed = np.flatnonzero(grammar.allowed(np.arange(model.n_vocab))).tolist()
                wrong.extend([] if {letters[i], letters[i - 1]} <= set(allowed) else [allowed])
            with pytest.raises(EngineError, match="expecting"):
                Grammar(model, "root ::= (")

    threads = [threading.Thread(target=follow, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert os.path.samestat(os.fstat(2), before)


def test_nothing_is_kept_of_grammars_that_are_gone(model: Model) -> None:
    for _ in range(50):
        Grammar(model, 'root ::= "a"')
    last = Grammar(model, 'root ::= "a"')
    assert grammar_module._WORKER.call(_kept) <= 2
    assert last.allowed(np.arange(3)).sum() == 0


def _kept() -> int:
    return len(grammar_module._samplers)


def test_it_needs_no_folder_to_write_to(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a read-only file system."""
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setattr(grammar_module, "_WORKER", Worker(grammar_module.__name__))
    with pytest.raises(EngineError, match="expecting"):
        Grammar(model, "root ::= (")
    grammar_module._WORKER.end()


def _takes(bytes_: int) -> int:
    return len(bytearray(bytes_))


def _spins() -> None:
    while True:
        pass


def _ends() -> None:
    os.abort()


def test_the_worker_is_bounded_and_comes_back() -> None:
    worker = Worker(__name__)
    try:
        assert worker.call(_takes, 10 << 20) == 10 << 20
        with pytest.raises(MemoryError):
            worker.call(_takes, MEMORY + (100 << 20))
        with pytest.raises(WorkerEnded):
            worker.call(_spins)
        with pytest.raises(WorkerEnded):
            worker.call(_ends)
        assert worker.call(re.escape, ".") == r"\."
    finally:
        worker.end()


def test_an_interruption_between_question_and_answer_starts_it_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(__name__)
    try:
        assert worker.call(_takes, 1) == 1
        answer = worker._process.stdout  # type: ignore[union-attr]

        class Interrupted:
            def read(self, *_: object) -> bytes:
                raise KeyboardInterrupt

            readline = read

            def close(self) -> None:
                answer.close()  # type: ignore[union-attr]

        worker._process.stdout = Interrupted()  # type: ignore[union-attr, assignment]
        with pytest.raises(KeyboardInterrupt):
            worker.call(_takes, 2)
        assert worker.call(_takes, 3) == 3
    finally:
        worker.end()


_ATOMS = ('"a"', '"the"', "[a-z]", "[^x]", ".", "x", "y", "root", '""', '"\\x41"', '"é"', "<[5]>", "<tool>", "!<[7]>")
_REPEATS = ("", "", "", "", "*", "+", "?", "{2}", "{0,3}", "{2,}")
_HOSTILE = ("{3,1}", "{0,2000}", "{999999999999999999999}", "{2000}")
_NOISE = (
    "(",
    ")",
    "|",
    "*",
    "\n",
    "[",
    "]",
    '"',
    "\\",
    "::=",
    "#c\n",
    "[a-",
    "{,3}",
    "()",
    "|||",
    "!",
    "<",
    "\nz ::= ",
)


def expression(rng: np.random.Generator, depth: int = 0) -> str:
    def atom() -> str:
        repeat = str(rng.choice(_HOSTILE if rng.random() < 0.02 else _REPEATS))
        if depth < 4 and rng.random() < 0.2:
            return f"({expression(rng, depth + 1)}){repeat}"
        return f"{rng.choice(_ATOMS)}{repeat}"

    return " | ".join(" ".join(atom() for _ in range(rng.integers(1, 4))) for _ in range(rng.integers(1, 4)))


def random_grammar(rng: np.random.Generator) -> str:
    """Mostly one that parses; now and then with noise in it."""
    text = "\n".join(
        f'{name} ::= "{letter}" {expression(rng)}' for name, letter in (("root", "e"), ("x", "t"), ("y", "o"))
    )
    if rng.random() < 0.3:
        at = int(rng.integers(len(text)))
        text = f"{text[:at]} {rng.choice(_NOISE)} {text[at:]}"
    return text


@pytest.mark.parametrize("n", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_grammars(model: Model, n: int) -> None:
    """Each is refused, or followed for some tokens; none ends this process, and none takes more than its limits."""
    rng, used, slowest, worst = np.random.default_rng(5), 0, 0.0, 0.0
    for _ in range(n):
        text, began = random_grammar(rng), time.monotonic()
        try:
            grammar = Grammar(model, text)
            for _ in range(6):
                allowed = np.flatnonzero(grammar.allowed(np.arange(model.n_vocab)))
                if not len(allowed):
                    break
                grammar.accept(int(rng.choice(allowed)))
            used += 1
        except SettingError as error:
            assert "the grammar" in str(error)
            worst = max(worst, time.monotonic() - began)
            continue
        slowest = max(slowest, time.monotonic() - began)
    print(f"{used} of {n} followed, slowest {slowest:.2f} s; the slowest refusal took {worst:.2f} s")
    assert n / 20 < used < n
    assert worst < SECONDS + 3
