"""From logits to the distribution that llama.cpp's samplers make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np

from .errors import SettingError
from .noise import Noise

LARGEST = 1e30  # of a setting: float32 holds what penalties and bias make of logits, however often they are added up


@dataclass(frozen=True)
class Distribution:
    """Probabilities (float64, sum 1) of some token ids (ascending); every other id has probability 0."""

    ids: np.ndarray
    probs: np.ndarray

    def of(self, token: int) -> float:
        """The probability of one token."""
        i = int(np.searchsorted(self.ids, token))
        return float(self.probs[i]) if i < len(self.ids) and self.ids[i] == token else 0.0

    def agreement(self, other: Distribution) -> float:
        """The chance that both draw the same token with the same noise.

        That is the sum over x of 1 / sum over y of max(p(y) / p(x), q(y) / q(x)) (arXiv 2408.07978), never above the
        sum of min(p, q). Sorted by p / q, the first of the two is the greater for x and all after it.
        """
        _, a, b = np.intersect1d(self.ids, other.ids, assume_unique=True, return_indices=True)
        p, q = self.probs[a], other.probs[b]
        seen = np.minimum(p, q) > 1e-300  # the rest adds nothing and would overflow
        p, q = p[seen], q[seen]
        order = np.argsort(p / q)
        p, q = p[order], q[order]
        after, before = 1 - (np.cumsum(p) - p), 1 - np.cumsum(q[::-1])[::-1]
        return float((1 / (after / p + before / q)).sum())

    def draw(self, noise: Noise, position: int) -> int:
        """The token at a position of a text: the argmax of log p + Gumbel noise, which follows p.

        Written as p over exponential noise, where no logarithm meets a p of 0. A single token needs no noise.
        """
        if len(self.ids) == 1:
            return int(self.ids[0])
        return int(self.ids[np.argmax(self.probs / noise.exponentials(position, self.ids))])


@dataclass(frozen=True)
class Sampling:
    """llama.cpp's sampler settings with its defaults and its order: grammar, logit bias, penalties, top-k, typical,
    top-p, min-p, temperature.

    temp 0 is greedy; top_k <= 0, typical_p >= 1, top_p >= 1 and min_p <= 0 switch a filter off. The penalties look at
    the last repeat_last_n tokens (0: none, -1: all); repeat_penalty 1 and the others 0 switch them off. logit_bias is
    added to the logits of its token ids, -inf bans one. grammar is a GBNF, empty for none. What depends on the text
    (grammar, penalties) is applied by `llamabase.chain.Chain`, with the bias; `distribution` is what follows.

    Raises SettingError, which is a ValueError, for what is no number or too large to reckon with.
    """

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: str = ""

    def __post_init__(self) -> None:
        settings = {item.name: getattr(self, item.name) for item in fields(self)}
        biases = {f"logit_bias of {token}": bias for token, bias in self.logit_bias.items() if bias != -np.inf}
        for name, value in (settings | biases).items():
            if isinstance(value, int | float) and not abs(value) <= LARGEST:
                raise SettingError(f"{name}={value} is not a number to sample with")
        if self.repeat_penalty < 1 / LARGEST:
            raise SettingError(f"repeat_penalty={self.repeat_penalty} must be greater than 0; 1 switches it off")

    @property
    def greedy(self) -> bool:
        return self.temp < 1e-6  # below that a double cannot tell it from greedy

    @property
    def penalises(self) -> bool:
        """Whether the text before changes the logits."""
        on = self.repeat_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return on and self.repeat_last_n != 0

    @property
    def plain(self) -> bool:
        """Whether the next token is that of the greatest logit as the model has it, but for a grammar."""
        return self.greedy and self.sight == 1 and not self.penalises and not self.logit_bias

    @property
    def sight(self) -> int | None:
        """How many of the likeliest tokens decide the distribution; None: all of them."""
        if self.greedy and self.typical_p >= 1:
            return 1
        return self.top_k if self.top_k > 0 else None

    def distribution(self, logits: np.ndarray, ids: np.ndarray | None = None) -> Distribution:
        """The distribution that the filters and the temperature make of one row of logits (float32, n).

        `ids[i]` (ascending) is the token of logits[i]; without it i itself is.
        """
        if self.sight == 1:
            best = int(np.argmax(logits))
            return Distribution(np.array([best if ids is None else ids[best]]), np.ones(1))
        if 0 < self.top_k < len(logits):
            chosen = np.argpartition(logits, -self.top_k)[-self.top_k :]
        else:
            chosen = np.arange(len(logits))
        # Likeliest first, ties by id, so that a filter's edge does not depend on the partition's order.
        chosen = chosen[np.lexsort((chosen, -logits[chosen]))]
        values = logits[chosen].astype(np.float64)
        values -= values[0]
        probs = np.exp(values)
        if self.typical_p < 1:
            typical = self._typical(values, probs)
            chosen, values = chosen[typical], values[typical] - values[typical[0]]
            probs = np.exp(values)
        keep = len(probs)
        if self.top_p < 1:
            keep = int(np.searchsorted(np.cumsum(probs) / probs.sum(), max(self.top_p, 0.0))) + 1
        if self.min_p > 0:
            keep = min(keep, int(np.count_nonzero(probs >= self.min_p)))
        keep = 1 if self.greedy else max(1, min(keep, len(probs)))
        weights = np.exp(values[:keep] / self.temp) if keep > 1 else np.ones(1)
        order = np.argsort(chosen[:keep])
        kept = chosen[:keep][order]
        return Distribution(kept if ids is None else ids[kept], weights[order] / weights.sum())

    def _typical(self, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Places (ascending) of the tokens whose surprise is nearest to the expected one (arXiv 2202.00666)."""
        surprise = np.log(weights.sum()) - values
        probs = weights / weights.sum()
        nearest = np.argsort(np.abs(surprise - (probs * surprise).sum()), kind="stable")
        n = int(np.searchsorted(np.cumsum(probs[nearest]), max(self.typical_p, 0.0), side="right")) + 1
        return np.sort(nearest[:n])


GREEDY = Sampling(temp=0)
