"""llama.cpp's own samplers over one text: from rows of logits to the law of the next token.

The samplers are llama.cpp's (`llama_sampler_*`), applied to an array of tokens: what they leave of it is the law. It is
drawn from with noise of our own (`llamabase.sampling.noise`). They are shown no more tokens than can matter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import llama_cpp
import numpy as np

from llamabase.errors import EngineError, SettingError
from llamabase.llama.library import Owner
from llamabase.llama.model import Model

from .grammar import Grammar
from .guidance import Guide
from .noise import Noise
from .settings import Distribution, Sampling
from .tokens import Tokens

STEPS = (1, 64, 1024)  # so many of the likeliest tokens are shown before all of them are
ALL = 1 << 20  # tokens that penalties over the whole text look back at: more than any context holds
_KEPT = 8  # sets of DRY's settings of a model, each some megabytes
_GROUPS = 4  # of scores, for each score that is looked for
_LEAST = float(np.finfo(np.float32).min)  # that a token which may come can have
_NOTHING = 87.0  # logits below the best: e to the minus this is nothing in float32, of which typical makes NaN


class Constraint(Protocol):
    """What an answer must obey, and the place that it has reached in it: a `Grammar` or a `Guide`."""

    def allowed(self, ids: np.ndarray) -> np.ndarray:
        """Which of these tokens (int, n) may come next (bool, n)."""

    def fitting(self, drafts: list[int]) -> int:
        """How many of the drafts, from the first on, are worth verifying: the one after them may not come."""

    def accept(self, token: int) -> None:
        """Go on by a token. Raises ValueError for one that may not come."""


class Chain(Owner):
    """From rows of logits to laws, one token of a text after another.

    `text` is what was said so far: it counts for penalties and DRY and is not part of what grammar or guide describes,
    as in llama-server. `noise` says where XTC acts; target and drafter share it. Without a `model`, for a drafter,
    whose law may be any, grammar, guide and infill are left out and DRY has no sequence breakers.

    Raises EngineError for a grammar that does not parse and for a bias of a token that the model does not have.
    """

    def __init__(
        self, sampling: Sampling, text: Sequence[int], model: Model | None = None, noise: Noise | None = None
    ) -> None:
        self._samplers: list[tuple[str, Any]] = []
        self._constraint: Constraint | None = None
        self._sampling, self._noise, self._position = sampling, noise, len(text)
        if noise is None and "xtc" in sampling.chain:
            raise ValueError("XTC acts by chance and needs noise")
        if model is not None:
            for token in sampling.logit_bias:
                if not 0 <= token < model.n_vocab:
                    raise EngineError(
                        f"{model.path}: has no token {token}, which the logit bias names; it has {model.n_vocab}"
                    )
            if sampling.grammar:
                self._constraint = Grammar(model, sampling.grammar)
            elif sampling.guide:
                self._constraint = Guide(model, sampling.guide)
        self._biased = np.array(list(sampling.logit_bias), np.int64)
        self._biases = np.array(list(sampling.logit_bias.values()), np.float32)
        for name in sampling.chain:
            self._samplers.append((name, _make(name, sampling, model)))
        self._sight, n = sampling.sight, len(sampling.leading)
        self._first = [sampler for _, sampler in self._samplers[:n]]
        self._rest = self._samplers[n:]
        self._raises = n > 0 and (
            sampling.repeat_penalty < 1
            or min(sampling.presence_penalty, sampling.frequency_penalty, sampling.dry_multiplier) < 0
        )
        self._remembering = [sampler for name, sampler in self._samplers if name in ("penalties", "dry")]
        if self._remembering:
            for token in text[-max(_last(sampling.repeat_last_n), _last(sampling.dry_penalty_last_n)) :]:
                self._remember(token)

    def distribution(self, logits: np.ndarray, ids: np.ndarray | None = None) -> Distribution:
        """The law of the next token, from its row of logits (float32, n).

        `ids[i]` (ascending) is the token of logits[i]; without it i itself is. Raises EngineError where no token is
        left.
        """
        logits = self._with_bias(logits, ids)
        if self._sight == 1 and not self._first and self._constraint is None:
            best = int(logits.argmax())
            _require_one(logits[best])
            return Distribution(np.array([best if ids is None else ids[best]]), np.ones(1))
        tokens = self._shown(logits, ids, self._sight)
        _require_one(tokens.left["logit"].max(initial=-np.inf))
        if self._sight == 1:
            return Distribution(_best(tokens.left)["id"], np.ones(1))
        for name, sampler in self._rest:
            if name == "temperature" and self._sampling.greedy:
                tokens = Tokens(_best(tokens.left))
            elif name == "typ_p":
                left = tokens.left
                tokens = Tokens(left[left["logit"] > left["logit"].max() - _NOTHING])
                tokens.apply(sampler)
            elif name != "xtc" or self._acts():
                tokens.apply(sampler)
        return _law(tokens.left)

    def logits(self, logits: np.ndarray) -> np.ndarray:
        """The row (float32, n_vocab) as bias, constraint and leading samplers make it, -inf for what may not come."""
        found = self._shown(self._with_bias(logits, None), None, None).left
        row = np.empty(len(logits), np.float32)
        row[found["id"]] = found["logit"]
        return row

    def accept(self, token: int) -> None:
        """Go on by a token that was emitted: one that `distribution` gave a probability."""
        self._position += 1
        self._remember(token)
        if self._constraint is not None:
            self._constraint.accept(token)

    def fitting(self, drafts: list[int]) -> int:
        """How many of the drafts, from the first on, are worth verifying; see `Constraint.fitting`."""
        return len(drafts) if self._constraint is None else self._constraint.fitting(drafts)

    def close(self) -> None:
        for _, sampler in self._samplers:
            llama_cpp.llama_sampler_free(sampler)
        self._samplers = []

    def _remember(self, token: int) -> None:
        for sampler in self._remembering:
            llama_cpp.llama_sampler_accept(sampler, token)

    def _acts(self) -> bool:
        """Whether XTC acts at this position: a function of seed and position, so of nothing that was drafted."""
        return self._noise is not None and self._noise.uniform(self._position) < self._sampling.xtc_probability

    def _with_bias(self, logits: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
        """The row with the bias. llama.cpp's own sampler looks through all biases for every token."""
        if not len(self._biased):
            return logits
        places = self._biased if ids is None else np.searchsorted(ids, self._biased)
        known = places < len(logits)
        if ids is not None:
            known[known] = ids[places[known]] == self._biased[known]
        logits = logits.copy()
        logits[places[known]] += self._biases[known]
        return logits

    def _shown(self, logits: np.ndarray, ids: np.ndarray | None, sight: int | None) -> Tokens:
        """What constraint and leading samplers make of as few of the likeliest tokens as hold the `sight` likeliest.

        Those that were not shown had lesser logits, which nothing raises. So if as many as are wanted still reach the
        least that was shown, or that one may not come itself, no other can come in.
        """
        wanted = len(logits) if sight is None or self._raises else sight
        steps = [n for n in STEPS if wanted <= n < len(logits)]
        for n in steps:  # asking the constraint about these alone, which mostly does
            places = likeliest(logits, n)
            of = places if ids is None else ids[places]
            tokens, least = self._led(of, self._permitted(of, logits[places])), logits[places].min()
            if np.count_nonzero(tokens.left["logit"] >= max(least, _LEAST)) >= wanted:
                return tokens
        ids = np.arange(len(logits)) if ids is None else ids
        logits = self._permitted(ids, logits)
        for n in steps if self._constraint is not None else ():
            places = likeliest(logits, n)
            tokens, least = self._led(ids[places], logits[places]), logits[places].min()
            if least == -np.inf or np.count_nonzero(tokens.left["logit"] >= least) >= wanted:
                return tokens
        return self._led(ids, logits)

    def _led(self, ids: np.ndarray, logits: np.ndarray) -> Tokens:
        tokens = Tokens.of(ids, logits)
        for sampler in self._first:
            tokens.apply(sampler)
        return tokens

    def _permitted(self, ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """The logits of these tokens, -inf where the constraint forbids one."""
        if self._constraint is None:
            return logits
        return np.where(self._constraint.allowed(ids), logits, np.float32(-np.inf))


def likeliest(scores: np.ndarray, m: int) -> np.ndarray:
    """Places (ascending) of the m greatest scores, and of some that are next; of equal ones for m = 1 the first.

    m groups of scores reach the m-th greatest of the groups' maxima, so no score below it is looked at.
    """
    if m >= len(scores):
        return np.arange(len(scores))
    if m == 1:
        return np.array([scores.argmax()])
    size = max(1, len(scores) // (_GROUPS * m))
    n = len(scores) // size
    maxima = scores[: n * size].reshape(size, n).max(axis=0)
    maxima.partition(n - m)
    places: np.ndarray = (scores >= maxima[n - m]).nonzero()[0]
    return places


def _require_one(best: float) -> None:
    if best == -np.inf:
        raise SettingError("no token is left that may come next: grammar, schema or logit bias forbid all of them")


def _best(left: np.ndarray) -> np.ndarray:
    """The token of the greatest logit, of equals that of the lowest id."""
    best: np.ndarray = left[left["logit"] == left["logit"].max()]
    return best if len(best) == 1 else best[[best["id"].argmin()]]


def _law(left: np.ndarray) -> Distribution:
    left = left[left["logit"] > -np.inf]
    ids = left["id"].astype(np.int64)
    values = left["logit"].astype(np.float64)
    if (np.diff(ids) < 0).any():
        order = np.argsort(ids)
        ids, values = ids[order], values[order]
    best = values.max()
    if not best < np.inf:  # nor is NaN
        raise SettingError("samplers: what they leave is no law; choose milder settings")
    weights = np.exp(values - best)
    return Distribution(ids, weights / weights.sum())


def _last(n: int) -> int:
    """How many tokens are looked back at; less than none is all of them."""
    return ALL if n < 0 else min(n, ALL)


def _make(name: str, sampling: Sampling, model: Model | None) -> Any:
    """One of llama.cpp's samplers, as it is set."""
    keep = min(max(sampling.min_keep, 0), ALL)
    match name:
        case "penalties":
            n_vocab = 0 if model is None else model.n_vocab  # of which the samplers of the CPU take no notice
            penalties = sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty
            return llama_cpp.llama_sampler_init_penalties(n_vocab, _last(sampling.repeat_last_n), *penalties)
        case "dry":
            return _dry(sampling, model)
        case "top_n_sigma":
            return llama_cpp.llama_sampler_init_top_n_sigma(sampling.top_n_sigma)
        case "top_k":
            return llama_cpp.llama_sampler_init_top_k(min(sampling.top_k, ALL))
        case "typ_p":
            return llama_cpp.llama_sampler_init_typical(sampling.typical_p, keep)
        case "top_p":
            return llama_cpp.llama_sampler_init_top_p(sampling.top_p, keep)
        case "min_p":
            return llama_cpp.llama_sampler_init_min_p(sampling.min_p, keep)
        case "xtc":  # which always acts: we say when
            return llama_cpp.llama_sampler_init_xtc(1.0, sampling.xtc_threshold, keep, 0)
        case "temperature":
            return llama_cpp.llama_sampler_init_temp_ext(
                sampling.temp, sampling.dynatemp_range, sampling.dynatemp_exponent
            )
        case "infill" if model is not None:
            return llama_cpp.llama_sampler_init_infill(model.vocab)
    return llama_cpp.llama_sampler_init_temp(1.0)  # infill without a vocabulary: changes nothing


def _dry(sampling: Sampling, model: Model | None) -> Any:
    """DRY. The tokens that a breaker is in are looked for in the whole vocabulary: once for a model."""
    lengths = min(max(sampling.dry_allowed_length, 0), ALL), _last(sampling.dry_penalty_last_n)
    settings = sampling.dry_multiplier, sampling.dry_base, *lengths
    if model is None:
        return llama_cpp.llama_sampler_init_dry(None, *settings, None, 0)
    key = (settings, tuple(sampling.dry_sequence_breakers))
    if key not in model.samplers:
        if len(model.samplers) == _KEPT:
            llama_cpp.llama_sampler_free(model.samplers.pop(next(iter(model.samplers))))
        breakers = [breaker.encode("utf-8", "replace") for breaker in sampling.dry_sequence_breakers]
        array = (ctypes.c_char_p * len(breakers))(*breakers)
        model.samplers[key] = llama_cpp.llama_sampler_init_dry(model.vocab, *settings, array, len(breakers))
    return llama_cpp.llama_sampler_clone(model.samplers[key])
