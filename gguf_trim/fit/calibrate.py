"""What a drafter makes of a text: its logits, its hidden states, and which of a target's tokens it drafts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from corpus.answers import TargetAnswer, read_answers, ready_answers
from corpus.prompts import spread
from gguf_trim.format.companion import Trimmed
from gguf_trim.format.mtp import MTP, MtpBlock, kept_rows
from gguf_trim.format.speculator import Speculator
from gguf_trim.format.state_fed import EAGLE3, Eagle3Head
from llamabase.cli.progress import progress
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.context import Context
from llamabase.llama.ggml import Product
from llamabase.llama.model import Model
from llamabase.llama.states import PairContext, Recorded

from .closed_form import fit

CONVERSATIONS, TOKENS = 64, 160  # read to fit on, spread over those there are; some thousand positions are enough
ROWS = 256  # positions whose logits and hidden states are held at a time
PAIR_ROWS = 32  # the same where a row of logits is as long as the target's vocabulary


def read_through(
    model_path: Path,
    answers: Sequence[TargetAnswer],
    advance: Callable[[int], object],
    trimmed: Trimmed | None = None,
    n_threads: int | None = None,
    whole: bool = False,
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Read answers with a model: (n, i, logits, hidden), what it makes of answer n before its token i.

    logits: float32 (rows of the head), hidden: float32 (n_embd), the final hidden state; both are views until the next.
    With `whole` after every token, those of the prompt (i < 0) and the last one too. `trimmed` makes a trimmed
    drafter's inputs of ids; for None they are the ids, those of a target's padding as the last. advance(1) is called
    after every answer.
    """
    longest = max(len(found.prompt) + len(found.answer) for found in answers)
    feed = None if trimmed is None else trimmed.embeddings().rows
    with Model(model_path) as model, Context(model, -(-longest // 32) * 32, n_threads, n_outputs=ROWS) as context:
        inputs = feed or (lambda ids: np.minimum(ids, model.n_vocab - 1))
        for n, found in enumerate(answers):
            text, asked = [*found.prompt, *found.answer], len(found.prompt)
            begin, end = (0, len(text)) if whole else (asked - 1, len(text) - 1)
            context.truncate(0)
            if begin:
                context.decode(inputs(text[:begin]), 0)
            for start in range(begin, end, ROWS):
                ids = text[start : min(start + ROWS, end)]
                logits = context.decode(inputs(ids), len(ids), hidden=True)
                hidden = context.hidden_states(len(ids))
                for row in range(len(ids)):
                    yield n, start + row + 1 - asked, logits[row], hidden[row]
            advance(1)


def read_state_fed(
    head: Eagle3Head | MtpBlock,
    target: Path,
    answers: Sequence[TargetAnswer],
    advance: Callable[[int], object],
    n_threads: int | None = None,
    rows: Product | None = None,
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """`read_through` of whole answers for what hangs on a target: what it makes of the target's states, before it goes
    on from its own. Of a first token nothing is made.

    logits: float32 (n_vocab of the target), -inf where an EAGLE-3 head has no row; of an MTP block those of `rows`.
    """
    longest = -(-max(len(found.prompt) + len(found.answer) for found in answers) // 32) * 32
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(Model(target))
        context = stack.enter_context(Context(model, longest, n_threads))
        if isinstance(head, MtpBlock):
            recorded = Recorded.of(context)
            pairs = PairContext(model, longest, n_threads, n_outputs=PAIR_ROWS, mtp=True, head=False)
        else:
            head.require_target(GGUFFile(target), Vocabulary(GGUFFile(target)))
            recorded = Recorded.of(context, GGUFFile(target).architecture, head.layers)
            own = stack.enter_context(Model(head.file.path))
            pairs = PairContext(own, longest, n_threads, context, n_outputs=PAIR_ROWS)
        stack.enter_context(pairs)
        for n, found in enumerate(answers):
            text, asked = [*found.prompt, *found.answer], len(found.prompt)
            context.truncate(0)
            pairs.truncate(0)
            context.decode(text, 0)
            states = pairs.encode(recorded.rows[: len(text) - 1])
            for start in range(0, len(states), PAIR_ROWS):
                part = states[start : start + PAIR_ROWS]
                logits, made = pairs.pairs(text[start + 1 : start + 1 + len(part)], part, True)
                hidden = head.hidden(made)
                for row in range(len(part)):
                    yield n, start + row + 2 - asked, logits[row] if rows is None else rows(hidden[row]), hidden[row]
            advance(1)


def calibration(file: GGUFFile, path: Path | None = None) -> list[TargetAnswer]:
    """Answers to fit on: lines of `python -m corpus generate`, or those that ship for None; cut to TOKENS in all.

    `file` has the tokenizer: the drafter, or its companion.
    """
    if path is None:
        found = ready_answers(file, CONVERSATIONS)
    else:
        found = spread(read_answers(path, len(Vocabulary(file))), CONVERSATIONS)
    return [
        replace(answer, prompt=answer.prompt[:TOKENS], answer=answer.answer[: max(0, TOKENS - len(answer.prompt))])
        for answer in found
    ]


def share(rights: Sequence[np.ndarray]) -> float:
    """Share of positions (bool arrays, one an answer) that are right; 0 without positions."""
    positions = sum(map(len, rights))
    return sum(int(right.sum()) for right in rights) / positions if positions else 0.0


@dataclass(frozen=True)
class Reading:
    """What a drafter makes of answers: its final hidden states (float32, positions x n_embd), and for each answer which
    of its tokens it drafts, from the rows it has. The states do not depend on how many rows those are."""

    states: np.ndarray
    rights: list[np.ndarray]

    @classmethod
    def of(
        cls,
        drafter: Path,
        answers: Sequence[TargetAnswer],
        trimmed: Trimmed | None = None,
        n_threads: int | None = None,
        title: str = "reading hidden states",
        target: Path | None = None,
    ) -> Reading:
        """Read answers with a drafter, with a bar; one that is trimmed is given as `trimmed`, too, and `target` is what
        an EAGLE-3 head hangs on.
        """
        states, rights = [], [[False] * len(found.answer) for found in answers]
        with progress(title, len(answers), "answers") as advance:
            if target is not None and (file := GGUFFile(drafter)).architecture == MTP:
                block, kept = MtpBlock.of(GGUFFile(target)), kept_rows(file, n_threads)
                steps = read_state_fed(block, target, answers, advance, n_threads, kept)
            elif target is not None and file.architecture == EAGLE3:
                steps = read_state_fed(Eagle3Head.of(file), target, answers, advance, n_threads)
                trimmed = None  # its logits are by id
            else:
                steps = read_through(drafter, answers, advance, trimmed, n_threads, whole=True)
            for n, i, logits, hidden in steps:
                states.append(hidden.copy())
                if 0 <= i < len(answers[n].answer):
                    row = int(np.argmax(logits))
                    rights[n][i] = (row if trimmed is None else int(trimmed.d2t[row])) == answers[n].answer[i]
        return cls(np.array(states), [np.array(found, bool) for found in rights])

    def fitted(self, file: GGUFFile, rank: int | None = None, steps: int = 0) -> Speculator:
        """A speculator fitted to the head in `file`, the drafter or its companion; see `fit`.

        `steps` > 0 trains the closed form further; see `train`.
        """
        found = fit(file, self.states, rank)
        if steps:
            from .train import distil

            found = distil(found, file, self.states, steps)
        return replace(found, acceptance=share(self.rights))
