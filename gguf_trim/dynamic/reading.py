"""What a drafter makes of a text: its logits, its hidden states, and which of a target's tokens it drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from corpus.answers import TargetAnswer, read_answers_file
from corpus.prompts import spread
from corpus.ready import ready_answers
from llamabase.gguf_file import GGUFFile
from llamabase.llama import Context, Model
from llamabase.states import LayerInputs, PairContext
from llamabase.template import ChatTemplate
from llamabase.vocabulary import Vocabulary

from ..companion import Trimmed
from ..hanging import EAGLE3, HangingHead

CONVERSATIONS, TOKENS = 64, 160  # read to fit on, spread over those there are; some thousand positions are enough
ROWS = 256  # positions whose logits and hidden states are held at a time
PAIR_ROWS = 32  # the same where a row of logits is as long as the target's vocabulary


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


def read_hanging(
    head: HangingHead,
    target: Path,
    texts: Sequence[tuple[Sequence[int], int]],
    n_threads: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """`read_through` for an EAGLE-3 head: what it makes of its target's states, before it goes on from its own.

    logits: float32 (n_vocab of the target), -inf where the head has no row. Nothing is made of a text's first token.
    """
    longest = -(-max(len(ids) for ids, _ in texts) // 32) * 32
    target_file = GGUFFile(target)
    head.require_target(target_file, Vocabulary(target_file))
    with (
        Model(target) as model,
        Context(model, longest, n_threads) as context,
        Model(head.file.path) as own,
        PairContext(own, longest, n_threads, context, n_outputs=PAIR_ROWS) as pairs,
    ):
        inputs = LayerInputs.of(context, target_file.architecture, head.layers)
        for text, (ids, begin) in enumerate(texts):
            context.truncate(0)
            pairs.truncate(0)
            context.decode(ids, 0)
            states = pairs.encode(inputs.rows[: len(ids) - 1])
            for start in range(0, len(ids) - 1, PAIR_ROWS):
                n = min(PAIR_ROWS, len(ids) - 1 - start)
                logits, made = pairs.pairs(ids[start + 1 : start + 1 + n], states[start : start + n], True)
                hidden = head.hidden(made)
                for row in range(max(begin - 1 - start, 0), n):
                    yield text, start + row + 1, logits[row], hidden[row]
            advance(1)


def calibration(file: GGUFFile, path: Path | None = None) -> list[TargetAnswer]:
    """Answers to fit on: lines of `python -m corpus generate`, or those that ship for None; cut to TOKENS in all.

    `file` has the tokenizer: the drafter, or its companion.
    """
    if path is not None:
        found = read_answers_file(path)
    else:
        template = ChatTemplate(file, Vocabulary(file))
        with Model(file.path, vocab_only=True) as model:
            found = [
                TargetAnswer(
                    str(i),
                    "all",
                    template.ids(model, messages[:-1]),
                    model.tokenize(messages[-1]["content"], special=False, add_bos=False),
                )
                for i, messages in enumerate(ready_answers())
            ]
    return [
        replace(answer, prompt=answer.prompt[:TOKENS], answer=answer.answer[: max(0, TOKENS - len(answer.prompt))])
        for answer in spread(found, CONVERSATIONS)
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
    target: Path | None = None,
) -> Reading:
    """Read answers with a drafter; one that is trimmed is given as `trimmed`, too, and `target` is the one that an
    EAGLE-3 head hangs on. See `read_through` and `read_hanging`.
    """
    texts = [([*answer.prompt, *answer.answer], 0) for answer in answers]
    if target is not None and (file := GGUFFile(drafter)).architecture == EAGLE3:
        steps, ids = read_hanging(HangingHead.of(file), target, texts, n_threads, advance), None
    else:
        feed = None if trimmed is None else trimmed.embeddings().rows
        steps = read_through(drafter, texts, feed, n_threads, advance)
        ids = None if trimmed is None else trimmed.d2t
    states: list[np.ndarray] = []
    rights: list[list[bool]] = [[] for _ in answers]
    for text, i, logits, hidden in steps:
        states.append(hidden.copy())
        answer = answers[text]
        if 0 <= (place := i + 1 - len(answer.prompt)) < len(answer.answer):
            row = int(np.argmax(logits))
            rights[text].append((row if ids is None else int(ids[row])) == answer.answer[place])
    return Reading(np.array(states), [np.array(found, bool) for found in rights])


def states_of(
    drafter: Path,
    texts: Sequence[list[int]],
    feed: Callable[[Sequence[int]], Sequence[int] | np.ndarray] | None = None,
) -> np.ndarray:
    """The drafter's final hidden states over texts: float32 (positions x n_embd); see `read_through`.

    They do not depend on how many rows the head has left.
    """
    return np.array([hidden.copy() for *_, hidden in read_through(drafter, [(ids, 0) for ids in texts], feed)])
