"""llama.cpp's own samplers over one text: from rows of logits to the distribution of the next token.

Samplers (`llama_sampler_*`) are applied to an array of the tokens that can matter; what they leave is the distribution.
It is drawn from with noise of our own (`llamabase.sampling.noise`).
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
from .noise import Distribution, Noise
from .settings import Sampling
from .tokens import Tokens

STEPS = (1, 64, 1024)  # numbers of likeliest tokens to try before the whole vocabulary
ALL = 1 << 20  # tokens that penalties over the whole text look back at: more than any context holds
_DRY_SETTINGS = 8  # most settings of DRY that a model keeps samplers of, each some megabytes
_GROUPS = 4  # groups of scores for each score wanted
_LEAST = float(np.finfo(np.float32).min)  # least logit of a token that may come
_NOTHING = 87.0  # logits below the best: e to the minus this is 0 in float32, of which typical makes NaN


class Constraint(Protocol):
    """What an answer must obey, and the place that a text has reached in it: a `Grammar` or a `Guide`."""

    def allowed(self, ids: np.ndarray) -> np.ndarray:
        """Which of these tokens (int, n, ascending) may come next (bool, n)."""

    def fitting(self, drafts: list[int]) -> int:
        """How many of the drafts, from the first on, are worth verifying: the one after them may not come."""

    def accept(self, token: int) -> None:
        """Go on by a token. Raises ValueError for one that may not come."""


class Chain(Owner):
    """Turns rows of logits into distributions, one token of a text after another.

    `text` is what came before: penalties and DRY count it, and grammar or guide do not describe it, as in llama-server.
    `noise` decides at which positions XTC acts; target and drafter share it. A drafter's distribution may be any, so it
    needs no `model`: grammar, guide and infill are left out then, and DRY has no sequence breakers.

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
        self._leading = [sampler for _, sampler in self._samplers[:n]]
        self._rest = self._samplers[n:]
        penalties = sampling.presence_penalty, sampling.frequency_penalty, sampling.dry_multiplier
        self._raises = n > 0 and (sampling.repeat_penalty < 1 or min(penalties) < 0)
        self._remembering = [sampler for name, sampler in self._samplers if name in ("penalties", "dry")]
        if self._remembering:
            for token in text[-max(_last(sampling.repeat_last_n), _last(sampling.dry_penalty_last_n)) :]:
                self._remember(token)

    def distribution(self, logits: np.ndarray, ids: np.ndarray | None = None) -> Distribution:
        """The distribution of the next token, from its row of logits (float32, n).

        `ids[i]` (ascending) is the token of logits[i]; without `ids` it is i. Raises EngineError if no token is left.
        """
        logits = self._with_bias(logits, ids)
        if self._sight == 1 and not self._leading and self._constraint is None:
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
                continue
            if name == "typ_p":
                left = tokens.left
                tokens = Tokens(left[left["logit"] > left["logit"].max() - _NOTHING])
            if name != "xtc" or self._xtc_acts():
                tokens.apply(sampler)
        return _distribution(tokens.left)

    def logits(self, logits: np.ndarray) -> np.ndarray:
        """The row (float32, n_vocab) after bias, constraint and leading samplers, -inf for what may not come."""
        left = self._shown(self._with_bias(logits, None), None, None).left
        row = np.empty(len(logits), np.float32)
        row[left["id"]] = left["logit"]
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

    def _xtc_acts(self) -> bool:
        """Whether XTC acts at this position: a function of seed and position, so independent of any draft."""
        return self._noise is not None and self._noise.uniform(self._position) < self._sampling.xtc_probability

    def _with_bias(self, logits: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
        """The row with the bias. llama.cpp's own sampler searches all biases for every token."""
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
        """The smallest top-n, after constraint and leading samplers, that is certain to contain the `sight` likeliest.

        It is certain if `sight` tokens still reach the least logit of the top-n: the others are below it, and nothing
        raises them. The constraint is asked about each top-n first, which is mostly enough, and then about all tokens.
        """
        wanted = len(logits) if sight is None or self._raises else sight
        steps = [n for n in STEPS if wanted <= n < len(logits)]
        masked = self._constraint is None
        while True:
            for n in steps:
                places = likeliest(logits, n)
                row, of = logits[places], places if ids is None else ids[places]
                tokens, least = self._led(of, row if masked else self._permitted(of, row)), row.min()
                if least == -np.inf or np.count_nonzero(tokens.left["logit"] >= max(least, _LEAST)) >= wanted:
                    return tokens
            ids = np.arange(len(logits)) if ids is None else ids
            if masked:
                return self._led(ids, logits)
            logits, masked = self._permitted(ids, logits), True

    def _led(self, ids: np.ndarray, logits: np.ndarray) -> Tokens:
        tokens = Tokens.of(ids, logits)
        for sampler in self._leading:
            tokens.apply(sampler)
        return tokens

    def _permitted(self, ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """The logits of these tokens, -inf for those that the constraint forbids."""
        assert self._constraint is not None
        return np.where(self._constraint.allowed(ids), logits, np.float32(-np.inf))


def likeliest(scores: np.ndarray, m: int) -> np.ndarray:
    """Places (ascending) of the m greatest scores, and of some that are next; for m = 1 the first of equals alone.

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
    """The token of the greatest logit; among equals that of the lowest id."""
    best: np.ndarray = left[left["logit"] == left["logit"].max()]
    return best[[best["id"].argmin()]]


def _distribution(left: np.ndarray) -> Distribution:
    left = left[left["logit"] > -np.inf]
    if (np.diff(left["id"]) < 0).any():
        left = left[np.argsort(left["id"])]
    values = left["logit"].astype(np.float64)
    best = values.max()
    if not best < np.inf:  # nor is NaN
        raise SettingError("samplers: they leave no distribution; choose milder settings")
    weights = np.exp(values - best)
    return Distribution(left["id"].astype(np.int64), weights / weights.sum())


def _last(n: int) -> int:
    """How many tokens to look back at; a negative n means all."""
    return ALL if n < 0 else min(n, ALL)


def _make(name: str, s: Sampling, model: Model | None) -> Any:
    """One of llama.cpp's samplers with its settings."""
    keep = min(max(s.min_keep, 0), ALL)
    n_vocab = 0 if model is None else model.n_vocab  # which penalties on the CPU ignore
    penalties = s.repeat_penalty, s.frequency_penalty, s.presence_penalty
    if name == "infill" and model is None:
        return llama_cpp.llama_sampler_init_temp(1.0)  # changes nothing
    return {
        "penalties": lambda: llama_cpp.llama_sampler_init_penalties(n_vocab, _last(s.repeat_last_n), *penalties),
        "dry": lambda: _dry(s, model),
        "top_n_sigma": lambda: llama_cpp.llama_sampler_init_top_n_sigma(s.top_n_sigma),
        "top_k": lambda: llama_cpp.llama_sampler_init_top_k(min(s.top_k, ALL)),
        "typ_p": lambda: llama_cpp.llama_sampler_init_typical(s.typical_p, keep),
        "top_p": lambda: llama_cpp.llama_sampler_init_top_p(s.top_p, keep),
        "min_p": lambda: llama_cpp.llama_sampler_init_min_p(s.min_p, keep),
        "xtc": lambda: llama_cpp.llama_sampler_init_xtc(1.0, s.xtc_threshold, keep, 0),  # acts whenever it is applied
        "temperature": lambda: llama_cpp.llama_sampler_init_temp_ext(s.temp, s.dynatemp_range, s.dynatemp_exponent),
        "infill": lambda: llama_cpp.llama_sampler_init_infill(model.vocab),  # type: ignore[union-attr]
    }[name]()


def _dry(s: Sampling, model: Model | None) -> Any:
    """DRY. It searches the whole vocabulary for tokens that contain a breaker, so a model keeps its samplers."""
    lengths = min(max(s.dry_allowed_length, 0), ALL), _last(s.dry_penalty_last_n)
    settings = s.dry_multiplier, s.dry_base, *lengths
    if model is None:
        return llama_cpp.llama_sampler_init_dry(None, *settings, None, 0)
    key = (settings, tuple(s.dry_sequence_breakers))
    if key not in model.samplers:
        if len(model.samplers) == _DRY_SETTINGS:
            llama_cpp.llama_sampler_free(model.samplers.pop(next(iter(model.samplers))))
        breakers = [breaker.encode("utf-8", "replace") for breaker in s.dry_sequence_breakers]
        array = (ctypes.c_char_p * len(breakers))(*breakers)
        model.samplers[key] = llama_cpp.llama_sampler_init_dry(model.vocab, *settings, array, len(breakers))
    return llama_cpp.llama_sampler_clone(model.samplers[key])
