"""python -m runner.exact: is the output really the target's, and only the target's?

Batch shape changes floating point: on a quantised target the same position has slightly different logits decoded alone
and in a batch of four, so two correct greedy runs part at near-ties. This check tells a near-tie from a bug. For every
prompt, greedily:

1. plain: the target decodes one token at a time, in code that shares nothing with the speculative loop;
2. the speculative loop answers, and its rounds are kept;
3. replay: the kept rounds are decoded again, in the same batch shapes, on an empty cache: every emitted token must be
   the argmax of its row;
4. one pass: the emitted text is read in one batch: no token may lie further below the maximum than the batch-shape
   noise, which is measured apart from the loop, on the plain text (how far the lead of the best token over the second
   moves between one token at a time and one pass);
5. where the loop's text parts from the plain one, the gap between the two tokens is printed.
"""

from __future__ import annotations

from corpus.interrupt import leave_to_the_system

if __name__ == "__main__":
    leave_to_the_system()  # until the command begins; the imports take a while

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from corpus.chain import Chain
from corpus.command import FILE, OneCommand
from corpus.errors import TrimError
from corpus.llama import Context
from corpus.progress import progress
from corpus.prompts import load_prompts
from corpus.sampling import GREEDY, Sampling

from .bench.machine import machine
from .engine import Engine
from .options import Models, model_options, sampling_options
from .speculative import Round

MOST = 512  # tokens that are read in one pass


@dataclass
class Exactness:
    """What one prompt showed. Gaps are logits."""

    prompt: str
    tokens: int
    replay_faults: int
    gaps: np.ndarray  # one pass: maximum minus the emitted token's logit, per position
    noise: np.ndarray  # per position of the plain text
    parts_at: int | None
    parting_gap: float | None

    def as_json(self, epsilon: float) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "tokens": self.tokens,
            "replay_faults": self.replay_faults,
            "greatest_gap": float(self.gaps.max()),
            "beyond_noise": int((self.gaps > epsilon).sum()),
            "parts_at": self.parts_at,
            "parting_gap": self.parting_gap,
        }


@dataclass(frozen=True)
class Top:
    """The two best tokens of a position, and by how much the first leads."""

    first: int
    second: int
    gap: float


def shaped(chain: Chain, logits: np.ndarray) -> np.ndarray:
    """A row of logits with bias and penalties, and -inf for what the grammar forbids."""
    values, ids = chain.logits(logits)
    if ids is None:
        return values
    row = np.full(len(logits), -np.inf, np.float32)
    row[ids] = values
    return row


def plain_greedy(
    context: Context,
    prompt: Sequence[int],
    n: int,
    is_end: Callable[[int], bool],
    sampling: Sampling = GREEDY,
) -> tuple[list[int], list[Top]]:
    """Greedy decoding, one token a call: the tokens, and the two best of each position."""
    chain = Chain(sampling, prompt, context.model)
    context.truncate(0)
    if len(prompt) > 1:
        context.decode(prompt[:-1], 0)
    tokens: list[int] = []
    best: list[Top] = []
    token = prompt[-1]
    while len(tokens) < n:
        logits = shaped(chain, context.decode([token])[0])
        token = int(np.argmax(logits))
        second = next(int(i) for i in np.argpartition(logits, -2)[-2:] if i != token)
        best.append(Top(token, second, float(logits[token] - logits[second])))
        tokens.append(token)
        chain.accept(token)
        if is_end(token):
            break
    return tokens, best


def one_pass(context: Context, prompt: Sequence[int], tokens: Sequence[int], sampling: Sampling = GREEDY) -> np.ndarray:
    """Logits (len(tokens) x n_vocab) before each of `tokens`, all in one batch."""
    chain = Chain(sampling, prompt, context.model)
    context.truncate(0)
    if len(prompt) > 1:
        context.decode(prompt[:-1], 0)
    rows = context.decode([prompt[-1], *tokens[:-1]], len(tokens))
    for row, token in zip(rows, tokens, strict=True):
        row[:] = shaped(chain, row)
        chain.accept(token)
    return rows


def replay(context: Context, prompt: Sequence[int], rounds: Sequence[Round], sampling: Sampling = GREEDY) -> int:
    """Decode the rounds again in the shapes the loop used; how many emitted tokens are not the argmax."""
    chain = Chain(sampling, prompt, context.model)
    context.truncate(0)
    if len(prompt) > 1:
        context.decode(prompt[:-1], 0)
    last, position, faults = prompt[-1], len(prompt) - 1, 0
    for round_ in rounds:
        logits = context.decode([last, *round_.drafted], len(round_.drafted) + 1)
        for row, token in zip(logits, round_.tokens, strict=False):
            faults += int(np.argmax(shaped(chain, row))) != token
            chain.accept(token)
        position += len(round_.tokens)
        last = round_.tokens[-1]
        context.truncate(position)
    return faults


def check_prompt(
    engine: Engine,
    context: Context,
    name: str,
    prompt: list[int],
    n: int,
    draft_max: int | None,
    sampling: Sampling = GREEDY,
) -> Exactness:
    """All five steps for one prompt; `context` is a second one over the target with room for n rows of logits."""
    plain, best = plain_greedy(context, prompt, n, engine.model.is_end, sampling)
    engine.reader.keep([], 0)  # so that the loop reads the prompt as the replay will
    rounds = list(engine.rounds(prompt, sampling, max_tokens=n, draft_max=draft_max))
    tokens = [token for round_ in rounds for token in round_.tokens]
    faults = replay(context, prompt, rounds, sampling)
    logits = one_pass(context, prompt, plain, sampling)
    leads = [(top.gap, row[top.first] - row[top.second]) for row, top in zip(logits, best, strict=True)]
    # Where a grammar leaves one token, there is no second to lead over.
    noise = np.array([abs(a - b) for a, b in leads if np.isfinite([a, b]).all()] or [0.0])
    logits = one_pass(context, prompt, tokens, sampling)
    gaps = logits.max(axis=1) - logits[np.arange(len(tokens)), tokens]
    parts_at = next((i for i, (a, b) in enumerate(zip(plain, tokens, strict=False)) if a != b), None)
    parting = (
        None if parts_at is None else float(logits[parts_at][plain[parts_at]] - logits[parts_at][tokens[parts_at]])
    )
    return Exactness(name, len(tokens), faults, gaps, noise, parts_at, parting)


@click.command(cls=OneCommand)
@model_options
@click.option("--prompts", type=FILE, help="JSON lines.  [default: the bundled ones]")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="How many of the prompts.")
@click.option(
    "-n", "--max-tokens", type=click.IntRange(2, MOST), default=128, show_default=True, help="Most per answer."
)
@sampling_options
def main(
    models: Callable[[], Models],
    sampling: Sampling,
    prompts: Path | None,
    limit: int,
    max_tokens: int,
    draft_max: int | None,
    seed: int | None,
) -> None:
    """Check greedy exactness token by token, also with penalties, bias or a grammar; exit 1 for a wrong token.

    The other samplers are left out: of greedy text they can only say that it is not the likeliest token that follows.
    """
    sampling = replace(sampling, temp=0.0, typical_p=1.0)
    chosen = load_prompts(prompts, limit)
    found = models()
    results = []
    with (
        found.open() as engine,
        Context(
            engine.model, engine.context.n_ctx, found.n_threads, n_outputs=max_tokens, cache=found.cache
        ) as context,
        progress("checking", len(chosen), "prompts") as advance,
    ):
        for prompt in chosen:
            ids = engine.prompt(prompt.messages)
            results.append(check_prompt(engine, context, prompt.id, ids, max_tokens, draft_max, sampling))
            advance(1)
    epsilon = float(max(result.noise.max() for result in results))
    rows = [result.as_json(epsilon) for result in results]
    for row in rows:
        parting = (
            "same text" if row["parts_at"] is None else f"parts at {row['parts_at']}, gap {row['parting_gap']:+.3f}"
        )
        click.echo(f"{row['prompt']:14s} {row['tokens']:4d} tokens  greatest gap {row['greatest_gap']:.3f}  {parting}")
    total = {
        "machine": machine(),
        "target": found.target.name,
        "draft": found.draft.name if found.draft else None,
        "draft_max": draft_max,
        "tokens": sum(row["tokens"] for row in rows),
        "replay_faults": sum(row["replay_faults"] for row in rows),
        "noise": epsilon,
        "noise_median": float(np.median(np.concatenate([result.noise for result in results]))),
        "greatest_gap": max(row["greatest_gap"] for row in rows),
        "beyond_noise": sum(row["beyond_noise"] for row in rows),
        "parted": sum(row["parts_at"] is not None for row in rows),
        "prompts": rows,
    }
    click.echo(
        f"{total['tokens']} tokens: {total['replay_faults']} are not the argmax in the loop's own batch shapes; in one "
        f"pass the greatest gap is {total['greatest_gap']:.3f} and the measured noise {epsilon:.3f}; "
        f"{total['parted']} of {len(rows)} texts part from plain decoding"
    )
    click.echo(json.dumps(total))
    if total["replay_faults"] or total["beyond_noise"]:
        raise TrimError("some tokens are not the target's: this is a bug, please report it with the line above")


if __name__ == "__main__":
    sys.exit(main(prog_name="python -m runner.exact"))
