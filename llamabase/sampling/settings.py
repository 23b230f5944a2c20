"""How to sample: llama.cpp's settings and their checks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np

from llamabase.errors import SettingError

MOST_SAMPLERS = 32  # samplers in a chain: penalties take 4 MB each
LARGEST = 1e30  # absolute value of a setting: float32 holds logits after any number of such penalties and biases

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
OFF = "adaptive_p"  # a sampler of llama.cpp's that does nothing while its target is negative
DEFAULT = tuple(name for name in LETTERS if name != "infill")
_OTHER_NAMES = {"nucleus": "top_p", "temp": "temperature", "typ": "typ_p"}
_OWN_DRAWS = "follows its own draws, and here the target draws with noise that it shares with the drafter"


@dataclass(frozen=True)
class Sampling:
    """llama.cpp's sampler settings with its defaults; `llamabase.sampling.chain.Chain` applies them to a text.

    temp 0 is greedy. These values switch a sampler off: top_k <= 0, typical_p >= 1, top_p >= 1, min_p <= 0,
    top_n_sigma <= 0, xtc_probability 0, dynatemp_range 0, dry_multiplier 0, repeat_penalty 1 and the other penalties 0.
    Penalties look at the last repeat_last_n tokens (0: none, -1: all), DRY likewise at dry_penalty_last_n. logit_bias
    is added to the logits of its token ids; -inf bans one. grammar is a GBNF, guide what `guidance` makes of a JSON
    schema; empty for none. Bias and grammar or guide come first, then `samplers` in their order.

    Raises SettingError, which is a ValueError, for a number that is NaN or too large to compute with, and for samplers
    that are not in LETTERS or that draw tokens themselves.
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
    min_keep: int = 0  # fewest tokens that top_p, min_p, typical and XTC leave
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
            raise SettingError(f"mirostat={self.mirostat} is not supported: Mirostat {_OWN_DRAWS}")
        if self.adaptive_target >= 0:
            raise SettingError(f"adaptive_target={self.adaptive_target} is not supported: adaptive_p {_OWN_DRAWS}")
        if len(self.samplers) > MOST_SAMPLERS:
            raise SettingError(f"samplers: {len(self.samplers)} are more than the {MOST_SAMPLERS} that may be chained")
        for name in self.samplers:
            if name not in (*LETTERS, OFF):
                raise SettingError(f"{name}: is not a sampler; choose from {', '.join(LETTERS)}")

    @property
    def chain(self) -> tuple[str, ...]:
        """The samplers that do anything as they are set, in their order."""
        penalises = self.repeat_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        on = {
            "penalties": penalises and self.repeat_last_n != 0,
            "dry": self.dry_multiplier != 0 and self.dry_base >= 1 and self.dry_penalty_last_n != 0,
            "top_n_sigma": self.top_n_sigma > 0,
            "top_k": self.top_k > 0,
            "typ_p": self.typical_p < 1,
            "top_p": self.top_p < 1,
            "min_p": self.min_p > 0,
            "xtc": self.xtc_probability > 0 and self.xtc_threshold <= 0.5,
            "temperature": self.temp != 1 or self.dynatemp_range > 0,
            "infill": True,
            OFF: False,
        }
        return tuple(name for name in self.samplers if on[name])

    @property
    def greedy(self) -> bool:
        """Whether the temperature leaves one token; below 1e-6 a double cannot tell it from 0."""
        return "temperature" in self.samplers and self.temp < 1e-6 and self.dynatemp_range <= 0

    @cached_property  # every round asks
    def plain(self) -> bool:
        """Whether the next token is the argmax of the model's own logits, but for a grammar or a schema."""
        return self.sight == 1 and not self.leading and not self.logit_bias

    @property
    def leading(self) -> tuple[str, ...]:
        """The samplers at the beginning that only move logits of tokens in the text: penalties and DRY."""
        return tuple(itertools.takewhile(("penalties", "dry").__contains__, self.chain))

    @property
    def sight(self) -> int | None:
        """How many of the likeliest tokens decide the distribution after the `leading` samplers; None for all."""
        rest = self.chain[len(self.leading) :]
        if self.greedy and not {"typ_p", "xtc", "infill", "penalties", "dry"} & set(rest):  # no other drops the best
            return 1
        return self.top_k if rest[:1] == ("top_k",) else None


GREEDY = Sampling(temp=0)


def samplers_named(names: str) -> tuple[str, ...]:
    """The value of --samplers: names separated by semicolons, each in any form that llama.cpp takes."""
    known = {form: name for name in (*LETTERS, OFF) for form in (name, name.replace("_", "-"))}
    known |= {name.replace("_", ""): name for name in known.values()} | _OTHER_NAMES
    return tuple(known.get(name.strip().lower(), name) for name in names.split(";") if name.strip())


def samplers_lettered(letters: str) -> tuple[str, ...]:
    """The value of --sampler-seq: one letter each."""
    known = {letter: name for name, letter in LETTERS.items()} | {"a": OFF}
    return tuple(known.get(letter, letter) for letter in letters)
