"""What a drafter makes of a text: its logits, its hidden states, and which of a target's tokens it drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from corpus.answers import TargetAnswer, read_answers, ready_answers
from corpus.prompts import spread
from llamabase.gguf_file import GGUFFile
from llamabase.llama import Context, Model

from ..companion import Trimmed

CONVERSATIONS, TOKENS = 64, 160  # read to fit on, spread over those there are; some thousand positions are enough
ROWS = 256  # positions whose logits and hidden states are held at a time


def read_through(
    model_path: Path,
    texts: Sequence[tuple[Sequence[int], int]],
    feed: Callable[[Sequence[int]], Sequence[int] | np.ndarray] | None = None,
    n_threads: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Read texts, each (ids, begin), with a model: (text, i, logits, hidden) after each of its tokens i >= begin.

    logits: float32 (rows of the head), hidden: float32 (n_embd), the final hidden state; both are views until the next.
    `feed` makes a trimmed drafter's inputs of ids; for None they are the ids, those of a target's padding as the last.
    advance(1) is called after every text.
    """
    longest = max(len(ids) for ids, _ in texts)
    with Model(model_path) as model, Context(model, -(-longest // 32) * 32, n_threads, n_outputs=ROWS) as context:
        inputs = feed or (lambda ids: np.minimum(ids, model.n_vocab - 1))
        for text, (ids, begin) in enumerate(texts):
            context.truncate(0)
            if begin:
                context.decode(inputs(ids[:begin]), 0)
            for start in range(begin, len(ids), ROWS):
                n = min(ROWS, len(ids) - start)
                logits = context.decode(inputs(ids[start : start + n]), n, hidden=True)
                hidden = context.hidden_states(n)
                for row in range(n):
                    yield text, start + row, logits[row], hidden[row]
            advance(1)


def calibration(file: GGUFFile, path: Path | None = None) -> list[TargetAnswer]:
    """Answers to fit on: lines of `python -m corpus generate`, or those that ship for None; cut to TOKENS in all.

    `file` has the tokenizer: the drafter, or its companion.
    """
    found = ready_answers(file, CONVERSATIONS) if path is None else spread(read_answers(path), CONVERSATIONS)
    return [
        replace(answer, prompt=answer.prompt[:TOKENS], answer=answer.answer[: max(0, TOKENS - len(answer.prompt))])
        for answer in found
    ]


@dataclass(frozen=True)
class Reading:
    """What a drafter makes of answers: its final hidden states (float32, positions x n_embd), and for each answer which
    of its tokens it drafts, from the rows it has."""

    states: np.ndarray
    rights: list[np.ndarray]


def share(rights: Sequence[np.ndarray]) -> float:
    """Share of positions (bool arrays, one an answer) that are right; 0 without positions."""
    positions = sum(map(len, rights))
    return sum(int(right.sum()) for right in rights) / positions if positions else 0.0


def reading_of(
    drafter: Path,
    answers: Sequence[TargetAnswer],
    trimmed: Trimmed | None = None,
    n_threads: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> Reading:
    """Read answers with a drafter; one that is trimmed is given as `trimmed`, too. See `read_through`."""
    rights: list[list[bool]] = [[] for _ in answers]

    def see(text: int, i: int, logits: np.ndarray) -> None:
        answer = answers[text]
        if 0 <= (place := i + 1 - len(answer.prompt)) < len(answer.answer):
            row = int(np.argmax(logits))
            rights[text].append((row if trimmed is None else int(trimmed.d2t[row])) == answer.answer[place])

    texts = [[*answer.prompt, *answer.answer] for answer in answers]
    feed = None if trimmed is None else trimmed.embeddings().rows
    return Reading(
        states_of(drafter, texts, feed, n_threads, advance, see), [np.array(found, bool) for found in rights]
    )


def states_of(
    drafter: Path,
    texts: Sequence[list[int]],
    feed: Callable[[Sequence[int]], Sequence[int] | np.ndarray] | None = None,
    n_threads: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
    see: Callable[[int, int, np.ndarray], object] = lambda *_: None,
) -> np.ndarray:
    """The drafter's final hidden states over texts: float32 (positions x n_embd); see `read_through`.

    They do not depend on how many rows the head has left. `see` is shown (text, position, logits) of each.
    """
    states = []
    for text, i, logits, hidden in read_through(drafter, [(ids, 0) for ids in texts], feed, n_threads, advance):
        see(text, i, logits)
        states.append(hidden.copy())
    return np.array(states)
