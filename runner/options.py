"""Options that several commands share, each declared once, named as llama.cpp names them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from corpus.command import FILE
from corpus.sampling import Sampling
from gguf_trim.prepare import DEFAULT_MODEL, Prepared, prepare

from .drafter import AUTO, VOCABS
from .engine import LONGEST, Engine

FULL = "full"


class DraftMax(click.ParamType):  # type: ignore[type-arg]
    """How many tokens to draft in a round: a number, or auto (None)."""

    name = "auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value == AUTO:
            return None
        return click.IntRange(0, LONGEST).convert(value, param, ctx)


def draft_max_option(default: str = AUTO) -> Callable[[Any], Any]:
    return click.option(
        "--draft-max",
        type=DraftMax(),
        default=default,
        show_default=True,
        help="Tokens to draft in a round; 0 is plain decoding; auto: as many as pay here, by measured costs.",
    )


def _stack(command: Any, options: list[Callable[..., Any]]) -> Any:
    for option in reversed(options):
        command = option(command)
    return command


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

    def open(self, draft: Path | None = None) -> Engine:
        """The engine these options describe; `draft` overrides its drafter."""
        return Engine(
            self.target,
            draft or self.draft,
            n_ctx=self.n_ctx,
            n_threads=self.n_threads,
            n_gpu_layers=self.n_gpu_layers,
            vocab=self.vocab,
        )


def model_options(command: Any) -> Any:
    """--model | --target --draft, and how to load them; the command receives `models`, a function that finds them.

    A pair of the catalog is fetched, trimmed and verified where that has not been done yet.
    """

    @wraps(command)
    def with_models(
        model: str | None,
        target: Path | None,
        draft: Path | None,
        n_gpu_layers: int | None,
        threads: int | None,
        ctx_size: int,
        vocab: str,
        **others: Any,
    ) -> Any:
        if model is not None and (target is not None or draft is not None):
            raise click.UsageError("give --model, or --target with --draft, not both")
        if draft is not None and target is None:
            raise click.UsageError("--draft needs --target")
        if vocab == FULL and target is not None:
            raise click.UsageError("--vocab full is for a --model; with --target give the uncut drafter as --draft")

        def find(instead: Path | None = None) -> Models:
            """The models, or a target given instead of them."""
            if instead is not None:
                return Models(instead, None, None, ctx_size, threads, n_gpu_layers, vocab)
            prepared = prepare(model or DEFAULT_MODEL) if target is None else None
            files = (target, draft)
            if prepared:
                files = (prepared.target, prepared.drafter if vocab == FULL else prepared.trimmed)
            return Models(Path(str(files[0])), files[1], prepared, ctx_size, threads, n_gpu_layers, vocab)

        return command(models=find, **others)

    return _stack(
        with_models,
        [
            click.option("--model", metavar="NAME", help=f"A pair of the catalog.  [default: {DEFAULT_MODEL}]"),
            click.option("--target", type=FILE, help="The target's GGUF, instead of --model."),
            click.option("--draft", type=FILE, help="The drafter's GGUF, trimmed or not; without it: plain decoding."),
            click.option("-ngl", "--n-gpu-layers", type=int, help="Layers on the GPU.  [default: llama.cpp's]"),
            click.option(
                "-t", "--threads", type=click.IntRange(1, 512), help="Threads.  [default: as many as physical cores]"
            ),
            click.option(
                "-c", "--ctx-size", type=click.IntRange(8), default=4096, show_default=True, help="Tokens of context."
            ),
            click.option(
                "--vocab",
                type=click.Choice([FULL, *VOCABS]),
                default=AUTO,
                show_default=True,
                help="What the drafter drafts from: its whole head, the kept rows, those and the tokens of the text, "
                "or the speculator's candidates too. auto: the last its files allow.",
            ),
        ],
    )


def sampling_options(command: Any) -> Any:
    """The samplers, the seed and the draft length; the command receives `sampling`, `seed` and `draft_max`."""

    @wraps(command)
    def with_sampling(temp: float, top_k: int, top_p: float, min_p: float, **others: Any) -> Any:
        for name, value in (("temp", temp), ("top-p", top_p), ("min-p", min_p)):
            if not math.isfinite(value):
                raise click.UsageError(f"--{name} {value}: is not a number to sample with")
        return command(sampling=Sampling(temp, top_k, top_p, min_p), **others)

    default = Sampling()
    return _stack(
        with_sampling,
        [
            click.option(
                "--temp", type=float, default=default.temp, show_default=True, help="Temperature; 0 is greedy."
            ),
            click.option("--top-k", type=int, default=default.top_k, show_default=True, help="0 switches it off."),
            click.option("--top-p", type=float, default=default.top_p, show_default=True, help="1 switches it off."),
            click.option("--min-p", type=float, default=default.min_p, show_default=True, help="0 switches it off."),
            click.option("-s", "--seed", type=click.IntRange(0), help="Same seed, same text.  [default: random]"),
            draft_max_option(),
        ],
    )
