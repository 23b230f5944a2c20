"""A vocabulary chosen at every step: rows of the full head on top of those a trimmed drafter kept.

Two sources choose them: the tokens of the text so far (names, identifiers, another language: what a text has used comes
back), and the low-rank speculator (SpecVocab, arXiv 2602.13836). Their exact logits come from the full head in the
companion. The choice depends only on the text before the token that is drawn, so drafting stays lossless.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gguf_trim.format.companion import Trimmed
from gguf_trim.format.selection import CANDIDATES, CONTEXT_ROWS, Chooser, Recent
from gguf_trim.format.speculator import Speculator
from llamabase.gguf.tensors import HEAD_BIAS, head_tensor
from llamabase.llama.ggml import Backend, Product, Table, aligned

_BUCKET = 64  # rows: products come in multiples of this, with one ggml graph for each
NEAR = 0.05  # tolerance, as a fraction of the range of the logits: requantisation stays below it, other heads do not
_NO_IDS, _NO_LOGITS = np.empty(0, np.int32), np.empty(0, np.float32)


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
        others = self.others = np.flatnonzero(outside).astype(np.int32)  # ids that it may add
        self.recent = Recent(outside, CONTEXT_ROWS)
        # Rows chosen at each step come first, then, from a multiple of _BUCKET on, those of the text by slot.
        self._n_chosen = min(CANDIDATES, len(others)) if speculator is not None else 0
        self._of_text = -(-self._n_chosen // _BUCKET) * _BUCKET
        n_rows = self._of_text + -(-CONTEXT_ROWS // _BUCKET) * _BUCKET
        self._ids = np.zeros(n_rows, np.int32)
        self._rows = aligned(n_rows * head.row_bytes).reshape(n_rows, head.row_bytes)
        self._type, self._n_embd = head.type, head.shape[0]
        self._backend = backend
        self._kept = trimmed.d2t
        self.steps = self.rows = 0  # steps so far and the rows that they computed: the bench reports bytes per step
        self.acceptance: Mapping[str, float] = speculator.acceptance if speculator is not None else {}
        self._products: dict[tuple[int, int], Product] = {}
        self._chooser: Chooser | None = None
        if speculator is not None and len(others):
            whole, target = Table(self._full, head.type, head.shape[0]), self._rows[: self._n_chosen]
            self._chooser = Chooser(backend, speculator, whole, self._row_of, others, target)
            for place in range(self._n_chosen, self._of_text):  # rows between the two
                self._set(place, others[0])

    @property
    def seconds(self) -> float:
        """Wall time spent inside ggml so far."""
        return self._backend.seconds

    @property
    def speculates(self) -> bool:
        """Whether a speculator scores rows."""
        return self._chooser is not None

    def follow(self, text: Sequence[int]) -> None:
        """Take in the text up to the position that is drafted next."""
        for slot, token in self.recent.follow(text):
            self._set(self._of_text + slot, token)

    def _set(self, place: int, token: int) -> None:
        self._ids[place], self._rows[place] = token, self._full[self._row_of[token]]

    def agrees(self, logits: np.ndarray, hidden: np.ndarray) -> bool:
        """Whether `logits` of the kept rows are this head's at `hidden`, apart from requantisation."""
        some, first = np.linspace(0, len(self._kept) - 1, _BUCKET).astype(np.int64), self._of_text
        self._rows[first : first + _BUCKET] = self._full[self._row_of[self._kept[some]]]
        ours = self._product(first, _BUCKET)(hidden)
        if self._bias is not None:
            ours = ours + self._bias[self._kept[some]]
        self.recent.forget()  # its rows were written over
        return bool(np.abs(ours - logits[some]).max() <= NEAR * np.ptp(logits))

    def logits(self, hidden: np.ndarray, scored: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """(ids, logits), int32 and float32, of the rows that are worth computing at a hidden state (float32, n_embd).

        In no order. An id that is chosen and in the text comes twice, with the same logit. Without `scored`, those of
        the text only. Both are views until the next call.
        """
        first, end = self._of_text, self._of_text + len(self.recent.slots)
        if self._chooser is not None and scored:
            first, self._ids[: self._n_chosen] = 0, self._chooser(hidden)
        self.steps += 1
        self.rows += end - first
        if first == end:
            return _NO_IDS, _NO_LOGITS
        values = self._product(first, -(-(end - first) // _BUCKET) * _BUCKET)(hidden)[: end - first]
        ids = self._ids[first:end]
        return ids, values if self._bias is None else values + self._bias[ids]

    def _product(self, first: int, n_rows: int) -> Product:
        if (first, n_rows) not in self._products:
            table = Table(self._rows[first:], self._type, self._n_embd)
            self._products[first, n_rows] = Product(self._backend, table, n_rows=n_rows)
        return self._products[first, n_rows]
