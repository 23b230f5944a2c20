"""Which ids beyond the kept ones are worth computing after a text, by the text itself and by a hidden state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from gguf.constants import GGMLQuantizationType

from llamabase.llama.ggml import Backend, Choice, Product, Table, aligned
from llamabase.sampling.chain import likeliest

from .speculator import UP_TYPE, Speculator

CONTEXT_ROWS = 1024  # rows that the text brings, at most
CANDIDATES = 512  # rows that the speculator brings at each step
# GROUPS: parts of the ids, of each of which the best are candidates, so that several threads look for them. At 84 of
# 672 positions of code and prose the default pair's drafter had its argmax outside the kept rows: 82 were among these
# candidates, and as many among the best of all; with 16 groups 81.
GROUPS = 8
_PACKED = 16  # rows: a multiple of what matrix kernels take at a time


class Recent:
    """The last `size` distinct tokens of a text that are `wanted` (bool by id), oldest first: the text alone decides.

    `slots` gives each of them a number below `size`, which it keeps while it is one of the last. A text that continues
    the one before is read on; after a rewind or in another conversation it is read from its beginning.
    """

    def __init__(self, wanted: np.ndarray, size: int) -> None:
        self._wanted, self._size = wanted.tolist(), size
        self._text: list[int] = []
        self.slots: OrderedDict[int, int] = OrderedDict()

    def forget(self) -> None:
        """Begin anew with the next text."""
        self.slots.clear()
        self._text = []

    def follow(self, text: Sequence[int]) -> list[tuple[int, int]]:
        """Read on to the end of `text`; returns (slot, id) of the tokens that were added."""
        if self._text != text[: len(self._text)]:  # a text that is no list differs, and is read from its beginning
            self.forget()
        known = len(self._text)
        added: dict[int, int] = {}
        for token in text[known:]:
            if token >= len(self._wanted) or not self._wanted[token]:
                continue
            if token in self.slots:
                self.slots.move_to_end(token)
            else:
                slot = len(self.slots) if len(self.slots) < self._size else self.slots.popitem(last=False)[1]
                self.slots[token] = slot
                added[slot] = token
        self._text.extend(text[known:])
        return list(added.items())


def top(scores: np.ndarray, m: int) -> np.ndarray:
    """Places of the m greatest scores, in no order."""
    places = likeliest(scores, m)
    if len(places) < m:  # a score that is not a number counts as the least
        return np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")[:m]
    return np.asarray(places[scores[places].argpartition(-m)[-m:]])


def chosen(scores: np.ndarray, m: int) -> np.ndarray:
    """Places of the m scores that a `Chooser` would choose."""
    groups = _groups(len(scores), m)
    return np.concatenate([g + groups * top(scores[g::groups], m // groups) for g in range(groups)])


def _groups(n: int, m: int) -> int:
    return GROUPS if m < n and not m % GROUPS else 1


class Chooser:
    """Chooses, at a hidden state, as many of these `ids` (int32) as `target` has rows, and copies theirs of the head.

    They are the best of each of GROUPS groups, to which the ids go by turns. `row_of`: rows of the head by id, int32.
    """

    def __init__(
        self,
        backend: Backend,
        speculator: Speculator,
        head: Table,
        row_of: np.ndarray,
        ids: np.ndarray,
        target: np.ndarray,
    ) -> None:
        groups = _groups(len(ids), len(target))
        places = np.arange(_padded(len(ids))).reshape(-1, groups).T
        names = ids.take(places, mode="clip")  # beyond the ids the last one again, with a score of 0
        rows, count = row_of[names], len(target) // groups
        tables = _tables(speculator, np.where(places < len(ids), rows, -1))
        self._choice = Choice(backend, *tables, source=head, row_of=rows, names=names, count=count, target=target)

    def __call__(self, hidden: np.ndarray) -> np.ndarray:
        """The ids whose rows were chosen (int32), seldom one of them twice; a view until the next call."""
        return self._choice(hidden)


def scorer(backend: Backend, speculator: Speculator) -> Callable[[np.ndarray], np.ndarray]:
    """A function that scores all rows at a hidden state by U (D h), as a ggml graph."""
    count = len(speculator.up)
    rows = np.arange(_padded(count))
    product = Product(backend, *_tables(speculator, np.where(rows < count, rows, -1)))
    return lambda hidden: product(hidden)[:count]


def _padded(n: int) -> int:
    return -(-n // _PACKED) * _PACKED


def _tables(speculator: Speculator, rows: np.ndarray) -> tuple[Table, Table]:
    """D, and these rows of U; -1 for a row of zeros."""
    rank, n_embd = speculator.down.shape
    down = aligned(speculator.down.nbytes).reshape(rank, -1)
    down[:] = np.ascontiguousarray(speculator.down, "<f4").view(np.uint8)
    up = aligned(rows.size * speculator.up.shape[1]).reshape(rows.size, -1)
    np.take(speculator.up, rows.reshape(-1), axis=0, out=up, mode="clip")
    up[rows.reshape(-1) < 0] = 0
    return Table(down, GGMLQuantizationType.F32, n_embd), Table(up, UP_TYPE, rank, packs=True)
