"""Choosing k by measurement: acceptance for every k from one teacher-forced pass, costs from this machine.

The drafter reads the target's own greedy answers; at each position the interval of k for which it would have drafted
the target's token is noted (`matches`). With measured step costs (`costs`) that gives tokens per second for every
(k, draft length), and an honest verdict. VocabTrim's memory-bound speed-up (arXiv 2506.22694, section 5) stands beside
it by parameters and by bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corpus.answers import TargetAnswer
from corpus.counts import Counts
from gguf_trim.fit.calibrate import read_state_fed, read_through, share
from gguf_trim.format.speculator import Speculator
from gguf_trim.format.state_fed import EAGLE3, Eagle3Head, row_by_id
from gguf_trim.format.weights import Weights, mbsu
from gguf_trim.keep import keep_order
from llamabase.cli.progress import progress
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import EMBEDDING, head_tensor
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.quantize import AS_SHIPPED, requantized
from llamabase.sampling.chain import Chain
from llamabase.sampling.settings import Sampling

from .added import AddedRows
from .costs import DraftCost, draft_cost, head_cost
from .matches import Matches, beaters, grid, interval, tau_of

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


def matches_of(
    drafter: Path,
    answers: Sequence[TargetAnswer],
    order: np.ndarray,
    added: AddedRows | None = None,
    n_threads: int | None = None,
    title: str = "judging the drafter",
    target: Path | None = None,
) -> Matches:
    """Intervals of every position of every answer, for the drafter cut in this order; `added` is filled on the way.

    An EAGLE-3 head is judged by its first drafts, from the states of its `target`.
    """
    intervals = [np.zeros((len(answer.answer), 2), np.int64) for answer in answers]
    with progress(title, len(answers), "answers") as advance:
        if target is not None and (file := GGUFFile(drafter)).architecture == EAGLE3:
            head = Eagle3Head.of(file)
            positions, n_ids = read_state_fed(head, target, answers, advance, n_threads), head.n_vocab
        else:
            positions, n_ids = read_through(drafter, answers, advance, n_threads=n_threads), len(order)
        rank = rank_of(order, n_ids)
        for at in positions:
            answer, i = answers[at.answer], at.token
            if not 0 <= i < len(answer.answer):
                continue
            token = answer.answer[i]
            better = beaters(at.logits, token)
            intervals[at.answer][i] = interval(token, better, rank)
            if added is not None:
                added.see(answer.id, [*answer.prompt, *answer.answer[:i]], at.hidden, token, better)
    return Matches(intervals, [answer.label for answer in answers], len(order))


def rank_of(order: np.ndarray, n_ids: int) -> np.ndarray:
    """By id, the place at which it is kept; n_ids for what the head has no row of."""
    rank = np.full(n_ids, n_ids)
    rank[order] = np.arange(len(order))
    return rank


def sampled_acceptance(
    target: Path,
    drafter: Path,
    answers: Sequence[TargetAnswer],
    order: np.ndarray,
    sizes: Sequence[int],
    sampling: Sampling,
    n_threads: int | None = None,
) -> dict[int, float]:
    """Expected acceptance at a temperature, by k: the mean of p's agreement with q_k over the positions.

    p and q are what the samplers make of both models' logits, q_k over the first k rows of the order; see
    `Distribution.agreement`.
    """
    chain = Chain(sampling, ())
    sums = dict.fromkeys(sizes, 0.0)
    kept = {k: np.sort(order[:k]) for k in sizes}
    with progress(f"sampling at {sampling.temp}", 2 * len(answers), "answers") as advance:
        wanted = {
            (at.answer, at.token): chain.distribution(at.logits)
            for at in read_through(target, answers, advance, n_threads=n_threads)
        }
        for at in read_through(drafter, answers, advance, n_threads=n_threads):
            for k, ids in kept.items():
                sums[k] += wanted[at.answer, at.token].agreement(chain.distribution(at.logits[ids], ids))
    return {k: total / len(wanted) for k, total in sums.items()}


def choices(
    matches: Matches,
    added: AddedRows,
    target: GGUFFile,
    drafter: GGUFFile,
    draft: DraftCost | None,
    verify: dict[int, float] | None,
) -> list[Choice]:
    """Every (vocab, k, draft length) with its tau, MBSU and, where costs were measured, predicted tokens per second."""
    found = []
    whole, n_rows, weights = Weights.of(target), head_tensor(target).n_rows, Weights.of(drafter)

    def add(vocab: str, k: int, rights: Sequence[np.ndarray], rows: float, params: float, n_bytes: float) -> None:
        c_params = (weights.params_at(rows) + params) / whole.params_at(n_rows)
        c_bytes = (weights.bytes_at(rows) + n_bytes) / whole.bytes_at(n_rows)
        step = None if draft is None else draft.at(k) + draft.added.get(vocab, 0.0)
        for n in DRAFT_LENGTHS:
            tau = tau_of(rights, n)
            speed = tau / (n * step + verify[n + 1]) if step and verify else None
            memory_bound = mbsu(tau, c_params, n), mbsu(tau, c_bytes, n)
            found.append(Choice(vocab, k, n, share(rights), tau, *memory_bound, speed))

    for k in grid(matches.n_vocab):
        add("full" if k == matches.n_vocab else "trim", k, matches.right(k), k, 0, 0)
    for (vocab, k), rows in added.found.items():
        add(vocab, k, rows.rights, k + rows.rows, *added.step(vocab, k))
    return found


@dataclass(frozen=True)
class Plan:
    """What one drafter file (as shipped, or requantised to `type`) promises with this target; rows kept in `order`."""

    type: str
    order: np.ndarray
    matches: Matches
    added: AddedRows
    choices: list[Choice]
    plain: float | None  # tokens per second of the target alone

    @property
    def best(self) -> Choice:
        """The fastest here; by bytes where nothing was measured; the smaller k and the shorter draft at a tie."""
        return max(self.choices, key=lambda c: (c.tokens_per_second or c.mbsu_bytes, -c.k, -c.draft_max))

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
    folder: Path,
    verify: dict[int, float] | None,
    type_: str = AS_SHIPPED,
    speculator: Speculator | None = None,
    n_threads: int | None = None,
) -> Plan:
    """One pass over the answers and, beside `verify`, a target's measured costs by batch size, those of draft steps.

    With a speculator the vocabularies chosen at every step are judged as well. `type_` other than as shipped judges the
    drafter requantised (into `folder`). Raises FileFormatError or VocabularyMismatch.
    """
    file, title = GGUFFile(drafter), f"judging the drafter {type_}"
    judged = requantized(drafter, type_, folder)
    if file.architecture == EAGLE3:
        head = Eagle3Head.of(file)
        has_row = row_by_id(head.ids, head.n_vocab) >= 0
        order = keep_order(Vocabulary(GGUFFile(target)), has_row, counts)
        added = AddedRows(rank_of(order, head.n_vocab), speculator, n_threads, head.ids)
        draft = head_cost(judged, target, n_threads, speculator) if verify else None
    else:
        order = keep_order(Vocabulary(file), np.ones(file.tensors[EMBEDDING].n_rows, bool), counts)
        added = AddedRows(np.argsort(order), speculator, n_threads)
        draft = draft_cost(judged, n_threads, speculator) if verify else None
    matches = matches_of(judged, answers, order, added, n_threads, title, target)
    found = choices(matches, added, GGUFFile(target), GGUFFile(judged), draft, verify)
    return Plan(type_, order, matches, added, found, 1 / verify[1] if verify else None)
