"""How to sample: llama.cpp's settings, and the law of a token that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np

from llamabase.errors import SettingError

from .noise import Noise

MOST_SAMPLERS = 32  # of a chain: penalties take 4 MB each
LARGEST = 1e30  # of a setting: float32 holds what penalties and bias make of logits, however often they are added up

# llama.cpp's samplers in its order, by the names that --samplers takes, and the letter of each in --sampler-seq.
LETTERS = {
    "penalties": "e",
    "dry": "d",
    "top_n_sigma": "s",
    "top_k": "k",
    "typ_p": "y",
    "top_p": "p",
    "min_p": "m",
    "xtc": "x",
    "temperature": "t",
    "infill": "i",
}
OFF = "adaptive_p"  # a sampler that llama.cpp has; it does nothing as long as its target is negative
DEFAULT = tuple(name for name in LETTERS if name != "infill")
_OTHER_NAMES = {"nucleus": "top_p", "temp": "temperature", "typ": "typ_p"}
_OWN_DRAWS = "follows what it has drawn itself, and here the target draws with noise that it shares with the drafter"


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
    """llama.cpp's sampler settings with its defaults; `llamabase.sampling.chain.Chain` applies them to a text.

    temp 0 is greedy; top_k <= 0, typical_p >= 1, top_p >= 1, min_p <= 0, top_n_sigma <= 0, xtc_probability 0 and
    dynatemp_range 0 switch theirs off. The penalties look at the last repeat_last_n tokens (0: none, -1: all);
    repeat_penalty 1 and the others 0 switch them off. dry_multiplier 0 switches DRY off, which looks at the last
    dry_penalty_last_n tokens likewise. logit_bias is added to the logits of its token ids, -inf bans one. grammar is a
    GBNF, guide what `guidance` makes of a JSON schema; empty for none. Those and the bias come first, then
    `samplers` in their order.

    Raises SettingError, which is a ValueError, for what is no number or too large to reckon with, and for samplers that
    are none of LETTERS or that draw tokens themselves.
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
    guide: str = ""
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    min_keep: int = 0  # tokens that top_p, min_p, typical and XTC leave at least
    samplers: tuple[str, ...] = DEFAULT
    mirostat: int = 0
    adaptive_target: float = -1.0

    def __post_init__(self) -> None:
        settings = {item.name: getattr(self, item.name) for item in fields(self)}
        biases = {f"logit_bias of {token}": bias for token, bias in self.logit_bias.items() if bias != -np.inf}
        for name, value in (settings | biases).items():
            if isinstance(value, int | float) and not abs(value) <= LARGEST:
                raise SettingError(f"{name}={value} is not a number to sample with")
        if self.repeat_penalty < 1 / LARGEST:
            raise SettingError(f"repeat_penalty={self.repeat_penalty} must be greater than 0; 1 switches it off")
        if self.grammar and self.guide:
            raise SettingError("grammar: give a grammar or a JSON schema, not both")
        if self.mirostat:
            raise SettingError(f"mirostat={self.mirostat} is not to be had: Mirostat {_OWN_DRAWS}")
        if self.adaptive_target >= 0:
            raise SettingError(f"adaptive_target={self.adaptive_target} is not to be had: adaptive_p {_OWN_DRAWS}")
        if len(self.samplers) > MOST_SAMPLERS:
            raise SettingError(f"samplers: {len(self.samplers)} are more than the {MOST_SAMPLERS} that may be chained")
        for name in self.samplers:
            if name not in (*LETTERS, OFF):
                raise SettingError(f"{name}: is no sampler; there are {', '.join(LETTERS)}")

    def does(self, sampler: str) -> bool:
        """Whether a sampler of the chain does anything as it is set."""
        match sampler:
            case "penalties":
                on = self.repeat_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
                return on and self.repeat_last_n != 0
            case "dry":
                return self.dry_multiplier != 0 and self.dry_base >= 1 and self.dry_penalty_last_n != 0
            case "top_n_sigma":
                return self.top_n_sigma > 0
            case "top_k":
                return self.top_k > 0
            case "typ_p":
                return self.typical_p < 1
            case "top_p":
                return self.top_p < 1
            case "min_p":
                return self.min_p > 0
            case "xtc":
                return self.xtc_probability > 0 and self.xtc_threshold <= 0.5
            case "adaptive_p":
                return False
            case "temperature":
                return self.temp != 1 or self.dynatemp_range > 0
        return True

    @property
    def chain(self) -> tuple[str, ...]:
        """The samplers that do anything, in their order."""
        return tuple(name for name in self.samplers if self.does(name))

    @property
    def greedy(self) -> bool:
        """Whether the temperature leaves one token; below 1e-6 a double cannot tell it from 0."""
        return "temperature" in self.samplers and self.temp < 1e-6 and self.dynatemp_range <= 0

    @property
    def plain(self) -> bool:
        """Whether the next token is that of the greatest logit as the model has it, but for a grammar or a schema."""
        return self.sight == 1 and not self.leading and not self.logit_bias

    @property
    def leading(self) -> tuple[str, ...]:
        """The samplers that come first and move only logits of tokens that the text has."""
        chain = self.chain
        n = next((i for i, name in enumerate(chain) if name not in ("penalties", "dry")), len(chain))
        return chain[:n]

    @property
    def sight(self) -> int | None:
        """How many of the likeliest tokens decide the law once the `leading` samplers have run; None: all of them."""
        rest = self.chain[len(self.leading) :]
        if self.greedy and not {"typ_p", "xtc", "infill", "penalties", "dry"} & set(rest):  # no other drops the best
            return 1
        return self.top_k if rest[:1] == ("top_k",) else None


GREEDY = Sampling(temp=0)


def samplers_named(names: str) -> tuple[str, ...]:
    """The value of --samplers: names with semicolons between, each in the forms that llama.cpp takes."""
    known = {form: name for name in (*LETTERS, OFF) for form in (name, name.replace("_", "-"))}
    known |= {name.replace("_", ""): name for name in known.values()} | _OTHER_NAMES
    return tuple(known.get(name.strip().lower(), name) for name in names.split(";") if name.strip())


def samplers_lettered(letters: str) -> tuple[str, ...]:
    """The value of --sampler-seq: one letter each."""
    known = {letter: name for name, letter in LETTERS.items()} | {"a": OFF}
    return tuple(known.get(letter, letter) for letter in letters)
