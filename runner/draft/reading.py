"""How a text is read: by the target, by a drafter on its own, and by a head that hangs on the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gguf_trim.format.state_fed import StateFedHead
from llamabase.llama.context import Context
from llamabase.llama.ggml import Product
from llamabase.llama.states import PairContext, Recorded

AHEAD, FIRST = 16, 4  # tokens of a small context kept free for drafts, and those of a text that are always read
PIECE = 512  # tokens of two texts that are compared at a time
_NO_STATE = np.empty(0, np.float32)


def shared(held: Sequence[int], text: Sequence[int], at_most: int) -> int:
    """Tokens, at most `at_most`, of the longest beginning that two texts share."""
    n = min(len(held), len(text), at_most)
    # By pieces, since what differs mostly lies at the end: a loop over tokens takes ten times as long.
    for start in range(0, n, PIECE):
        end = min(start + PIECE, n)
        if held[start:end] != text[start:end]:
            return next(i for i in range(start, end) if held[i] != text[i])
    return n


class Reader:
    """A context together with the text its cache holds; reads on from the longest common beginning.

    `feed` turns ids into what the context is given: the ids themselves, or embeddings for a trimmed drafter.
    """

    def __init__(self, context: Context, feed: Callable[[Sequence[int]], Sequence[int] | np.ndarray] = lambda x: x):
        self.context = context
        self._feed = feed
        self.held: list[int] = []

    def keep(self, text: Sequence[int], at_most: int) -> None:
        """Rewind to the longest beginning that the cache shares with `text`, at most `at_most` tokens."""
        n = shared(self.held, text, at_most)
        # In this order, an interruption in between leaves a record that claims too little, which `settle` mends.
        del self.held[n:]
        if n < self.context.n_past:
            del self.held[self.context.rewind(n) :]

    def read(self, tokens: Sequence[int], outputs: int, hidden: bool = False) -> np.ndarray:
        """Append tokens and return the logits of the last `outputs` of them (a view until the next read)."""
        logits = self.context.decode(self._feed(tokens), outputs, hidden)
        self.held.extend(tokens)
        return logits

    def settle(self) -> None:
        """After an interruption: keep what the cache and the record of it agree on."""
        del self.held[self.context.count() :]
        del self.held[self.context.rewind(len(self.held)) :]


Step = tuple[np.ndarray, np.ndarray]  # logits (float32, a view) by row of the head, and the final hidden state


class OwnReading:
    """What a drafter makes of a text that it reads itself, one step after another; its first `rows` rows give logits.

    `feed`: see Reader; `hidden`: whether the state is wanted, for which the context has some outputs to spare.
    """

    def __init__(
        self,
        context: Context,
        rows: int,
        feed: Callable[[Sequence[int]], Sequence[int] | np.ndarray],
        hidden: bool,
    ) -> None:
        self.context, self.reader = context, Reader(context, feed)
        self._rows, self._hidden = rows, hidden

    def room(self, text: Sequence[int]) -> int:
        """How many steps can be taken after `text`."""
        return self.context.n_ctx - len(self._seen(text))

    def unread(self, text: Sequence[int]) -> int:
        """How many tokens of `text` the first step has to read."""
        seen = self._seen(text)
        return len(seen) - shared(self.reader.held, seen, len(seen) - 1)

    def begin(self, text: Sequence[int]) -> Step:
        """Read on to the end of `text`."""
        # The token whose logits are wanted must be read now, so the last one is never taken from the cache.
        seen = self._seen(text)
        self.reader.keep(seen, len(seen) - 1)
        return self._step(seen[len(self.reader.held) :])

    def follow(self, token: int) -> Step:
        """Go on by a token that the step before made likely."""
        return self._step([token])

    def prepare(self, text: Sequence[int]) -> None:
        """Read `text` but for what a step reads anyway; forget what does not belong to it."""
        seen = self._seen(text)
        self.reader.keep(seen, len(seen) - 1)
        if (rest := seen[len(self.reader.held) : -1]) and len(seen) <= self.context.n_ctx:
            self.reader.read(rest, 0)

    def settle(self) -> None:
        """Make the cache agree with what is known of it, after an interruption at any point."""
        self.reader.settle()

    @property
    def seconds(self) -> float:
        """Wall time spent inside llama.cpp and ggml so far."""
        return self.context.seconds

    def _step(self, pending: Sequence[int]) -> Step:
        if not self._hidden:
            return self.reader.read(pending, 1)[0, : self._rows], _NO_STATE
        if len(pending) > self.context.n_outputs:
            self.reader.read(pending[:-1], 0)
            pending = pending[-1:]
        logits = self.reader.read(pending, len(pending), hidden=True)[-1, : self._rows]
        return logits, self.context.hidden_states(len(pending))[-1]

    def _seen(self, text: Sequence[int]) -> Sequence[int]:
        """What is read of a text: all of it, or the last part where the context is smaller.

        The first few tokens stay, since attention leans on them (arXiv 2309.17453). The part moves on by halves of the
        context, so that it is read anew now and then and not at every token.
        """
        n, half = self.context.n_ctx, self.context.n_ctx // 2
        if len(text) + AHEAD <= n or n < 4 * AHEAD:
            return text
        start = -(-(len(text) + AHEAD - n) // half) * half
        return [*text[:FIRST], *text[start + FIRST :]]


class StateFedReading:
    """The same of an EAGLE-3 head (arXiv 2503.01840) or a target's MTP block: they read pairs of a token and what the
    target made of the one before. Its methods are those of OwnReading.

    A text can be drafted for as far as the target has read it: all but its last token. `rows` make the logits where
    llama.cpp computes none. `ids`: ascending, of the logits that there are; None for all.
    """

    def __init__(
        self, context: PairContext, recorded: Recorded, head: StateFedHead, rows: Product | None = None
    ) -> None:
        self.context: PairContext = context
        self._recorded, self._head, self._rows = recorded, head, rows
        self.ids = None if head.ids is None else np.sort(head.ids).astype(np.int32)
        self._text: list[int] = []  # whose pairs, one fewer than tokens, the cache holds
        self._state = _NO_STATE

    def room(self, text: Sequence[int]) -> int:
        known = 2 <= len(text) <= self._recorded.n + 1
        return self.context.n_ctx - len(text) + 2 if known else 0

    def unread(self, text: Sequence[int]) -> int:
        return len(text) - 1 - self._pairs(text)

    def begin(self, text: Sequence[int]) -> Step:
        n = self._keep(text)
        states = self.context.encode(self._recorded.rows[n : len(text) - 1])
        if len(states) > 1:
            self.context.pairs(text[n + 1 : -1], states[:-1], False)
        logits, made = self.context.pairs(text[-1:], states[-1:], True)
        self._text, self._state = list(text), made[0]
        return self._found(logits)

    def follow(self, token: int) -> Step:
        logits, made = self.context.pairs([token], self._state[None], True)
        self._state = made[0]
        return self._found(logits)

    def prepare(self, text: Sequence[int]) -> None:
        n, end = self._keep(text), min(len(text) - 2, self._recorded.n)
        if n < end:
            states = self.context.encode(self._recorded.rows[n:end])
            self.context.pairs(text[n + 1 : end + 1], states, False)
            self._text = list(text[: end + 1])

    def settle(self) -> None:
        self.context.count()
        self.context.truncate(max(len(self._text) - 1, 0))

    @property
    def seconds(self) -> float:
        return self.context.seconds + (0.0 if self._rows is None else self._rows.backend.seconds)

    def _pairs(self, text: Sequence[int]) -> int:
        """Pairs of the cache that belong to `text`, its last one left out, which a step needs anew."""
        return max(shared(self._text, text, len(text) - 1) - 1, 0)

    def _keep(self, text: Sequence[int]) -> int:
        """Forget what does not belong to `text`; how many pairs are left."""
        n = self._pairs(text)
        del self._text[n + 1 :]  # before the cache forgets, so that an interruption leaves a record of too little
        self.context.truncate(n)
        return n

    def _found(self, rows: np.ndarray) -> Step:
        hidden = self._head.hidden(self._state)
        if self._rows is not None:
            return self._rows(hidden), hidden
        logits = rows[0]
        return logits if self.ids is None else logits[self.ids], hidden
