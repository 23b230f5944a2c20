"""A vocabulary chosen at every step: rows of the full head on top of those a trimmed drafter kept.

Two sources choose them: the tokens of the text so far (names, identifiers, another language: what a text has used comes
back), and the low-rank speculator (SpecVocab, arXiv 2602.13836). Their exact logits come from the full head in the
companion. The choice depends only on the text before the token that is drawn, so drafting stays lossless.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gguf_trim.format.companion import Trimmed
from gguf_trim.format.selection import CANDIDATES, CONTEXT_ROWS, Recent, scorer, top
from gguf_trim.format.speculator import Speculator
from llamabase.gguf.tensors import HEAD_BIAS, head_tensor
from llamabase.llama.ggml import Backend, Product, Table, aligned

_BUCKET = 64  # rows: products come in multiples of this, with one ggml graph for each
NEAR = 0.05  # tolerance, as a fraction of the range of the logits: requantisation stays below it, other heads do not


class DynamicHead:
    """The rows beyond a trimmed drafter's own, chosen at every step: those of the text and, with a speculator, those
    that it scores highest. `n_ids`: ids from this on are unknown to the target and are never chosen.
    """

    def __init__(
        self,
        trimmed: Trimmed,
        backend: Backend,
        speculator: Speculator | None = None,
        n_ids: int | None = None,
    ) -> None:
        file = trimmed.companion
        head = head_tensor(file)
        # A plain array, since indexing a memmap takes longer than reading the row.
        self._full = np.asarray(np.memmap(file.path, np.uint8, "r", head.offset, (head.n_rows, head.row_bytes)))
        bias = file.tensors.get(HEAD_BIAS)
        self._bias = None if bias is None else np.memmap(file.path, np.float32, "r", bias.offset, bias.shape)
        self._row_of = trimmed.row_of
        outside = self._row_of >= 0
        outside[trimmed.d2t] = False
        if n_ids is not None:
            outside[n_ids:] = False
        self.others = np.flatnonzero(outside).astype(np.int32)  # ids that it may add
        self._n_candidates = min(CANDIDATES, len(self.others)) if speculator is not None else 0
        self.recent = Recent(outside, CONTEXT_ROWS)
        self._in_context = np.zeros(len(outside), bool)
        self._ids = np.zeros(CONTEXT_ROWS + self._n_candidates, np.int32)
        rows = max(1, -(-len(self._ids) // _BUCKET)) * _BUCKET
        self._rows = aligned(rows * head.row_bytes).reshape(rows, head.row_bytes)
        self._table = Table(self._rows, head.type, head.shape[0])
        self._backend = backend
        self._kept = trimmed.d2t
        self.steps = self.rows = 0  # steps so far and the rows that they computed: the bench reports bytes per step
        self.acceptance: Mapping[str, float] = speculator.acceptance if speculator is not None else {}
        self._products: dict[int, Product] = {}
        self._scores: Callable[[np.ndarray], np.ndarray] | None = None
        if speculator is not None and len(self.others):
            self._scores = scorer(backend, speculator, self._row_of[self.others])

    @property
    def seconds(self) -> float:
        """Wall time spent inside ggml so far."""
        return self._backend.seconds

    @property
    def speculates(self) -> bool:
        """Whether a speculator scores rows."""
        return self._scores is not None

    def follow(self, text: Sequence[int]) -> None:
        """Take in the text up to the position that is drafted next."""
        for slot, token in self.recent.follow(text):
            self._ids[slot] = token
            self._rows[slot] = self._full[self._row_of[token]]
        self._in_context[:] = False
        self._in_context[self._ids[: len(self.recent.slots)]] = True

    def agrees(self, logits: np.ndarray, hidden: np.ndarray) -> bool:
        """Whether `logits` of the kept rows are this head's at `hidden`, apart from requantisation."""
        some = np.linspace(0, len(self._kept) - 1, _BUCKET).astype(np.int64)
        self._rows[:_BUCKET] = self._full[self._row_of[self._kept[some]]]
        ours = self._product(_BUCKET)(hidden)
        if self._bias is not None:
            ours = ours + self._bias[self._kept[some]]
        self.recent.forget()  # its rows were written over
        return bool(np.abs(ours - logits[some]).max() <= NEAR * np.ptp(logits))

    def candidates(self, hidden: np.ndarray, scored: bool = True) -> np.ndarray:
        """Ids (int32) beyond the kept rows whose logits are worth computing at a hidden state (float32, n_embd).

        Without `scored`, those of the text only.
        """
        n = len(self.recent.slots)
        if self._scores is not None and scored:
            best = self.others[top(self._scores(hidden), self._n_candidates)]
            best = best[~self._in_context[best]]
            self._ids[n : n + len(best)] = best
            n += len(best)
        return self._ids[:n]

    def logits(self, hidden: np.ndarray, scored: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """(ids, logits) of the `candidates`, int32 and float32, in no order; views until the next call."""
        ids = self.candidates(hidden, scored)
        known, n = len(self.recent.slots), len(ids)
        self.steps += 1
        self.rows += n
        if not n:
            return ids, np.empty(0, np.float32)
        rows = self._row_of[ids[known:]]
        self._full[rows, 0]  # touches all rows first, since page faults one after another take longer
        np.take(self._full, rows, axis=0, out=self._rows[known:n], mode="clip")  # mode "raise" would copy twice
        values = self._product(-(-n // _BUCKET) * _BUCKET)(hidden)[:n]
        return ids, values if self._bias is None else values + self._bias[ids]

    def _product(self, n_rows: int) -> Product:
        if n_rows not in self._products:
            self._products[n_rows] = Product(self._backend, self._table, n_rows=n_rows)
        return self._products[n_rows]
