"""Options that several commands share, each declared once, named as llama.cpp names them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce, wraps
from pathlib import Path
from typing import Any

import click

from gguf_trim.pairs.prepare import DEFAULT_MODEL, Prepared, prepare
from llamabase.command import FILE, THREADS
from llamabase.errors import SettingError, TrimError
from llamabase.files import read_text
from llamabase.guidance import schema_guide
from llamabase.llama import CACHE_TYPES, F16, Cache
from llamabase.sampling import DEFAULT, LETTERS, Sampling, samplers_lettered, samplers_named
from llamabase.template import RESERVED

from .auto import LONGEST
from .drafter import AUTO, VOCABS
from .engine import Engine

FULL = "full"


def _draft_max(text: str) -> int | None:
    """How many tokens to draft in a round: a number, or auto (None)."""
    return None if text == AUTO else click.IntRange(0, LONGEST)(text)


def draft_max_option(default: str = AUTO) -> Callable[[Any], Any]:
    return click.option(
        "--draft-max",
        type=_draft_max,
        metavar="AUTO|N",
        default=default,
        show_default=True,
        help="Tokens to draft in a round; 0 is plain decoding; auto: as many as pay here, by measured costs.",
    )


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several as one, in this order."""
    return lambda command: reduce(lambda found, option: option(found), reversed(options), command)


@dataclass(frozen=True)
class Models:
    """Which files to run, and how to load them."""

    target: Path
    draft: Path | None
    prepared: Prepared | None
    n_ctx: int
    n_threads: int | None
    n_gpu_layers: int | None
    vocab: str
    n_ctx_draft: int | None = None
    cache: Cache = F16
    cache_draft: Cache = F16

    def open(self) -> Engine:
        """The engine these options describe."""
        return Engine(**{name: value for name, value in vars(self).items() if name != "prepared"})


def _cache_options(which: str, whose: str) -> list[Callable[..., Any]]:
    """--cache-type-k and -v of one of the two models."""
    return [
        click.option(
            f"-ct{letter}{which[1:2]}",
            f"--cache-type-{letter}{which}",
            type=click.Choice(CACHE_TYPES),
            default="f16",
            show_default=True,
            help=f"Type of {whose} KV cache's {name}.",
        )
        for letter, name in (("k", "keys"), ("v", "values"))
    ]


def model_options(command: Any) -> Any:
    """--model | --target --draft, and how to load them; the command receives `models`, a function that finds them.

    A pair of the catalog is fetched, trimmed and verified where that has not been done yet.
    """

    @click.option("-m", "--model", metavar="NAME", help=f"A pair of the catalog.  [default: {DEFAULT_MODEL}]")
    @click.option("--target", type=FILE, help="The target's GGUF, instead of --model.")
    @click.option(
        "-md",
        "--model-draft",
        "--draft",
        "draft",
        type=FILE,
        help="The drafter's GGUF, trimmed or not; without it: plain decoding.",
    )
    @click.option("-ngl", "--n-gpu-layers", type=int, help="Layers on the GPU.  [default: llama.cpp's]")
    @THREADS
    @click.option(
        "-c", "--ctx-size", type=click.IntRange(8), default=4096, show_default=True, help="Tokens of context."
    )
    @click.option(
        "-cd",
        "--draft-ctx",
        "--ctx-size-draft",
        type=click.IntRange(64),
        help="Tokens that the drafter remembers, to save memory.  [default: --ctx-size]",
    )
    @_options(*_cache_options("", "the target's"), *_cache_options("-draft", "the drafter's"))
    @click.option(
        "--vocab",
        type=click.Choice([FULL, *VOCABS]),
        default=AUTO,
        show_default=True,
        help="What the drafter drafts from: its whole head, the kept rows, those and the tokens of the text, "
        "or the speculator's candidates too. auto: the last its files allow.",
    )
    @wraps(command)
    def with_models(
        model: str | None,
        target: Path | None,
        draft: Path | None,
        n_gpu_layers: int | None,
        threads: int | None,
        ctx_size: int,
        vocab: str,
        draft_ctx: int | None,
        cache_type_k: str,
        cache_type_v: str,
        cache_type_k_draft: str,
        cache_type_v_draft: str,
        **others: Any,
    ) -> Any:
        caches = draft_ctx, Cache(cache_type_k, cache_type_v), Cache(cache_type_k_draft, cache_type_v_draft)
        if model is not None and (target is not None or draft is not None):
            raise click.UsageError("give --model, a pair of the catalog, or --target with --draft, not both")
        if draft is not None and target is None:
            raise click.UsageError("--draft needs --target")
        if vocab == FULL and target is not None:
            raise click.UsageError("--vocab full is for a --model; with --target give the uncut drafter as --draft")

        def find(instead: Path | None = None) -> Models:
            """The models, or a target given instead of them."""
            how = ctx_size, threads, n_gpu_layers, vocab, *caches
            if (given := instead or target) is not None:
                return Models(given, None if instead else draft, None, *how)
            prepared = prepare(model or DEFAULT_MODEL)
            return Models(prepared.target, prepared.drafter if vocab == FULL else prepared.trimmed, prepared, *how)

        return command(models=find, **others)

    return with_models


def _template_kwargs(context: Any, option: Any, text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise click.BadParameter('is not a JSON object, such as {"enable_thinking": false}')
    if taken := sorted(RESERVED & found.keys()):
        raise click.BadParameter(f"{taken[0]} is set by the conversation itself; leave it out")
    return found


template_kwargs_option = click.option(
    "--chat-template-kwargs",
    "template_kwargs",
    metavar="JSON",
    callback=_template_kwargs,
    help='Further names for the chat template, as a JSON object: {"enable_thinking": false}.',
)


_BIAS = re.compile(r"(\d+)([+-])(.+)", re.ASCII)


def _logit_bias(given: Sequence[str]) -> dict[int, float]:
    """TOKEN_ID(+/-)BIAS, as llama.cpp writes it; what is given twice for a token adds up."""
    biases: dict[int, float] = {}
    for text in given:
        try:
            token, sign, size = _BIAS.fullmatch(text).groups()  # type: ignore[union-attr]
            bias = float(sign + size)
        except (AttributeError, ValueError) as error:
            raise click.UsageError(f"--logit-bias {text}: is not TOKEN_ID(+/-)BIAS, such as 15043+1") from error
        if not bias < math.inf:
            raise click.UsageError(f"--logit-bias {text}: a bias is a number, or -inf to ban the token")
        biases[int(token)] = biases.get(int(token), 0.0) + bias
    return biases


def _form(grammar: str | None, grammar_file: Path | None, schema: str | None, schema_file: Path | None) -> Sampling:
    """Sampling with the grammar or the schema that these four options give, if any."""
    if sum(given is not None for given in (grammar, grammar_file, schema, schema_file)) > 1:
        raise click.UsageError("give one of --grammar, --grammar-file, --json-schema and --json-schema-file")
    if schema_file is not None:
        schema = read_text(schema_file, "a JSON schema")
    if schema is not None:
        try:
            return Sampling(guide=schema_guide(schema))
        except TrimError as error:
            raise click.UsageError(str(error)) from error
    return Sampling(grammar=grammar or ("" if grammar_file is None else read_text(grammar_file, "a grammar")))


# Flags, the field of Sampling that each sets, and what it does.
SETTINGS = (
    (("--temp", "--temperature"), "temp", "Temperature; 0 is greedy."),
    (("--top-k",), "top_k", "0 switches it off."),
    (("--typical", "--typical-p"), "typical_p", "Locally typical sampling; 1 switches it off."),
    (("--top-p",), "top_p", "1 switches it off."),
    (("--min-p",), "min_p", "0 switches it off."),
    (("--top-n-sigma", "--top-nsigma"), "top_n_sigma", "-1 switches it off."),
    (("--xtc-probability",), "xtc_probability", "How often XTC takes the likeliest tokens out; 0: never."),
    (("--xtc-threshold",), "xtc_threshold", "The probability from which it takes them; above 0.5: none."),
    (("--dynatemp-range",), "dynatemp_range", "By how much the temperature follows the entropy; 0: not."),
    (("--dynatemp-exp",), "dynatemp_exponent", "How it follows."),
    (("--repeat-penalty",), "repeat_penalty", "For tokens said before; 1 switches it off."),
    (("--repeat-last-n",), "repeat_last_n", "Tokens the penalties look back at; 0: none, -1: all."),
    (("--presence-penalty",), "presence_penalty", "Taken off once; 0 switches it off."),
    (("--frequency-penalty",), "frequency_penalty", "Taken off each time; 0 switches it off."),
    (("--dry-multiplier",), "dry_multiplier", "DRY, for tokens that go on with a repetition; 0 switches it off."),
    (("--dry-base",), "dry_base", "By how much it grows with each token repeated."),
    (("--dry-allowed-length",), "dry_allowed_length", "Tokens repeated that cost nothing."),
    (("--dry-penalty-last-n",), "dry_penalty_last_n", "Tokens DRY looks back at; 0 switches it off."),
    (("--mirostat",), "mirostat", "Refused: it cannot be drawn with shared noise."),
    (("--adaptive-target",), "adaptive_target", "Refused likewise."),
)


def _setting(*flags: str, name: str, help: str) -> Callable[[Any], Any]:
    default = getattr(Sampling(), name)
    least = {"repeat_last_n": -1, "dry_penalty_last_n": 0}.get(name)
    kind = type(default) if least is None else click.IntRange(least)
    hidden = help.startswith("Refused")
    return click.option(*flags, name, type=kind, default=default, show_default=True, help=help, hidden=hidden)


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


def _breakers(given: Sequence[str]) -> tuple[str, ...]:
    r"""Sequence breakers as llama.cpp reads them: \n, \t and \r are characters, and none forgets those before it."""
    last = max((i for i, text in enumerate(given) if text == "none"), default=-1)
    return tuple(re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), text) for text in given[last + 1 :])


def sampling_options(command: Any) -> Any:
    """The samplers, the seed and the draft length; the command receives `sampling`, `seed` and `draft_max`."""

    @_options(*(_setting(*flags, name=name, help=text) for flags, name, text in SETTINGS))
    @click.option(
        "--dry-sequence-breaker",
        "dry_sequence_breakers",
        multiple=True,
        metavar="STRING",
        help="Where a repetition ends, instead of those known; can be repeated; none: nowhere.",
    )
    @click.option("--samplers", metavar="A;B;...", help="Which samplers, in this order: top_k;temp, say.")
    @click.option(
        "--sampler-seq",
        "--sampling-seq",
        "sampler_seq",
        metavar="LETTERS",
        help=f"The same in letters.  [default: {''.join(LETTERS[name] for name in DEFAULT)}]",
    )
    @click.option(
        "-l",
        "--logit-bias",
        multiple=True,
        metavar="TOKEN_ID(+/-)BIAS",
        help="Make a token likelier or rarer: 15043+1, 15043-inf. Can be repeated.",
    )
    @click.option("--grammar", metavar="GBNF", help="Constrain the answer to a grammar.")
    @click.option("--grammar-file", type=FILE, help="The grammar in a file.")
    @click.option("-j", "--json-schema", metavar="SCHEMA", help="Constrain the answer to JSON of a schema.")
    @click.option("-jf", "--json-schema-file", type=FILE, help="The schema in a file.")
    @click.option("-s", "--seed", type=click.IntRange(0), help="Same seed, same text.  [default: random]")
    @draft_max_option()
    @wraps(command)
    def with_sampling(
        grammar: str | None,
        grammar_file: Path | None,
        json_schema: str | None,
        json_schema_file: Path | None,
        logit_bias: Sequence[str],
        dry_sequence_breakers: Sequence[str],
        samplers: str | None,
        sampler_seq: str | None,
        **others: Any,
    ) -> Any:
        if samplers is not None and sampler_seq is not None:
            raise click.UsageError("give --samplers or --sampler-seq, not both")
        values = {name: others.pop(name) for _, name, _ in SETTINGS}
        if samplers is not None:
            values["samplers"] = samplers_named(samplers)
        if sampler_seq is not None:
            values["samplers"] = samplers_lettered(sampler_seq)
        if dry_sequence_breakers:
            values["dry_sequence_breakers"] = _breakers(dry_sequence_breakers)
        form = _form(grammar, grammar_file, json_schema, json_schema_file)
        try:
            sampling = replace(form, **values, logit_bias=_logit_bias(logit_bias))
        except SettingError as error:
            raise click.UsageError(str(error)) from error
        return command(sampling=sampling, **others)

    return with_sampling
