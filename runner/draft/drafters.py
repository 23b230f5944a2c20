"""Who proposes tokens: nobody, a stock GGUF drafter, or a trimmed one. All behind one small base class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from llamabase.llama.model import Model
from llamabase.sampling.chain import Chain
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import Sampling

from .reading import OwnReading, StateFedReading
from .rows import DynamicHead

AUTO = "auto"
VOCABS = (AUTO, "trim", "context", "spec")
_NO_IDS, _NO_LOGITS = np.empty(0, np.int32), np.empty(0, np.float32)


@dataclass(frozen=True)
class Proposal:
    """One drafted token (target id), and how sure the drafter is of it (its own probability, 0 to 1)."""

    token: int
    certainty: float


def _weight(logits: np.ndarray, best: float) -> float:
    """What these tokens weigh at temperature 1 where one of logit `best` weighs 1."""
    return float(np.exp(logits - best).sum())


class Drafter:
    """Proposes tokens; keeps its own cache in step with the text it is given."""

    def draft(self, text: Sequence[int], n: int, sampling: Sampling, noise: Noise) -> list[int]:
        """Up to n tokens to follow `text` (the whole of it, target ids); what is drawn is drawn with the noise."""
        return []

    def prepare(self, text: Sequence[int], left: int) -> None:
        """Read a prompt ahead of the first draft; at most `left` tokens will follow."""

    def learn(
        self, drafted: int, verified: int, accepted: int, tokens: int, seconds: float, verify_seconds: float
    ) -> None:
        """Hear what became of a round: how many drafts it made, verified and accepted, the tokens it emitted, its
        seconds in all and those of the target.
        """

    def settle(self) -> None:
        """Make the cache agree with what is known of it, after an interruption at any point."""

    @property
    def seconds(self) -> float:
        """Wall time spent inside llama.cpp so far."""
        return 0.0


class NoDrafter(Drafter):
    """Plain decoding: the same loop, with nothing to verify."""


class ModelDrafter(Drafter):
    """A drafter GGUF, or a block of the target's (`model` None); its model is closed with it where it is `owned`.

    `ids` (ascending) are the target ids of its head's rows, None where they agree.

    `dynamic` adds rows of the full head to a trimmed one's, chosen at every step.
    """

    def __init__(
        self,
        model: Model | None,
        reading: OwnReading | StateFedReading,
        ids: np.ndarray | None = None,
        dynamic: DynamicHead | None = None,
        owned: bool = True,
    ) -> None:
        self.model, self.reading, self._ids, self.dynamic, self._owned = model, reading, ids, dynamic, owned
        self._all = dynamic  # whether or not it is used

    def draft(self, text: Sequence[int], n: int, sampling: Sampling, noise: Noise) -> list[int]:
        return [found.token for found in islice(self.propose(text, sampling, noise), n)] if n > 0 else []

    def propose(self, text: Sequence[int], sampling: Sampling, noise: Noise) -> Iterator[Proposal]:
        """Drafted tokens one after another, each computed when it is asked for, until the context is full."""
        if self.dynamic is not None:
            self.dynamic.follow(text)
        # Without the grammar, which only the target's p must obey; None where it would change nothing.
        chain = None if sampling.plain else Chain(sampling, text, noise=noise)
        token = -1
        for i in range(self.reading.room(text)):
            logits, hidden = self.reading.follow(token) if i else self.reading.begin(text)
            more, added = (_NO_IDS, _NO_LOGITS) if self.dynamic is None else self.dynamic.logits(hidden)
            if chain is None:
                found = self._likeliest(logits, more, added)
            else:
                row, ids = self._merged(logits, more, added)
                q = chain.distribution(row, ids)
                token = q.draw(noise, len(text) + i)
                chain.accept(token)
                found = Proposal(token, 1 / _weight(row, row.max()) if sampling.greedy else q.of(token))
            yield found
            token = found.token

    @property
    def vocabs(self) -> list[str]:
        """What it may be told to draft from."""
        if self._all is None:
            return [AUTO]
        return [AUTO, "trim", "context", *(["spec"] if self._all.speculates else [])]

    def use(self, vocab: str) -> None:
        """Draft from one of `vocabs` from now on."""
        self.dynamic = None if vocab == "trim" else self._all
        if self._all is not None:
            self._all.speculating = vocab != "context"

    def set_cancel_check(self, go_on: Callable[[], bool]) -> None:
        """Ask this before every batch; where it says no, EngineError is raised."""
        self.reading.context.go_on = go_on

    @property
    def acceptance(self) -> float:
        """What the fit of its speculator has measured, 0 where there is none."""
        return self.dynamic.acceptance if self.dynamic is not None else 0.0

    @property
    def n_ctx(self) -> int:
        return self.reading.context.n_ctx

    def unread(self, text: Sequence[int]) -> int:
        """How many tokens of `text` the next draft has to read first."""
        return self.reading.unread(text)

    def _likeliest(self, logits: np.ndarray, more: np.ndarray, added: np.ndarray) -> Proposal:
        """The token of the greatest logit of a step, of equals that of the lowest id: as `_merged` has it, sooner."""
        place = int(logits.argmax())
        token, best = place if self._ids is None else int(self._ids[place]), logits[place]
        if len(more) and (most := added.max()) >= best:
            other = int(more[added == most].min())
            token, best = other if most > best else min(token, other), most
        return Proposal(token, 1 / (_weight(logits, best) + _weight(added, best)))

    def _merged(self, logits: np.ndarray, more: np.ndarray, added: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """A step's logits as one row, and the ids they are of (ascending; None: their places)."""
        if self._ids is None or not len(more):
            return logits, self._ids
        ids = np.concatenate([self._ids, more])
        order = np.argsort(ids, kind="stable")  # a tenth of another's time, since most are in order
        return np.concatenate([logits, added])[order], ids[order]

    def prepare(self, text: Sequence[int], left: int) -> None:
        self.reading.prepare(text)

    def settle(self) -> None:
        self.reading.settle()
        if self.dynamic is not None:  # an interruption may have come between a token's slot and its row
            self.dynamic.recent.forget()

    @property
    def seconds(self) -> float:
        return self.reading.seconds + (self.dynamic.seconds if self.dynamic else 0.0)

    def close(self) -> None:
        self.reading.context.close()
        if self.model is not None and self._owned:
            self.model.close()
