"""How a trimmed drafter would draft with rows added at every step, position by position in the planner's pass."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gguf_trim.format.selection import CANDIDATES, CONTEXT_ROWS, Recent, chosen, scorer
from gguf_trim.format.speculator import Speculator
from llamabase.llama.ggml import Backend

CORES = (512, 1024, 2048, 4096, 8192, 16384)  # rows kept, to which others are added


@dataclass
class Added:
    """How a core of kept rows drafts with added ones.

    `answers` says for each answer (by number) which positions are drafted right; `rows` is the mean number added.
    """

    answers: dict[int, list[bool]] = field(default_factory=dict)
    n_added: int = 0

    @property
    def rights(self) -> list[np.ndarray]:
        return [np.array(right, bool) for right in self.answers.values()]

    @property
    def rows(self) -> float:
        return self.n_added / max(1, sum(map(len, self.answers.values())))


class AddedRows:
    """Follows the pass and fills `by_core`, for every core size: with rows of the text added ("context"), and with the
    speculator's candidates besides ("spec").

    `rank` is an id's place in the keep order; `ids` are those of the head's rows, None if row i is id i.
    """

    def __init__(
        self,
        rank: np.ndarray,
        speculator: Speculator | None,
        n_threads: int | None = None,
        ids: np.ndarray | None = None,
    ) -> None:
        self._rank, self.speculator = rank, speculator
        self._ids = np.arange(len(rank)) if ids is None else ids
        self._score = None if speculator is None else scorer(Backend(n_threads), speculator)
        # The rows beyond each core, and the tokens of the text that are among them.
        self._others = {k: np.flatnonzero(rank[self._ids] >= k) for k in CORES if k < len(rank)}
        wanted = {k: np.isin(np.arange(len(rank)), self._ids[rows]) for k, rows in self._others.items()}
        self._recents = {k: Recent(mask, CONTEXT_ROWS) for k, mask in wanted.items()}
        vocabs = ("context",) if speculator is None else ("context", "spec")
        self.by_core = {(vocab, k): Added() for k in self._others for vocab in vocabs}

    def rows(self, vocab: str) -> float:
        """The mean number of rows added in a step, over the cores."""
        return statistics.mean(added.rows for (name, _), added in self.by_core.items() if name == vocab)

    def step(self, vocab: str, k: int) -> tuple[float, float]:
        """(parameters, bytes) that a step reads to choose rows beyond a core of k, apart from the rows themselves."""
        return self.speculator.step(k) if vocab == "spec" and self.speculator is not None else (0.0, 0.0)

    def observe(self, n: int, text: Sequence[int], hidden: np.ndarray, target: int, better: np.ndarray) -> None:
        """In answer n, after `text`, the target says `target`; `better` are the ids the whole head puts before it."""
        scores = None if self._score is None else self._score(hidden)
        for (k, others), recent in zip(self._others.items(), self._recents.values(), strict=True):
            recent.follow(text)
            held = self._rank < k
            held[list(recent.slots)] = True
            self._note("context", k, n, held, target, better)
            if scores is not None:
                held[self._ids[others[chosen(scores[others], min(CANDIDATES, len(others)))]]] = True
                self._note("spec", k, n, held, target, better)

    def _note(self, vocab: str, k: int, n: int, held: np.ndarray, target: int, better: np.ndarray) -> None:
        right = target < len(held) and bool(held[target]) and not held[better].any()
        added = self.by_core[vocab, k]
        added.answers.setdefault(n, []).append(right)
        added.n_added += int(np.count_nonzero(held)) - k
