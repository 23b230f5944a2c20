"""ModelDrafter: drafts with a model, a step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np

from llamabase.llama.context import Context
from llamabase.llama.model import Model
from llamabase.llama.states import PairContext
from llamabase.sampling.chain import Chain
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import Sampling

from .contracts import AUTO, FULL, Drafter, Proposal, Reading
from .reading import OwnReading
from .rows import DynamicHead

_NOTHING_ADDED = np.empty(0, np.int32), np.empty(0, np.float32)


def _certainty(best: np.float32, logits: np.ndarray, more: np.ndarray, added: np.ndarray) -> float:
    """The probability at temperature 1 of a token of logit `best` among those of all these logits."""
    return 1 / sum(float(np.exp(part - best).sum()) for part in (logits, _once(more, added)[1]))


def _once(more: np.ndarray, added: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids, ascending, and their logits, without those that come again."""
    order = more.argsort(kind="stable")
    ids = more[order]
    first = np.ones(len(ids), bool)
    np.not_equal(ids[1:], ids[:-1], out=first[1:])
    return ids[first], added[order[first]]


class ModelDrafter(Drafter):
    """Drafts with a drafter GGUF, or with a block of the target's.

    `ids`: the target ids of the head's rows, ascending; None if they are 0, 1, 2, ... `dynamic`: rows of the full head
    that a trimmed one may add. `owned`: a model to close with it. `whole`: a context that computes the whole head, too,
    while its `head` is set.

    `vocab` is the vocabulary that is asked for, and `auto` what it drafts from if that is AUTO: the most that its files
    allow, until what steps cost here has decided between the `candidates` (`measured.step_costs`).
    """

    def __init__(
        self,
        reading: Reading,
        ids: np.ndarray | None = None,
        dynamic: DynamicHead | None = None,
        owned: Model | None = None,
        whole: PairContext | None = None,
    ) -> None:
        self.reading, self._ids, self.dynamic, self._owned = reading, ids, dynamic, owned
        self._kept, self._whole = ids, whole
        names = [FULL] if ids is None else ["trim"]
        if dynamic is not None:
            names += ["context", *(["spec"] if dynamic.speculates else [])]
        self.auto, self.vocab = names[-1], AUTO
        self._names = self.candidates = [*names, *([] if whole is None else [FULL])]

    @property
    def using(self) -> str:
        """The vocabulary that it drafts from now."""
        return self.auto if self.vocab == AUTO else self.vocab

    def draft(self, text: Sequence[int], n: int, sampling: Sampling, noise: Noise) -> list[int]:
        return [token for token, _ in islice(self._drafted(text, sampling, noise), n)] if n > 0 else []

    def propose(self, text: Sequence[int], sampling: Sampling, noise: Noise) -> Iterator[Proposal]:
        """Drafted tokens until the context is full. Each is computed when it is asked for."""
        return (Proposal(token, certainty()) for token, certainty in self._drafted(text, sampling, noise))

    def _drafted(
        self, text: Sequence[int], sampling: Sampling, noise: Noise
    ) -> Iterator[tuple[int, Callable[[], float]]]:
        """What `propose` does. Certainties, which take as long as all the rest, are computed before the next token, if
        they are asked for.
        """
        using = self.using
        dynamic = None if using in ("trim", FULL) else self.dynamic
        if self._whole is not None:
            self._whole.head = using == FULL
            self._ids = None if using == FULL else self._kept
        if dynamic is not None:
            dynamic.follow(text)
        # A drafter need not obey the grammar, only the target must. None if no sampler would change anything.
        chain = None if sampling.plain else Chain(sampling, text, noise=noise)
        token = -1
        for i in range(self.reading.room(text)):
            logits, hidden = self.reading.follow(token) if i else self.reading.begin(text)
            added = _NOTHING_ADDED if dynamic is None else dynamic.logits(hidden, using == "spec")
            if chain is None:
                token, best = self._likeliest(logits, *added)
                yield token, partial(_certainty, best, logits, *added)
            else:
                row, ids = self._merged(logits, *added)
                q = chain.distribution(row, ids)
                token = q.draw(noise, len(text) + i)
                chain.accept(token)
                yield (
                    token,
                    partial(_certainty, row.max(), row, *_NOTHING_ADDED) if sampling.greedy else partial(q.of, token),
                )

    @property
    def batched(self) -> bool:
        """Whether the drafts of several conversations are computed in one batch: they share the drafter's cache."""
        context = self.reading.context
        return isinstance(context, Context) and context.n_parallel > 1

    @property
    def vocabs(self) -> list[str]:
        """The values that `vocab` may have."""
        return [AUTO, *(self._names if len(self._names) > 1 else [])]

    def set_cancel_check(self, go_on: Callable[[], bool]) -> None:
        """Call `go_on` before every batch. EngineError is raised if it returns False."""
        self.reading.context.go_on = go_on

    @property
    def acceptance(self) -> float:
        """The acceptance rate that the fit of its speculator measured with the vocabulary in use; 0: unknown."""
        return self.dynamic.acceptance.get(self.using, 0.0) if self.dynamic is not None else 0.0

    @property
    def n_ctx(self) -> int:
        return self.reading.context.n_ctx

    def unread(self, text: Sequence[int]) -> int:
        """The number of tokens of `text` that the next draft has to read first."""
        return self.reading.unread(text)

    def _likeliest(self, logits: np.ndarray, more: np.ndarray, added: np.ndarray) -> tuple[int, np.float32]:
        """The token of the greatest logit, the lowest id at a tie, and the logit: `_merged` would need a sort."""
        place = int(logits.argmax())
        token, best = place if self._ids is None else int(self._ids[place]), logits[place]
        if len(more) and (most := added.max()) >= best:
            other = int(more[added == most].min())
            token, best = other if most > best else min(token, other), most
        return token, best

    def _merged(self, logits: np.ndarray, more: np.ndarray, added: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """The logits of kept and added rows as one row, and their ids, ascending (None if they are 0, 1, 2, ...)."""
        if self._ids is None or not len(more):
            return logits, self._ids
        more, added = _once(more, added)
        ids = np.concatenate([self._ids, more])
        order = np.argsort(ids, kind="stable")  # ten times as fast as the default, since most are in order
        return np.concatenate([logits, added])[order], ids[order]

    def prepare(self, text: Sequence[int], left: int) -> None:
        self.reading.prepare(text)

    def forget(self, text: Sequence[int]) -> None:
        """Free what the cache, if others share it, holds beside a beginning of `text`."""
        if self.batched and isinstance(self.reading, OwnReading):  # no other reading has a cache that others share
            self.settle()
            self.reading.forget(text)

    def settle(self) -> None:
        self.reading.settle()
        if self.dynamic is not None:  # an interruption may have come between a token's slot and its row
            self.dynamic.recent.forget()

    @property
    def seconds(self) -> float:
        return self.reading.seconds + (self.dynamic.seconds if self.dynamic is not None else 0.0)

    def close(self) -> None:
        self.reading.context.close()
        if self._owned is not None:
            self._owned.close()
