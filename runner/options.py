"""Options that several commands share, each declared once, named as llama.cpp names them."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce, wraps
from pathlib import Path
from typing import Any

import click

from gguf_trim.format.mtp import DrafterSource, drafter_source
from gguf_trim.pairs.hub import HubModel, hub_options, local
from gguf_trim.pairs.prepare import DEFAULT_MODEL, Prepared, prepare
from llamabase.cli.command import FILE, THREADS, more
from llamabase.cli.progress import step
from llamabase.errors import SettingError, TrimError
from llamabase.files import read_text
from llamabase.llama.context import BATCH, CACHE_TYPES, Cache
from llamabase.llama.model import LOAD_MODES, SPLIT_MODES
from llamabase.llama.rounds import LONGEST
from llamabase.llama.template import RESERVED
from llamabase.sampling.guidance import schema_guide
from llamabase.sampling.settings import DEFAULT, LETTERS, Sampling, samplers_lettered, samplers_named
from runner.draft.contracts import AUTO, FULL, VOCABS
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

LOADING = [field.name for field in fields(LoadOptions)]


def _draft_max(text: str) -> int | None:
    """How many tokens to draft in a round: a number, or auto (None)."""
    return None if text == AUTO else click.IntRange(0, LONGEST)(text)


def _layers(text: str) -> int | None:
    """Layers on the GPU: a number, all (-1 to llama.cpp), or auto (None), which is llama.cpp's default."""
    named = {"auto": None, "all": -1}
    return named[text] if text in named else int(text)


def _context(text: str) -> int:
    """Tokens of context: at least 8, or 0 for as many as the model was trained on."""
    return 0 if text == "0" else int(click.IntRange(8)(text))


def _flash(text: str) -> bool | None:
    """Flash attention in llama.cpp's words: on, off, or auto (None)."""
    words = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False, "auto": None, "-1": None}
    if text not in words:
        raise click.BadParameter(f"{text} is not on, off or auto")
    return words[text]


def _seed(text: str) -> int | None:
    """-1 draws a seed, as leaving it out does."""
    seed = int(click.IntRange(-1)(text))
    return None if seed < 0 else seed


def limit_of(text: str) -> int:
    """Most tokens of an answer; llama.cpp's -1 and -2 are no limit but the context, which no answer outgrows."""
    return sys.maxsize if text in ("-1", "-2") else int(click.IntRange(1)(text))


def draft_max_option(default: str = AUTO) -> Callable[[Any], Any]:
    return click.option(
        "--draft-max",
        "--spec-draft-n-max",
        "draft_max",
        type=_draft_max,
        metavar="AUTO|N",
        default=default,
        show_default=True,
        help="Tokens to draft in a round; 0: none; auto: as many as pay here.",
    )


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several as one, in this order."""
    return lambda command: reduce(lambda found, option: option(found), reversed(options), command)


@dataclass(frozen=True)
class Models(LoadOptions):
    """Which files to run, how to load them and, for a pair of the catalog, what `prepare` made of it."""

    prepared: Prepared | None = None

    def open(self, n_parallel: int = 1) -> Engine:
        """The engine that these options describe, for so many conversations."""
        return Engine(self, n_parallel)


def open_measured(models: Callable[[], Models], measure: bool, n_parallel: int = 1) -> Engine:
    """The engine of the models that are found, which may have to be prepared first; says what it is doing.

    `measure`: what drafting costs here too, rather than while somebody waits for an answer.
    """
    with step("preparing the models"):
        found = models()
    with step("loading the models"):
        engine = found.open(n_parallel)
    if measure:
        try:
            with step("measuring what drafting costs here"):
                engine.measure()
        except BaseException:
            engine.close()
            raise
    return engine


def _placing_options() -> list[Callable[..., Any]]:
    """Where the weights go and how they are loaded: the target's, and the drafter's variants that llama.cpp has."""
    devices: dict[str, Any] = {"metavar": "NAME,...", "type": str}
    overrides: dict[str, Any] = {"metavar": "PATTERN=BUFFER,...", "multiple": True}
    layers: dict[str, Any] = {"metavar": "N", "type": click.IntRange(0), "default": 0}
    return [
        more("-dev", "--device", **devices, help="Devices that take layers; none: the CPU.  [default: all]"),
        more(
            *("-devd", "--device-draft", "--spec-draft-device"), **devices, help="The drafter's.  [default: --device]"
        ),
        more(
            *("-sm", "--split-mode"),
            type=click.Choice([*SPLIT_MODES]),
            default="layer",
            show_default=True,
            help="How several devices share a model.",
        ),
        more("-ts", "--tensor-split", type=_shares, metavar="N0,N1,...", default="", help="Each device's share."),
        more(
            *("-mg", "--main-gpu"),
            type=click.IntRange(-1),
            default=0,
            show_default=True,
            help="The device that takes all of it, with --split-mode none.",
        ),
        more("-ot", "--override-tensor", **overrides, help="Memory for tensors of these names: exps=CPU."),
        more(*("-otd", "--override-tensor-draft", "--spec-draft-override-tensor"), **overrides, help="The drafter's."),
        more("-cmoe", "--cpu-moe", is_flag=True, help="Keep all experts on the CPU."),
        more(*("-cmoed", "--cpu-moe-draft", "--spec-draft-cpu-moe"), is_flag=True, help="The drafter's."),
        more("-ncmoe", "--n-cpu-moe", **layers, help="Keep those of the first N layers there."),
        more(
            *("-ncmoed", "--n-cpu-moe-draft", "--spec-draft-n-cpu-moe", "--spec-draft-ncmoe"),
            **layers,
            help="The drafter's.",
        ),
        more(
            *("-lm", "--load-mode"),
            type=click.Choice([*LOAD_MODES]),
            default="auto",
            show_default=True,
            help="How weights come into memory.",
        ),
        more("--mmap/--no-mmap", default=None, help="The same in llama.cpp's older words."),
        more("--mlock", is_flag=True, help="The same; beside --mmap or --no-mmap."),
    ]


def _shares(text: str) -> tuple[float, ...]:
    """--tensor-split, with commas or slashes as in llama.cpp."""
    try:
        return tuple(map(float, filter(None, re.split(r"[,/]+", text))))
    except ValueError:
        raise click.BadParameter(f"{text} is not a list of proportions, such as 3,1") from None


def _placed(others: dict[str, Any]) -> dict[str, Any]:
    """The fields of LoadOptions for the flags that do not have their form."""
    placed: dict[str, Any] = {}
    for which in ("", "_draft"):
        if others.pop(f"cpu_moe{which}"):
            placed[f"n_cpu_moe{which}"] = -1
        placed[f"override_tensor{which}"] = ",".join(others.pop(f"override_tensor{which}"))
    mmap, mlock = others.pop("mmap"), others.pop("mlock")
    if mmap is not None or mlock:
        if others["load_mode"] != "auto":
            raise click.UsageError("give --load-mode, or --mmap, --no-mmap and --mlock, not both")
        placed["load_mode"] = "+".join(["mmap"] * (mmap is not False) + ["mlock"] * mlock) or "none"
    return placed


def _cache_options(which: str, whose: str) -> list[Callable[..., Any]]:
    """--cache-type-k and -v of one of the two models."""
    return [
        more(
            f"-ct{letter}{which[1:2]}",
            f"--cache-type-{letter}{which}",
            *([f"--spec-draft-type-{letter}"] if which else []),
            f"cache_type_{letter}{which.replace('-', '_')}",
            type=click.Choice(CACHE_TYPES),
            default="f16",
            show_default=True,
            help=f"Type of {whose} KV cache's {name}.",
        )
        for letter, name in (("k", "keys"), ("v", "values"))
    ]


# Flags of llama.cpp's drafting that have no counterpart here, and why.
_UNLIKE = {
    ("--spec-draft-p-min", "--draft-p-min", "--spec-draft-p-split", "--draft-p-split"): (
        "a draft is worth its time or not by measured cost, whatever its probability"
    ),
    ("--spec-draft-n-min", "--draft-min", "--draft-n-min"): "a round drafts as few tokens as pay, down to none",
    ("--spec-type",): "the file given as --model-draft says what kind of drafter it is",
}


def _refused(flags: Sequence[str], why: str) -> Callable[[Any], Any]:
    """A hidden option that says why it is not taken."""

    def refuse(ctx: click.Context, option: click.Parameter, given: Any) -> None:
        if given is not None:
            raise click.UsageError(f"{flags[0]} is not taken: {why}; leave it out")

    return click.option(*flags, hidden=True, expose_value=False, callback=refuse)


def model_options(command: Any) -> Any:
    """--model | --target --draft | -hf -hfd, and how to load them. The command receives `models`, which finds them.

    A pair of the catalog is fetched, trimmed and verified unless that is done.
    """

    @click.option("-m", "--model", metavar="NAME", help=f"A pair of the catalog.  [default: {DEFAULT_MODEL}]")
    @click.option("--target", type=FILE, help="The target's GGUF, instead of --model.")
    @click.option(
        *("-md", "--model-draft", "--spec-draft-model", "--draft", "draft"),
        type=drafter_source,
        metavar="PATH",
        help="The drafter's GGUF, trimmed or not; without it: plain decoding.",
    )
    @hub_options
    @click.option(
        *("-ngl", "--n-gpu-layers", "--gpu-layers", "n_gpu_layers"),
        type=_layers,
        metavar="N|all|auto",
        help="Layers on the GPU.  [default: llama.cpp's]",
    )
    @more(
        *("-ngld", "--n-gpu-layers-draft", "--gpu-layers-draft", "--spec-draft-ngl", "n_gpu_layers_draft"),
        type=_layers,
        metavar="N|all|auto",
        help="The drafter's.  [default: --n-gpu-layers]",
    )
    @_options(*_placing_options())
    @THREADS
    @more(
        *("-td", "--threads-draft", "--spec-draft-threads", "n_threads_draft"),
        type=click.IntRange(1, 512),
        help="The drafter's.  [default: --threads]",
    )
    @click.option(
        *("-c", "--ctx-size", "n_ctx"),
        type=_context,
        metavar="N",
        default="4096",
        show_default=True,
        help="Tokens of context; 0: as many as the model was trained on.",
    )
    @more(
        *("-b", "--batch-size", "n_batch"),
        type=click.IntRange(1),
        metavar="N",
        help="Most tokens of a call, so one more than can be drafted.  [default: --ubatch-size, at least 512]",
    )
    @more(
        *("-ub", "--ubatch-size", "n_ubatch"),
        type=click.IntRange(1),
        metavar="N",
        default=BATCH,
        show_default=True,
        help="Most tokens that are computed together.",
    )
    @more(
        *("-kvo/-nkvo", "--kv-offload/--no-kv-offload", "offload_kqv"),
        default=True,
        show_default=True,
        help="Keep the KV cache of a device's layers there.",
    )
    @more(
        *("-fa", "--flash-attn"),
        type=_flash,
        metavar="on|off|auto",
        default="auto",
        show_default=True,
        help="Flash attention.",
    )
    @more(
        *("-cd", "--draft-ctx", "--ctx-size-draft", "n_ctx_draft"),
        type=click.IntRange(64),
        help="Tokens that the drafter remembers, to save memory.  [default: --ctx-size]",
    )
    @_options(*_cache_options("", "the target's"), *_cache_options("-draft", "the drafter's"))
    @more(
        "--vocab",
        type=click.Choice([FULL, *VOCABS]),
        default=AUTO,
        show_default=True,
        help="What the drafter drafts from: its whole head, the kept rows, those and the tokens of the text, "
        "or the speculator's candidates too. auto: whichever is quickest here, by measured costs.",
    )
    @_options(*(_refused(flags, why) for flags, why in _UNLIKE.items()))
    @wraps(command)
    def with_models(
        model: str | None,
        target: Path | HubModel | None,
        draft: DrafterSource | HubModel | None,
        flash_attn: bool | None,
        **others: Any,
    ) -> Any:
        placed = _placed(others)
        loading = {field: others.pop(field) for field in LOADING if field in others} | placed
        loading["n_threads"] = others.pop("threads")
        for whose in ("", "_draft"):
            keys, values = (others.pop(f"cache_type_{letter}{whose}") for letter in "kv")
            loading[f"cache{whose}"] = Cache(keys, values, flash_attn)
        full = loading["vocab"] == FULL
        if model is not None and (target is not None or draft is not None):
            raise click.UsageError("give --model, a pair of the catalog, or --target with --draft, not both")
        if draft is not None and target is None:
            raise click.UsageError("--draft needs --target, or -hf")
        if full and target is not None:
            raise click.UsageError("--vocab full is for a --model; with --target give the uncut drafter as --draft")

        try:
            unfound = Models(Path(), **loading)
        except SettingError as error:
            raise click.UsageError(str(error)) from error

        def find(instead: Path | None = None) -> Models:
            """The models, or a target given instead of them."""
            if instead is not None:
                return replace(unfound, target=instead)
            if target is not None:
                drafter = local(draft)  # before the target, which takes longer to fetch
                return replace(unfound, target=local(target), draft=drafter)
            prepared = prepare(model or DEFAULT_MODEL)
            quickest = prepared.quickest if loading["vocab"] == AUTO else prepared.trimmed
            drafter = prepared.drafter if full else quickest
            return replace(unfound, target=prepared.target, draft=drafter, prepared=prepared)

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


template_kwargs_option = more(
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
    (("--dry-penalty-last-n",), "dry_penalty_last_n", "Tokens DRY looks back at; 0: none, -1: all."),
    (("--mirostat",), "mirostat", "Refused: it cannot be drawn with shared noise."),
    (("--adaptive-target",), "adaptive_target", "Refused likewise."),
)


def _setting(*flags: str, name: str, help: str) -> Callable[[Any], Any]:
    default = getattr(Sampling(), name)
    least = {"repeat_last_n": -1, "dry_penalty_last_n": -1}.get(name)
    kind = type(default) if least is None else click.IntRange(least)
    hidden = help.startswith("Refused")
    option = click.option if name == "temp" else more
    return option(*flags, name, type=kind, default=default, show_default=True, help=help, hidden=hidden)


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


def _breakers(given: Sequence[str]) -> tuple[str, ...]:
    r"""Sequence breakers as llama.cpp reads them: \n, \t and \r are characters, and none forgets those before it."""
    last = max((i for i, text in enumerate(given) if text == "none"), default=-1)
    return tuple(re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), text) for text in given[last + 1 :])


def sampling_options(command: Any) -> Any:
    """The samplers, the seed and the draft length; the command receives `sampling`, `seed` and `draft_max`."""

    @_options(*(_setting(*flags, name=name, help=text) for flags, name, text in SETTINGS))
    @more(
        "--dry-sequence-breaker",
        "dry_sequence_breakers",
        multiple=True,
        metavar="STRING",
        help="Where a repetition ends, instead of those known; can be repeated; none: nowhere.",
    )
    @more("--samplers", metavar="A;B;...", help="Which samplers, in this order: top_k;temp, say.")
    @more(
        "--sampler-seq",
        "--sampling-seq",
        "sampler_seq",
        metavar="LETTERS",
        help=f"The same in letters.  [default: {''.join(LETTERS[name] for name in DEFAULT)}]",
    )
    @more(
        "-l",
        "--logit-bias",
        multiple=True,
        metavar="TOKEN_ID(+/-)BIAS",
        help="Make a token likelier or rarer: 15043+1, 15043-inf. Can be repeated.",
    )
    @more("--grammar", metavar="GBNF", help="Constrain the answer to a grammar.")
    @more("--grammar-file", type=FILE, help="The grammar in a file.")
    @more("-j", "--json-schema", metavar="SCHEMA", help="Constrain the answer to JSON of a schema.")
    @more("-jf", "--json-schema-file", type=FILE, help="The schema in a file.")
    @click.option("-s", "--seed", type=_seed, metavar="N", help="Same seed, same text; -1, the default: random.")
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
