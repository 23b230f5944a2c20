"""What a drafter makes of a text: its logits, its hidden states, and which of a target's tokens it drafts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from corpus.answers import TargetAnswer, read_answers, ready_answers
from corpus.prompts import spread
from gguf_trim.format.assistant import AssistantSteps
from gguf_trim.format.companion import Trimmed
from gguf_trim.format.mtp import MTP, MtpBlock, kept_rows
from gguf_trim.format.speculator import Speculator
from gguf_trim.format.state_fed import DFLASH, EAGLE3, Eagle3Head
from llamabase.cli.progress import Advance, progress
from llamabase.errors import FileFormatError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import ASSISTANT
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.context import Context, ContextParams
from llamabase.llama.ggml import Product
from llamabase.llama.model import Model
from llamabase.llama.states import PairContext, Recorded

from .acceptance import DRAFTED, acceptances
from .closed_form import fit

CONVERSATIONS, TOKENS = 64, 160  # answers to fit on, and tokens of each: some thousand positions are enough
JUDGED = "judged"  # the label of answers that are not fitted to: by them the acceptance is measured
HIDDEN_ONLY = {"lfm2", "lfm2moe"}  # of these llama.cpp computes no logits if hidden states are asked for
ROWS = 256  # positions whose logits and hidden states are held at a time
PAIR_ROWS = 32  # the same of a state-fed drafter, whose rows of logits are as long as its target's vocabulary
HELD_OUT = 4  # of so many answers of one's own one is judged


@dataclass(frozen=True)
class Position:
    """What a model makes of a text before one of its tokens; the arrays are views until the next position.

    `token` counts from the first token of answer number `answer` on: it is negative within the prompt, and the answer's
    length after its last token. `hidden` (float32, n_embd) is the final hidden state.
    """

    answer: int
    token: int
    logits: np.ndarray
    hidden: np.ndarray


def read_through(
    model_path: Path,
    answers: Sequence[TargetAnswer],
    advance: Advance,
    trimmed: Trimmed | None = None,
    n_threads: int | None = None,
    whole: bool = False,
) -> Iterator[Position]:
    """Read answers with a model: the positions of their tokens, or with `whole` those after every token of a text.

    `trimmed` makes a trimmed drafter's inputs of ids; the logits are by row of its head.
    """
    file = GGUFFile(model_path)
    head = kept_rows(file, n_threads) if file.architecture in HIDDEN_ONLY else None
    longest, how = _longest(answers), ContextParams(n_threads)
    with Model(model_path) as model, Context(model, longest, how, n_outputs=ROWS) as context:
        last = model.n_vocab - 1  # which stands for the padding of a target's longer table, too
        inputs = trimmed.embeddings().rows if trimmed else lambda ids: np.minimum(ids, last)
        for n, answer in enumerate(answers):
            text, asked = [*answer.prompt, *answer.answer], len(answer.prompt)
            begin, end = (0, len(text)) if whole else (asked - 1, len(text) - 1)
            context.truncate(0)
            if begin:
                context.decode(inputs(text[:begin]), 0)
            for start in range(begin, end, ROWS):
                ids = text[start : min(start + ROWS, end)]
                logits = context.decode(inputs(ids), len(ids), hidden=True)
                hidden = context.hidden_states(len(ids))
                for row in range(len(ids)):
                    scores = logits[row] if head is None else head(hidden[row])
                    yield Position(n, start + 1 + row - asked, scores, hidden[row])
            advance(1)


def read_state_fed(
    head: Eagle3Head | MtpBlock,
    target: Path,
    answers: Sequence[TargetAnswer],
    advance: Advance,
    n_threads: int | None = None,
    rows: Product | None = None,
) -> Iterator[Position]:
    """Read answers with a drafter that reads its target's states: the positions after every token but the first.

    logits: by id of the target, -inf if an EAGLE-3 head has no row for it; of an MTP block those that `rows` make.
    """
    longest, file = _longest(answers), GGUFFile(target)
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(Model(target))
        context = stack.enter_context(Context(model, longest, ContextParams(n_threads)))
        if isinstance(head, MtpBlock):
            recorded = Recorded.of(context)
            pairs = PairContext(model, longest, ContextParams(n_threads), n_outputs=PAIR_ROWS, mtp=True, head=False)
        else:
            head.require_target(file, Vocabulary(file))
            recorded = Recorded.of(context, file.architecture, head.layers)
            own = stack.enter_context(Model(head.file.path))
            pairs = PairContext(own, longest, ContextParams(n_threads), context, n_outputs=PAIR_ROWS)
        stack.enter_context(pairs)
        for n, answer in enumerate(answers):
            text, asked = [*answer.prompt, *answer.answer], len(answer.prompt)
            context.truncate(0)
            pairs.truncate(0)
            context.decode(text, 0)
            states = pairs.encode(recorded.rows[: len(text) - 1])
            for start in range(0, len(states), PAIR_ROWS):
                part = states[start : start + PAIR_ROWS]
                logits, made = pairs.pairs(text[start + 1 : start + 1 + len(part)], part, True)
                for row, hidden in enumerate(head.hidden(made)):
                    scores = logits[row] if rows is None else rows(hidden)
                    yield Position(n, start + 2 + row - asked, scores, hidden)
            advance(1)


def read_assistant(
    drafter: Path,
    target: Path,
    answers: Sequence[TargetAnswer],
    advance: Advance,
    n_threads: int | None = None,
    trimmed: Trimmed | None = None,
) -> Iterator[Position]:
    """Read answers with an assistant: the positions after every token but the first, the last ones first.

    A draft attends to what comes before its token, so the target's cache forgets a text token by token from its end.
    """
    longest = _longest(answers)
    with Model(target) as model, Context(model, longest, ContextParams(n_threads)) as context, Model(drafter) as own:
        recorded, steps = Recorded.of(context), AssistantSteps(own, context, ContextParams(n_threads), trimmed)
        with steps.context:
            for n, answer in enumerate(answers):
                text, asked = [*answer.prompt, *answer.answer], len(answer.prompt)
                context.truncate(0)
                context.decode(text, 0)
                for last in range(len(text) - 1, 0, -1):
                    context.truncate(last)
                    yield Position(n, last + 1 - asked, *steps.begin(text[last], recorded.rows[last - 1]))
                advance(1)


def _longest(answers: Sequence[TargetAnswer]) -> int:
    """Tokens of a context that holds every text, a multiple of 32."""
    return -(-max(len(answer.prompt) + len(answer.answer) for answer in answers) // 32) * 32


def calibration(file: GGUFFile, path: Path | None = None) -> list[TargetAnswer]:
    """Answers to fit on and to judge by, from a file of `python -m corpus generate` or, for None, those that ship.

    CONVERSATIONS of them, evenly spread, each cut to TOKENS with its prompt; `file` has the tokenizer. Of a file's
    answers one of HELD_OUT is judged. Of those that ship, others are: a cut keeps the tokens that were counted, so on
    the counted answers it would seem to lose nothing.
    """
    judged = list[TargetAnswer]()
    if path is None:
        answers = ready_answers(file, CONVERSATIONS)
        judged = [replace(answer, label=JUDGED) for answer in ready_answers(file, CONVERSATIONS // 2, JUDGED)]
    else:
        answers = held_out(spread(read_answers(path, len(Vocabulary(file))), CONVERSATIONS))
    short = [
        replace(answer, prompt=answer.prompt[:TOKENS], answer=answer.answer[: max(0, TOKENS - len(answer.prompt))])
        for answer in answers
    ]
    return [*short, *judged]


def held_out(answers: Sequence[TargetAnswer]) -> list[TargetAnswer]:
    """The same, one of HELD_OUT labelled as JUDGED."""
    return [
        replace(answer, label=JUDGED) if i % HELD_OUT == HELD_OUT - 1 else answer for i, answer in enumerate(answers)
    ]


def said(model: Path, answers: Sequence[TargetAnswer], title: str) -> list[np.ndarray]:
    """What a model itself would say at every token of the answers (int64, one array an answer), with a bar."""
    tokens = [np.zeros(len(answer.answer), np.int64) for answer in answers]
    with progress(title, len(answers), "answers") as advance:
        for at in read_through(model, answers, advance):
            tokens[at.answer][at.token] = np.argmax(at.logits)
    return tokens


def share(rights: Sequence[np.ndarray]) -> float:
    """Share of positions (bool arrays, one an answer) that are right; 0 without positions."""
    return sum(int(right.sum()) for right in rights) / max(1, sum(map(len, rights)))


@dataclass(frozen=True)
class TeacherForced:
    """What a drafter makes of answers.

    `states` are its final hidden states (float32, positions x n_embd), which do not depend on how many rows its head
    has; `drafted` (DRAFTED, by position) is what it drafts from the rows it has, and `rights` (bool arrays, one an
    answer) say which of these tokens are the target's. `trimmed`: the same drafter opened, if it is trimmed.
    """

    states: np.ndarray
    rights: list[np.ndarray]
    drafted: np.ndarray = field(default_factory=lambda: np.empty(0, DRAFTED))
    answers: Sequence[TargetAnswer] = ()
    trimmed: Trimmed | None = None
    wanted: Sequence[Sequence[int] | np.ndarray] = ()  # the target's tokens, one array an answer

    @classmethod
    def of(
        cls,
        drafter: Path,
        answers: Sequence[TargetAnswer],
        trimmed: Trimmed | None = None,
        n_threads: int | None = None,
        title: str = "reading hidden states",
        target: Path | None = None,
        wanted: Sequence[np.ndarray] | None = None,
    ) -> TeacherForced:
        """Read answers with a drafter, with a bar.

        If it is trimmed, `trimmed` is the same drafter opened; if it reads its target's states, `target` is needed.
        `wanted`: the tokens that it should draft (None: those of the answers).
        """
        states, drafted = [], []
        tokens = [answer.answer for answer in answers] if wanted is None else wanted
        rights = [np.zeros(len(answer.answer), bool) for answer in answers]
        ids = None if trimmed is None else trimmed.d2t
        with progress(title, len(answers), "answers") as advance:
            if target is not None and (file := GGUFFile(drafter)).architecture == MTP:
                block, rows = MtpBlock.of(GGUFFile(target)), kept_rows(file, n_threads)
                positions = read_state_fed(block, target, answers, advance, n_threads, rows)
            elif target is not None and file.architecture == DFLASH:
                raise FileFormatError(f"{file.path}: is a DFlash drafter, which is cut but not run here; use `trim`")
            elif target is not None and file.architecture == ASSISTANT:
                positions = read_assistant(drafter, target, answers, advance, n_threads, trimmed)
            elif target is not None and file.architecture == EAGLE3:
                positions = read_state_fed(Eagle3Head.of(file), target, answers, advance, n_threads)
                ids = None  # its logits are by id
            else:
                positions = read_through(drafter, answers, advance, trimmed, n_threads, whole=True)
            for at in positions:
                states.append(at.hidden.copy())
                row = int(np.argmax(at.logits))
                draft = row if ids is None else ids[row]
                drafted.append((at.answer, at.token, draft, at.logits[row]))
                if 0 <= at.token < len(tokens[at.answer]):
                    rights[at.answer][at.token] = draft == tokens[at.answer][at.token]
        return cls(np.array(states), rights, np.array(drafted, DRAFTED), answers, trimmed, tokens)

    def fitted(self, file: GGUFFile, rank: int | None = None, steps: int = 0) -> Speculator:
        """A speculator fitted to the head in `file`, the drafter or its companion, with `steps` of training after it.

        See `closed_form.fit` and `train.distil`. By the answers that are JUDGED, a trimmed drafter's acceptance with
        each vocabulary is measured. If they have no tokens, all answers serve for both.
        """
        lengths = np.array([len(answer.answer) for answer in self.answers])
        number, token = self.drafted["answer"], self.drafted["token"]
        judged = (token >= 0) & (token < lengths[number])
        held = np.array([answer.label == JUDGED for answer in self.answers])[number]
        states = self.states
        if (judged & held).any():
            states, judged = states[~held], judged & held
        speculator = fit(file, states, rank)
        if steps:
            from .train import distil

            speculator = distil(speculator, file, states, steps)
        if self.trimmed is None or not judged.any():
            return speculator
        drafted = self.drafted[judged]
        wanted = np.array([self.wanted[at["answer"]][at["token"]] for at in drafted])
        rates = acceptances(self.trimmed, speculator, self.answers, wanted, drafted, self.states[judged])
        return replace(speculator, acceptance=rates)
