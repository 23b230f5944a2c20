"""How a text is read: by the target, by a drafter on its own, and by a head that is fed the target's states."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gguf_trim.format.assistant import AssistantSteps
from gguf_trim.format.state_fed import StateFedHead
from llamabase.llama.context import Context
from llamabase.llama.ggml import Product
from llamabase.llama.states import PairContext, Recorded

from .contracts import Step

AHEAD = 16  # tokens of a small context that stay free for drafts
FIRST = 4  # tokens at the beginning of a text that are always read
PARTING = 32  # tokens: more than a chat template puts before an answer
COMPARED = 512  # tokens of two texts that are compared at a time
_NO_STATE = np.empty(0, np.float32)

Feed = Callable[[Sequence[int]], Sequence[int] | np.ndarray]  # ids as a context takes them: ids, or embeddings


def shared(held: Sequence[int], text: Sequence[int], at_most: int) -> int:
    """The length in tokens, at most `at_most`, of the longest prefix that two texts share."""
    n = min(len(held), len(text), at_most)
    # Texts mostly differ at the end, and a loop over tokens takes ten times as long as comparing slices.
    for start in range(0, n, COMPARED):
        end = min(start + COMPARED, n)
        if held[start:end] != text[start:end]:
            return next(i for i in range(start, end) if held[i] != text[i])
    return n


class Reader:
    """A context and the text that its cache holds. Reading a text continues from the longest prefix they share."""

    def __init__(self, context: Context, feed: Feed = lambda ids: ids) -> None:
        self.context = context
        self._feed = feed
        self.held: list[int] = []

    def keep(self, text: Sequence[int], at_most: int) -> None:
        """Rewind to the longest prefix that the cache shares with `text`, at most `at_most` tokens."""
        n = shared(self.held, text, at_most)
        # In this order, an interruption in between leaves a record that claims too little, which `settle` mends.
        del self.held[n:]
        if n < self.context.n_past:
            del self.held[self.context.rewind(n) :]

    def read(self, tokens: Sequence[int], outputs: int, hidden: bool = False) -> np.ndarray:
        """Append tokens and return the logits of the last `outputs` of them, a view until the next read."""
        logits = self.context.decode(self._feed(tokens), outputs, hidden)
        self.held.extend(tokens)
        return logits

    def read_prompt(self, text: Sequence[int]) -> None:
        """Read all of a prompt but its last token, from what the cache shares with it.

        The next prompt of a conversation mostly parts from this one near its end, where the answer begins: a recurrent
        cache could not be rewound to there, so its state is copied before that.
        """
        self.keep(text, len(text) - 1)
        rest = text[len(self.held) : -1]
        if self.context.recurrent:
            if before := rest[:-PARTING]:
                self.read(before, 0)
            self.context.copy_state()
            rest = rest[-PARTING:]
        if rest:
            self.read(rest, 0)

    def unread(self, text: Sequence[int]) -> int:
        """The number of tokens of `text` that are read if its last one is to give logits."""
        return len(text) - self.context.reach(shared(self.held, text, len(text) - 1))

    def verify(self, text: Sequence[int], drafts: Sequence[int]) -> np.ndarray:
        """Read on to the end of `text`, of which the cache holds a beginning, and drafts after it.

        Returns the logits (float32, a row for the last token of the text and for each draft), a view.
        """
        if len(drafts) > self.context.rewinds:
            self.context.checkpoint()
        return self.read([*text[len(self.held) :], *drafts], len(drafts) + 1)

    def settle(self) -> None:
        """Keep what the cache and the record of it agree on. An interruption may have come at any point."""
        del self.held[self.context.recount() :]
        del self.held[self.context.rewind(len(self.held)) :]


class OwnReading:
    """The `Reading` of a drafter that reads the text itself. Only the first `rows` rows of its head give logits.

    With `hidden`, steps give hidden states too; the context then needs room for several outputs.
    """

    def __init__(self, context: Context, rows: int, feed: Feed, hidden: bool) -> None:
        self.context, self.reader = context, Reader(context, feed)
        self._rows, self._hidden = rows, hidden
        self._certain = 0  # tokens that the cache held when the last text had been read

    def room(self, text: Sequence[int]) -> int:
        return self.context.n_ctx - len(self._window(text))

    def unread(self, text: Sequence[int]) -> int:
        return self.reader.unread(self._window(text))

    def begin(self, text: Sequence[int]) -> Step:
        # The last token is always read now, since its logits are wanted.
        window = self._window(text)
        self.reader.keep(window, len(window) - 1)
        step = self._step(window[len(self.reader.held) :])
        self._certain = len(window)
        return step

    def follow(self, token: int) -> Step:
        if len(self.reader.held) == self._certain:  # the first token that may have to be taken back
            self.context.checkpoint()
        return self._step([token])

    def forget(self, text: Sequence[int]) -> None:
        """Free what the cache holds beside a beginning of `text`."""
        window = self._window(text)
        self.reader.keep(window, max(len(window) - 1, 0))

    def prepare(self, text: Sequence[int]) -> None:
        window = self._window(text)
        if len(window) <= self.context.n_ctx:
            self.reader.read_prompt(window)

    def settle(self) -> None:
        self.reader.settle()

    @property
    def seconds(self) -> float:
        return self.context.seconds

    def _step(self, pending: Sequence[int]) -> Step:
        if not self._hidden:
            return Step(self._cut(self.reader.read(pending, 1)[0]), _NO_STATE)
        if len(pending) > self.context.n_outputs // self.context.n_parallel:
            self.reader.read(pending[:-1], 0)
            pending = pending[-1:]
        logits = self._cut(self.reader.read(pending, len(pending), hidden=True)[-1])
        return Step(logits, self.context.hidden_states(len(pending))[-1])

    def _cut(self, logits: np.ndarray) -> np.ndarray:
        return logits if len(logits) == self._rows else logits[: self._rows]

    def _window(self, text: Sequence[int]) -> Sequence[int]:
        """The part of a text that is read: all of it, or its last part if the context is smaller.

        The first tokens stay, since attention leans on them (arXiv 2309.17453). The window moves by half a context at a
        time, so that it is read anew now and then and not at every token.
        """
        n, half = self.context.n_ctx, self.context.n_ctx // 2
        if len(text) + AHEAD <= n or n < 4 * AHEAD:
            return text
        start = -(-(len(text) + AHEAD - n) // half) * half
        return [*text[:FIRST], *text[start + FIRST :]]


class AssistantReading:
    """The `Reading` of a Gemma 4 assistant. It attends to its target's cache, so it has nothing to read or to forget.

    It drafts where the target has read all of a text but the last token. All its drafts come at the position of that
    token, as it was trained, and llama.cpp's own loop does the same.
    """

    def __init__(self, steps: AssistantSteps, recorded: Recorded, target: Context) -> None:
        self._steps, self._recorded, self._target = steps, recorded, target
        self.context = steps.context

    def room(self, text: Sequence[int]) -> int:
        n = len(text) - 1
        known = 0 < n == self._target.n_past <= self._recorded.n
        return self._target.n_ctx - n if known else 0

    def unread(self, text: Sequence[int]) -> int:
        return 1

    def begin(self, text: Sequence[int]) -> Step:
        return Step(*self._steps.begin(text[-1], self._recorded.rows[len(text) - 2]))

    def follow(self, token: int) -> Step:
        return Step(*self._steps.follow(token))

    def prepare(self, text: Sequence[int]) -> None:
        pass

    def settle(self) -> None:
        pass

    @property
    def seconds(self) -> float:
        return self._steps.seconds


class StateFedReading:
    """The `Reading` of an EAGLE-3 head (arXiv 2503.01840) or of a target's MTP block: it reads pairs of a token and the
    target's state before it.

    It can draft as far as the target has read the text, which is all but the last token. `rows` computes the logits
    while llama.cpp does not. `ids`: the target ids of the logits, ascending; None if they are 0, 1, 2, ...
    """

    def __init__(
        self, context: PairContext, recorded: Recorded, head: StateFedHead, rows: Product | None = None
    ) -> None:
        self.context = context
        self._recorded, self._head, self._rows = recorded, head, rows
        self.ids = None if head.ids is None else np.sort(head.ids).astype(np.int32)
        self._text: list[int] = []  # the cache holds its pairs, one fewer than its tokens
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
        step = self._step(text[-1:], states[-1:])
        self._text = list(text)
        return step

    def follow(self, token: int) -> Step:
        return self._step([token], self._state[None])

    def prepare(self, text: Sequence[int]) -> None:
        n, end = self._keep(text), min(len(text) - 2, self._recorded.n)
        if n < end:
            states = self.context.encode(self._recorded.rows[n:end])
            self.context.pairs(text[n + 1 : end + 1], states, False)
            self._text = list(text[: end + 1])

    def settle(self) -> None:
        self.context.recount()
        self.context.truncate(max(len(self._text) - 1, 0))

    @property
    def seconds(self) -> float:
        return self.context.seconds + (0.0 if self._rows is None else self._rows.backend.seconds)

    def _pairs(self, text: Sequence[int]) -> int:
        """The number of pairs in the cache that belong to `text`, except its last one, which a step reads anew."""
        return max(shared(self._text, text, len(text) - 1) - 1, 0)

    def _keep(self, text: Sequence[int]) -> int:
        """Forget the pairs that do not belong to `text` and return the number of those that do."""
        n = self._pairs(text)
        del self._text[n + 1 :]  # before the cache forgets, so that an interruption leaves a record of too little
        self.context.truncate(n)
        return n

    def _step(self, tokens: Sequence[int], states: np.ndarray) -> Step:
        logits, made = self.context.pairs(tokens, states, True)
        self._state = made[0]
        hidden = self._head.hidden(self._state)
        if self._rows is not None and not self.context.head:
            return Step(self._rows(hidden), hidden)
        return Step(logits[0] if self.ids is None else logits[0][self.ids], hidden)
