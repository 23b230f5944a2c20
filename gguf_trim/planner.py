"""Choosing k by measurement: acceptance for every k from one teacher-forced pass, costs from this machine.

The drafter reads the target's own greedy answers; at each position the interval of k for which it would have drafted
the target's token is noted (`matches`). With measured step costs (`costs`) that gives tokens per second for every
(k, draft length), and an honest verdict. VocabTrim's memory-bound speed-up (arXiv 2506.22694, section 5) stands beside
it by parameters and by bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from corpus.counts import Counts
from corpus.errors import FileFormatError
from corpus.gguf_file import GGUFFile
from corpus.llama import Context, Model
from corpus.sampling import Distribution, Sampling
from corpus.vocabulary import Vocabulary

from .costs import DraftCost, Weights, draft_cost, requantized
from .keep import keep_order
from .layout import EMBEDDING
from .matches import Matches, grid, interval, rank_of

ROWS = 64  # positions whose logits are held at a time
DRAFT_LENGTHS = tuple(range(1, 9))
AS_SHIPPED = "as shipped"


@dataclass(frozen=True)
class TargetAnswer:
    """What the target said: token ids of prompt and answer, and a label to group by."""

    id: str
    label: str
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Choice:
    """One line of a plan; acceptance_rate is the share of positions drafted right, tau that of the whole loop."""

    vocab: str
    k: int
    draft_max: int
    acceptance_rate: float
    tau: float
    mbsu_params: float
    mbsu_bytes: float
    tokens_per_second: float | None

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def mbsu(tau: float, c: float, draft_max: int) -> float:
    """Memory-bound speed-up: tau / (c * gamma + 1), c the cost of a draft step in target steps."""
    return tau / (c * draft_max + 1)


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


def teacher_force(
    drafter: Path,
    answers: Sequence[TargetAnswer],
    see: Callable[[TargetAnswer, int, np.ndarray], None],
    n_threads: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> None:
    """Read each answer with the drafter; see(answer, i, logits) gets its logits (a view) before answer token i."""
    longest = max(len(found.prompt) + len(found.answer) for found in answers)
    with Model(drafter) as model, Context(model, -(-longest // 32) * 32, n_threads, n_outputs=ROWS) as context:
        last = model.n_vocab - 1
        for found in answers:
            context.truncate(0)
            text = np.minimum([*found.prompt, *found.answer], last)
            begin = len(found.prompt) - 1
            if begin:
                context.decode(text[:begin], 0)
            for start in range(0, len(found.answer), ROWS):
                n = min(ROWS, len(found.answer) - start)
                logits = context.decode(text[begin + start : begin + start + n], n)
                for row in range(n):
                    see(found, start + row, logits[row])
            advance(1)


def matches_of(
    drafter: Path,
    answers: Sequence[TargetAnswer],
    order: np.ndarray,
    n_threads: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> Matches:
    """Intervals of every position of every answer, for the drafter cut in this order."""
    rank = rank_of(order)
    found: dict[str, list[tuple[int, int]]] = {answer.id: [] for answer in answers}

    def see(answer: TargetAnswer, i: int, logits: np.ndarray) -> None:
        found[answer.id].append(interval(logits, answer.answer[i], rank))

    teacher_force(drafter, answers, see, n_threads, advance)
    intervals = [np.array(found[answer.id], np.int64).reshape(-1, 2) for answer in answers]
    return Matches(intervals, [answer.label for answer in answers], len(order))


def sampled_acceptance(
    target: Path,
    drafter: Path,
    answers: Sequence[TargetAnswer],
    order: np.ndarray,
    sizes: Sequence[int],
    sampling: Sampling,
    n_threads: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> dict[int, float]:
    """Expected acceptance at a temperature, by k: the mean of sum(min(p, q_k)) over the positions.

    p and q are what the samplers make of both models' logits, q_k over the first k rows of the order (arXiv
    2211.17192, corollary 3.6).
    """
    wanted: dict[tuple[str, int], Distribution] = {}

    def see_target(answer: TargetAnswer, i: int, logits: np.ndarray) -> None:
        wanted[answer.id, i] = sampling.distribution(logits)

    teacher_force(target, answers, see_target, n_threads, advance)
    sums = dict.fromkeys(sizes, 0.0)
    kept = {k: np.sort(order[:k]) for k in sizes}

    def see_drafter(answer: TargetAnswer, i: int, logits: np.ndarray) -> None:
        p = wanted[answer.id, i]
        for k, ids in kept.items():
            q = sampling.distribution(logits[ids], ids)
            sums[k] += p.overlap(q)

    teacher_force(drafter, answers, see_drafter, n_threads, advance)
    return {k: total / len(wanted) for k, total in sums.items()}


def choices(
    matches: Matches,
    target: Weights,
    target_rows: int,
    drafter: Weights,
    draft: DraftCost | None,
    verify: dict[int, float] | None,
    sizes: Sequence[int] | None = None,
    draft_lengths: Sequence[int] = DRAFT_LENGTHS,
) -> list[Choice]:
    """Every (k, draft length) with its tau, MBSU and, where costs were measured, predicted tokens per second."""
    found = []
    for k in sizes or grid(matches.n_vocab, 0):
        acceptance = matches.acceptance(k)
        c_params = drafter.params_at(k) / target.params_at(target_rows)
        c_bytes = drafter.bytes_at(k) / target.bytes_at(target_rows)
        for n in draft_lengths:
            if verify is not None and n + 1 not in verify:
                continue
            tau = matches.tau(k, n)
            speed = tau / (n * draft.at(k) + verify[n + 1]) if draft and verify else None
            vocab = "full" if k == matches.n_vocab else "trim"
            found.append(Choice(vocab, k, n, acceptance, tau, mbsu(tau, c_params, n), mbsu(tau, c_bytes, n), speed))
    return found


def best(found: Sequence[Choice]) -> Choice:
    """The fastest on this machine; by bytes where nothing was measured; the smaller k and shorter draft at a tie."""
    return max(found, key=lambda c: (c.tokens_per_second or c.mbsu_bytes, -c.k, -c.draft_max))


@dataclass(frozen=True)
class Plan:
    """What one drafter file (as shipped, or requantised to `type`) promises with this target."""

    type: str
    matches: Matches
    choices: list[Choice]
    draft: DraftCost | None
    plain: float | None  # tokens per second of the target alone

    @property
    def best(self) -> Choice:
        return best(self.choices)

    @property
    def speedup(self) -> float | None:
        """Predicted tokens per second of the best choice over plain decoding's."""
        fastest = self.best.tokens_per_second
        return None if fastest is None or self.plain is None else fastest / self.plain


def make_plan(
    target: Path,
    drafter: Path,
    counts: Counts,
    answers: Sequence[TargetAnswer],
    *,
    type_: str = AS_SHIPPED,
    verify: dict[int, float] | None = None,
    measure: bool = True,
    n_threads: int | None = None,
    folder: Path | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> Plan:
    """One pass over the answers and, where `measure`, this machine's step costs; see the module's text.

    `type_` other than as shipped judges the drafter requantised (into `folder`). `verify` are the target's measured
    costs by batch size. Raises FileFormatError or VocabularyMismatch.
    """
    file = GGUFFile(drafter)
    order = keep_order(Vocabulary(file), file.tensors[EMBEDDING].n_rows, counts)
    judged = drafter if type_ == AS_SHIPPED or folder is None else requantized(drafter, type_, folder)
    matches = matches_of(judged, answers, order, n_threads, advance)
    target_file = GGUFFile(target)
    n_rows = len(order)
    sizes = grid(n_rows, 0)
    heads = sorted({min(2048, n_rows), min(16384, n_rows), n_rows})
    draft = draft_cost(judged, heads, n_threads=n_threads) if measure else None
    found = choices(
        matches,
        Weights.of(target_file),
        target_file.tensors[EMBEDDING].n_rows,
        Weights.of(GGUFFile(judged)),
        draft,
        verify,
        sizes,
    )
    return Plan(type_, matches, found, draft, 1 / verify[1] if verify else None)
