"""What rows added at every step would make of a trimmed drafter: judged position by position in the planner's pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gguf_trim.format.selection import CANDIDATES, CONTEXT_ROWS, Recent, scorer, top
from gguf_trim.format.speculator import Speculator
from llamabase.llama.ggml import Backend

CORES = (512, 1024, 2048, 4096, 8192, 16384)  # rows kept, to which others are added
TIMED_CORE = 8192  # adding rows costs the same on any core, but for as many fewer to score


@dataclass
class Added:
    """A core of k rows with those of the text ("context"), and the speculator's candidates too ("spec").

    `right` says for each answer (by id) which positions are drafted right; `rows` is the mean number of rows added.
    """

    right: dict[str, list[bool]] = field(default_factory=dict)
    n_added: int = 0

    @property
    def rights(self) -> list[np.ndarray]:
        return [np.array(found, bool) for found in self.right.values()]

    @property
    def rows(self) -> float:
        return self.n_added / max(1, sum(map(len, self.right.values())))


class AddedRows:
    """Follows the pass and fills an Added for every core size and source. `ids`: of the head's rows, None for all."""

    def __init__(
        self,
        rank: np.ndarray,
        speculator: Speculator | None,
        n_threads: int | None = None,
        ids: np.ndarray | None = None,
    ) -> None:
        self._rank, self._speculator, self._score, self._ids = rank, speculator, None, ids
        if speculator is not None:
            self._score = scorer(Backend(n_threads), speculator)
        self._recents = {k: Recent(rank >= k, CONTEXT_ROWS) for k in CORES if k < len(rank)}
        self._others = {k: np.flatnonzero(rank >= k) for k in self._recents}
        vocabs = ("context",) if speculator is None else ("context", "spec")
        self.found = {(vocab, k): Added() for k in self._recents for vocab in vocabs}

    def step(self, vocab: str, k: int) -> tuple[float, float]:
        """(parameters, bytes) that a step reads to choose rows beyond a core of k, the rows themselves aside."""
        return self._speculator.step(k) if vocab == "spec" and self._speculator is not None else (0.0, 0.0)

    def see(self, answer: str, text: Sequence[int], hidden: np.ndarray, target: int, better: np.ndarray) -> None:
        """After `text` the target says `target`; `better` are the ids that the whole head puts before it."""
        scores = self._score(hidden) if self._score is not None else None
        if scores is not None and self._ids is not None:
            by_row, scores = scores, np.full(len(self._rank), -np.inf, np.float32)
            scores[self._ids] = by_row
        for k, recent in self._recents.items():
            recent.follow(text)
            held = self._rank < k
            held[list(recent.slots)] = True
            self._note("context", k, answer, held, target, better)
            if scores is not None:
                others = self._others[k]
                held[others[top(scores[others], min(CANDIDATES, len(others)))]] = True
                self._note("spec", k, answer, held, target, better)

    def _note(self, vocab: str, k: int, answer: str, held: np.ndarray, target: int, better: np.ndarray) -> None:
        right = target < len(held) and bool(held[target]) and not held[better].any()
        found = self.found[vocab, k]
        found.right.setdefault(answer, []).append(right)
        found.n_added += int(np.count_nonzero(held)) - k
