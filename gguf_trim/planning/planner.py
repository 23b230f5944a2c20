"""Choosing k by measurement: acceptance for every k from one teacher-forced pass, costs from this machine.

The drafter reads the target's own greedy answers; at each position the interval of k for which it would have drafted
the target's token is noted (`matches`). With measured step costs (`costs`) that gives tokens per second for every
(k, draft length), and an honest verdict. VocabTrim's memory-bound speed-up (arXiv 2506.22694, section 5) stands beside
it by parameters and by bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from corpus.answers import TargetAnswer
from corpus.counts import Counts
from llamabase.gguf_file import GGUFFile
from llamabase.samplers import Chain
from llamabase.sampling import Sampling
from llamabase.vocabulary import Vocabulary

from ..dynamic.reading import read_through, share
from ..dynamic.speculator import Speculator
from ..keep import keep_order
from ..layout import EMBEDDING
from .added import AddedRows
from .costs import AS_SHIPPED, DraftCost, Weights, draft_cost, requantized
from .matches import Matches, beaters, grid, interval, rank_of, tau_of

DRAFT_LENGTHS = tuple(range(1, 9))


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


def teacher_force(
    model: Path,
    answers: Sequence[TargetAnswer],
    n_threads: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> Iterator[tuple[TargetAnswer, int, np.ndarray, np.ndarray]]:
    """Read each answer: (answer, i, logits, hidden), what the model says (views) before answer token i."""
    texts = [([*found.prompt, *found.answer[:-1]], len(found.prompt) - 1) for found in answers]
    for text, i, logits, hidden in read_through(model, texts, None, n_threads, advance):
        yield answers[text], i - texts[text][1], logits, hidden


def matches_of(
    drafter: Path,
    answers: Sequence[TargetAnswer],
    order: np.ndarray,
    n_threads: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
    added: AddedRows | None = None,
) -> Matches:
    """Intervals of every position of every answer, for the drafter cut in this order; `added` is filled on the way."""
    rank = rank_of(order)
    found: dict[str, list[tuple[int, int]]] = {answer.id: [] for answer in answers}
    for answer, i, logits, hidden in teacher_force(drafter, answers, n_threads, advance):
        target = answer.answer[i]
        found[answer.id].append(interval(logits, target, rank))
        if added is not None:
            better = np.flatnonzero(beaters(logits, target)) if target < len(rank) else np.empty(0, np.int64)
            added.see(answer.id, [*answer.prompt, *answer.answer[:i]], hidden, target, better)
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
    """Expected acceptance at a temperature, by k: the mean of p's agreement with q_k over the positions.

    p and q are what the samplers make of both models' logits, q_k over the first k rows of the order; see
    `Distribution.agreement`.
    """
    chain = Chain(sampling, ())
    wanted = {
        (answer.id, i): chain.distribution(logits)
        for answer, i, logits, _ in teacher_force(target, answers, n_threads, advance)
    }
    sums = dict.fromkeys(sizes, 0.0)
    kept = {k: np.sort(order[:k]) for k in sizes}
    for answer, i, logits, _ in teacher_force(drafter, answers, n_threads, advance):
        for k, ids in kept.items():
            sums[k] += wanted[answer.id, i].agreement(chain.distribution(logits[ids], ids))
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
    added: AddedRows | None = None,
) -> list[Choice]:
    """Every (vocab, k, draft length) with its tau, MBSU and, where costs were measured, predicted tokens per second."""
    found = []

    def add(vocab: str, k: int, rights: Sequence[np.ndarray], params: float, n_bytes: float) -> None:
        c_params, c_bytes = params / target.params_at(target_rows), n_bytes / target.bytes_at(target_rows)
        step = None if draft is None else draft.at(k) + draft.added.get(vocab, 0.0)
        for n in draft_lengths:
            if verify is not None and n + 1 not in verify:
                continue
            tau = tau_of(rights, n)
            speed = tau / (n * step + verify[n + 1]) if step and verify else None
            memory_bound = mbsu(tau, c_params, n), mbsu(tau, c_bytes, n)
            found.append(Choice(vocab, k, n, share(rights), tau, *memory_bound, speed))

    for k in sizes or grid(matches.n_vocab, 0):
        vocab = "full" if k == matches.n_vocab else "trim"
        add(vocab, k, matches.right(k), drafter.params_at(k), drafter.bytes_at(k))
    if added is not None:
        for (vocab, k), rows in added.found.items():
            params, n_bytes = added.step(vocab, k)
            params += drafter.params_at(k + rows.rows)
            add(vocab, k, rows.rights, params, n_bytes + drafter.bytes_at(k + rows.rows))
    return found


def best(found: Sequence[Choice]) -> Choice:
    """The fastest on this machine; by bytes where nothing was measured; the smaller k and shorter draft at a tie."""
    return max(found, key=lambda c: (c.tokens_per_second or c.mbsu_bytes, -c.k, -c.draft_max))


@dataclass(frozen=True)
class Plan:
    """What one drafter file (as shipped, or requantised to `type`) promises with this target."""

    type: str
    matches: Matches
    added: AddedRows
    choices: list[Choice]
    draft: DraftCost | None
    plain: float | None  # tokens per second of the target alone

    @property
    def best(self) -> Choice:
        return best(self.choices)

    def rights(self, choice: Choice) -> list[np.ndarray]:
        """Which positions of each answer a choice drafts right."""
        found = self.added.found.get((choice.vocab, choice.k))
        return self.matches.right(choice.k) if found is None else found.rights

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
    speculator: Speculator | None = None,
) -> Plan:
    """One pass over the answers and, where `measure`, this machine's step costs; see the module's text.

    With a speculator the vocabularies chosen at every step are judged as well. `type_` other than as shipped judges the
    drafter requantised (into `folder`). `verify` are the target's measured costs by batch size. Raises FileFormatError
    or VocabularyMismatch.
    """
    file = GGUFFile(drafter)
    order = keep_order(Vocabulary(file), file.tensors[EMBEDDING].n_rows, counts)
    judged = drafter if folder is None else requantized(drafter, type_, folder)
    added = AddedRows(rank_of(order), speculator, n_threads)
    matches = matches_of(judged, answers, order, n_threads, advance, added)
    target_file = GGUFFile(target)
    n_rows = len(order)
    sizes = grid(n_rows, 0)
    heads = sorted({min(2048, n_rows), min(16384, n_rows), n_rows})
    draft = draft_cost(judged, heads, n_threads=n_threads, speculator=speculator) if measure else None
    found = choices(
        matches,
        Weights.of(target_file),
        target_file.tensors[EMBEDDING].n_rows,
        Weights.of(GGUFFile(judged)),
        draft,
        verify,
        sizes,
        added=added,
    )
    return Plan(type_, matches, added, found, draft, 1 / verify[1] if verify else None)
