"""Choosing k by measurement: acceptance for every k from one teacher-forced pass, costs from this machine.

The drafter reads the target's own greedy answers; at each position the interval of k that would have drafted the
target's token is noted (`matches`). With measured step costs (`costs`) that gives tokens per second for every
(k, draft length). VocabTrim's memory-bound speed-up (arXiv 2506.22694, section 5) stands beside it, by parameters and
by bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corpus.answers import TargetAnswer
from corpus.counts import Counts
from gguf_trim.fit.calibrate import read_state_fed, read_through, share
from gguf_trim.format.memory_bound import StepWeights, draft_weights, mbsu
from gguf_trim.format.speculator import Speculator
from gguf_trim.format.state_fed import EAGLE3, Eagle3Head, row_by_id
from gguf_trim.keep import keep_order
from llamabase.cli.progress import progress
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import EMBEDDING, HEAD
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.quantize import AS_SHIPPED, requantized
from llamabase.llama.rounds import speed
from llamabase.llama.timing import StepCost
from llamabase.sampling.chain import Chain
from llamabase.sampling.settings import Sampling

from .added import AddedRows
from .costs import DraftCost, adding_step, draft_cost
from .matches import DRAFT_LENGTHS, Matches, beaters, grid, interval, tau_of


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


@dataclass(frozen=True)
class Plan:
    """What one drafter file (as shipped, or requantised to `type`) promises with this target; rows kept in `order`."""

    type: str
    order: np.ndarray
    matches: Matches
    added: AddedRows
    choices: list[Choice]

    @property
    def best(self) -> Choice:
        """The fastest here, or by bytes if nothing was measured; at a tie the smaller k and the shorter draft."""
        return max(self.choices, key=lambda c: (c.tokens_per_second or c.mbsu_bytes, -c.k, -c.draft_max))

    def rights(self, choice: Choice) -> list[np.ndarray]:
        """Which positions of each answer a choice drafts right."""
        added = self.added.by_core.get((choice.vocab, choice.k))
        return self.matches.right(choice.k) if added is None else added.rights


def matches_of(
    drafter: Path,
    answers: Sequence[TargetAnswer],
    order: np.ndarray,
    added: AddedRows | None = None,
    n_threads: int | None = None,
    title: str = "judging the drafter",
    target: Path | None = None,
) -> Matches:
    """Intervals of every position of every answer, for the drafter cut in this order; fills `added`, too.

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
                added.observe(at.answer, [*answer.prompt, *answer.answer[:i]], at.hidden, token, better)
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
    verify: StepCost | None,
    draft: DraftCost | None,
) -> list[Choice]:
    """Every (vocab, k, draft length) with its tau and MBSU, and with predicted tokens per second if costs are given."""
    lines: list[Choice] = []
    whole, weights = StepWeights.of(target), draft_weights(drafter.path, target.path)

    def add(vocab: str, k: int, rights: Sequence[np.ndarray], rows: float) -> None:
        params, n_bytes = added.step(vocab, k)
        c_params = (weights.params_at(rows) + params) / whole.params_at(whole.n_rows)
        c_bytes = (weights.bytes_at(rows) + n_bytes) / whole.bytes_at(whole.n_rows)
        for n in DRAFT_LENGTHS:
            tau = tau_of(rights, n)
            fast = None if verify is None or draft is None else speed(tau, n, draft.of(vocab, k), verify)
            lines.append(Choice(vocab, k, n, share(rights), tau, mbsu(tau, c_params, n), mbsu(tau, c_bytes, n), fast))

    for k in grid(matches.n_vocab):
        add("full" if k == matches.n_vocab else "trim", k, matches.right(k), k)
    for (vocab, k), core in added.by_core.items():
        add(vocab, k, core.rights, k + core.rows)
    return lines


def make_plan(
    target: Path,
    drafter: Path,
    counts: Counts,
    answers: Sequence[TargetAnswer],
    folder: Path,
    verify: StepCost | None,
    type_: str = AS_SHIPPED,
    speculator: Speculator | None = None,
    n_threads: int | None = None,
) -> Plan:
    """One pass over the answers and, if the target's costs are given as `verify`, the costs of draft steps.

    With a speculator the vocabularies chosen at every step are judged as well. `type_` other than as shipped judges the
    drafter requantised (into `folder`). Raises FileFormatError or VocabularyMismatch.
    """
    file, judged = GGUFFile(drafter), requantized(drafter, type_, folder)
    if file.architecture == EAGLE3:
        head = Eagle3Head.of(file)
        vocabulary, n_ids, ids = Vocabulary(GGUFFile(target)), head.n_vocab, head.ids
    else:
        vocabulary, n_ids, ids = Vocabulary(file), file.tensors[EMBEDDING].n_rows, None
    order = keep_order(vocabulary, row_by_id(ids, n_ids) >= 0, counts)
    added = AddedRows(rank_of(order, n_ids), speculator, n_threads, ids)
    matches = matches_of(judged, answers, order, added, n_threads, f"judging the drafter {type_}", target)
    draft = None
    if verify is not None:
        whole = GGUFFile(target) if file.architecture == EAGLE3 and HEAD not in file.tensors else file
        scores = {"context": None, "spec": speculator}
        adding = {
            vocab: adding_step(whole, scores[vocab], max(1, round(added.rows(vocab))), n_threads)
            for vocab in dict.fromkeys(vocab for vocab, _ in added.by_core)
        }
        draft = draft_cost(judged, target, order, adding, n_threads)
    return Plan(
        type_, order, matches, added, choices(matches, added, GGUFFile(target), GGUFFile(judged), verify, draft)
    )
