"""What a target said, as token ids: the text a drafter is judged and fitted on, and the pass that reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corpus.errors import FileFormatError
from corpus.llama import Context, Model

ROWS = 256  # positions whose logits and hidden states are held at a time


@dataclass(frozen=True)
class TargetAnswer:
    """What the target said: token ids of prompt and answer, and a label to group by."""

    id: str
    label: str
    prompt: list[int]
    answer: list[int]


def read_answers_file(path: Path) -> list[TargetAnswer]:
    """Answers as `{id: [prompt_ids, answer_ids]}` in one JSON object, or as lines of `python -m corpus generate`."""
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            pairs = {line["id"]: (line["prompt_ids"], line["answer_ids"], line.get("label", "all")) for line in lines}
        else:
            pairs = {name: (prompt, answer, "all") for name, (prompt, answer) in json.loads(text).items()}
        found = [
            TargetAnswer(str(name), str(label), [int(i) for i in prompt], [int(i) for i in answer])
            for name, (prompt, answer, label) in pairs.items()
        ]
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{path}: should hold {{id: [prompt_ids, answer_ids]}} ({error})") from error
    found = [answer for answer in found if answer.prompt and answer.answer]
    if not found:
        raise FileFormatError(f"{path}: holds no answers")
    return found


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
