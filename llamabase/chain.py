"""llama.cpp's sampler chain over one text: the settings, and what they remember of the tokens before."""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

from .errors import EngineError
from .grammar import Grammar
from .llama import Model
from .sampling import Distribution, Sampling

STEPS = (64, 1024)  # so many of the likeliest tokens are shown to the grammar before all of them are


class Chain:
    """From rows of logits to distributions, one token of a text after another.

    `text` is what was said so far: it counts for the penalties and is not part of what the grammar describes, as in
    llama-server. The grammar is left out without a `model`, which it needs; a drafter's q may be any distribution.

    Raises EngineError for a grammar that does not parse and for a bias of a token that the model does not have.
    """

    def __init__(self, sampling: Sampling, text: Sequence[int], model: Model | None = None) -> None:
        self._sampling = sampling
        unknown = [token for token in sampling.logit_bias if model is not None and not 0 <= token < model.n_vocab]
        if model is not None and unknown:
            raise EngineError(
                f"{model.path}: has no token {unknown[0]}, which the logit bias names; it has {model.n_vocab}"
            )
        self._bias = (
            np.array(list(sampling.logit_bias), np.int64),
            np.array(list(sampling.logit_bias.values()), np.float32),
        )
        self._grammar = Grammar(model, sampling.grammar) if model is not None and sampling.grammar else None
        n = sampling.repeat_last_n
        self._recent: deque[int] = deque(maxlen=min(n, sys.maxsize) if n >= 0 else None)
        self._counts: Counter[int] = Counter()
        if sampling.penalises:
            self._recent.extend(text if n < 0 else text[-n:])
            self._counts.update(self._recent)

    def distribution(self, logits: np.ndarray, ids: np.ndarray | None = None) -> Distribution:
        """The law of the next token, from its row of logits (float32, n; see `Sampling.distribution`)."""
        return self._sampling.distribution(*self.logits(logits, ids))

    def logits(self, logits: np.ndarray, ids: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """The row with bias and penalties, and the ids it is of: those that may come and that the filters can see.

        Raises EngineError where no token is left.
        """
        if len(self._bias[0]) or self._counts:
            logits = logits.copy()
            self._add_bias(logits, ids)
            self._penalise(logits, ids)
            if np.isneginf(self._bias[1]).any():
                left = np.flatnonzero(logits > -np.inf)
                logits, ids = logits[left], left if ids is None else ids[left]
        if self._grammar is not None and len(logits):
            logits, ids = _allowed(self._grammar, logits, ids, self._sampling.sight)
        if not len(logits):
            raise EngineError("no token is left that may come next: the grammar or the logit bias forbids all of them")
        return logits, ids

    def accept(self, token: int) -> None:
        """Go on by a token that was emitted: one that `distribution` gave a probability."""
        if self._sampling.penalises:
            if len(self._recent) == self._recent.maxlen:
                oldest = self._recent[0]
                self._counts[oldest] -= 1
                if not self._counts[oldest]:
                    del self._counts[oldest]
            self._recent.append(token)
            self._counts[token] += 1
        if self._grammar is not None:
            self._grammar.accept(token)

    def _add_bias(self, logits: np.ndarray, ids: np.ndarray | None) -> None:
        places, known = _places(self._bias[0], ids, len(logits))
        logits[places] += self._bias[1][known]

    def _penalise(self, logits: np.ndarray, ids: np.ndarray | None) -> None:
        """As llama_sampler_init_penalties does it, in float32 as there."""
        tokens = np.fromiter(self._counts, np.int64, len(self._counts))
        places, known = _places(tokens, ids, len(logits))
        counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))[known]
        values, repeat = logits[places], np.float32(self._sampling.repeat_penalty)
        values = np.where(values <= 0, values * repeat, values / repeat)
        frequency, presence = np.float32(self._sampling.frequency_penalty), np.float32(self._sampling.presence_penalty)
        logits[places] = values - (counts * frequency + presence)


def _places(tokens: np.ndarray, ids: np.ndarray | None, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Where in a row of n logits the tokens are, and which of them are there at all (bool)."""
    places = tokens if ids is None else np.searchsorted(ids, tokens)
    known = places < n
    if ids is not None:
        known[known] = ids[places[known]] == tokens[known]
    return places[known], known


def _allowed(
    grammar: Grammar, logits: np.ndarray, ids: np.ndarray | None, sight: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """What the grammar allows of a row: at least the `sight` likeliest (all where that is None), with their ids.

    Asking it about 152 thousand tokens takes longer than a step of a small model, so the likeliest are asked about
    first: where enough of them are allowed, the rest cannot change the distribution.
    """
    chosen = np.arange(len(logits))
    if sight is not None:
        for n in STEPS:
            if not sight <= n < len(logits):
                continue
            # Every token as likely as the n-th, so that ties are decided as they are without a grammar.
            likeliest = np.flatnonzero(logits >= np.partition(logits, -n)[-n])
            likeliest = likeliest[grammar.allows(likeliest if ids is None else ids[likeliest])]
            if len(likeliest) >= sight:
                return logits[likeliest], likeliest if ids is None else ids[likeliest]
    chosen = chosen[grammar.allows(chosen if ids is None else ids)]
    return logits[chosen], chosen if ids is None else ids[chosen]
