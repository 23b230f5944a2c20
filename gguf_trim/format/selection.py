"""Which ids beyond the kept ones are worth computing after a text, by the text itself and by a hidden state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from gguf.constants import GGMLQuantizationType

from llamabase.llama.ggml import Backend, Product, Table, aligned
from llamabase.sampling.chain import likeliest

from .speculator import UP_TYPE, Speculator

CONTEXT_ROWS = 1024  # rows that the text brings, at most
CANDIDATES = 512  # rows that the speculator brings at each step
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


def scorer(
    backend: Backend, speculator: Speculator, ids: np.ndarray | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """A function that scores ids (None: all) at a hidden state by U (D h), as a ggml graph."""
    rank, n_embd = speculator.down.shape
    down = aligned(speculator.down.nbytes).reshape(rank, -1)
    down[:] = np.ascontiguousarray(speculator.down, "<f4").view(np.uint8)
    count = len(speculator.up) if ids is None else len(ids)
    padded = -(-count // _PACKED) * _PACKED
    up = aligned(padded * speculator.up.shape[1]).reshape(padded, -1)
    up[:count] = speculator.up if ids is None else speculator.up[ids]
    product = Product(backend, Table(down, GGMLQuantizationType.F32, n_embd), Table(up, UP_TYPE, rank, packs=True))
    return lambda hidden: product(hidden)[:count]
