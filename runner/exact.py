"""python -m runner.exact: is the output really the target's, and only the target's?

Batch shape changes floating point: on a quantised target the same position has slightly different logits decoded alone
and in a batch of four, so two correct greedy runs part at near-ties. This check tells a near-tie from a bug. For every
prompt, greedily or with the noise of a seed:

1. plain: the target decodes one token at a time, in code that shares nothing with the speculative loop;
2. the speculative loop answers, and its rounds are kept;
3. replay: the kept rounds are decoded again, in the same batch shapes, on an empty cache: every emitted token must be
   the argmax of its row, as the samplers and the noise make it;
4. one pass: the emitted text is read in one batch: no token may lie further below the maximum than the batch-shape
   noise, which is measured apart from the loop, on the plain text (between one token at a time and one pass, how far
   the lead of the best token over the second moves, and how far it falls below whichever is the best then); where a
   filter such as top-p leaves a token out in one shape and not in another, it is counted, too;
5. where the loop's text parts from the plain one, the gap between the two tokens is printed.
"""

from __future__ import annotations

from llamabase.cli.interrupt import leave_to_the_system

if __name__ == "__main__":
    leave_to_the_system()  # until the command begins; the imports take a while

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource

from corpus.prompts import load_prompts, spread
from llamabase.cli.command import FILE, OneCommand
from llamabase.cli.progress import progress
from llamabase.errors import TrimError
from llamabase.llama.context import Context
from llamabase.sampling.chain import Chain
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import GREEDY, Sampling
from runner.bench.machine import machine
from runner.loop.engine import REWINDS, Engine
from runner.loop.speculative import Round

from .options import Models, model_options, sampling_options

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
    parting_gap: float | None  # None, too, where a filter leaves one of the two tokens out

    def as_json(self, epsilon: float) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "tokens": self.tokens,
            "replay_faults": self.replay_faults,
            "greatest_gap": float(self.gaps.max(initial=0, where=np.isfinite(self.gaps))),
            "beyond_noise": int((self.gaps[np.isfinite(self.gaps)] > epsilon).sum()),
            "at_filters_edge": int(np.isinf(self.gaps).sum()),
            "parts_at": self.parts_at,
            "parting_gap": self.parting_gap,
        }


@dataclass(frozen=True)
class Law:
    """How the target draws: its samplers, and the seed of the noise where they are not greedy."""

    sampling: Sampling = GREEDY
    seed: int = 0

    def scores(self, chain: Chain, logits: np.ndarray, position: int) -> np.ndarray:
        """A row of logits made so that the token to draw is its argmax; -inf for what the samplers leave out.

        Greedily that is the row with bias and penalties. Otherwise the noise is added, times the temperature, so that
        differences are logits still.
        """
        if self.sampling.sight == 1:
            return chain.logits(logits).astype(np.float64)
        row = np.full(len(logits), -np.inf)
        law = chain.distribution(logits)
        gumbel = -np.log(Noise(self.seed).exponentials(position, law.ids))
        row[law.ids] = self.sampling.temp * (np.log(law.probs) + gumbel)
        return row


def read(
    context: Context,
    prompt: Sequence[int],
    batches: Iterable[tuple[Sequence[int], Sequence[int | None]]],
    law: Law,
) -> Iterator[tuple[int, np.ndarray]]:
    """Each token of a text and the scores (n_vocab) before it, where the target decodes in these batches.

    A batch is the tokens that follow the last one into the target, and those that it says then: None for the argmax.
    """
    context.truncate(0)
    if len(prompt) > 1:
        context.decode(prompt[:-1], 0)
    chain = Chain(law.sampling, prompt, context.model, Noise(law.seed))
    last, position = prompt[-1], len(prompt)
    for drafted, said in batches:
        logits = context.decode([last, *drafted], len(drafted) + 1)
        for row, token in zip(logits, said, strict=False):  # after an end token nothing is said
            scores = law.scores(chain, row, position)
            last = int(scores.argmax()) if token is None else token
            yield last, scores
            # What a filter leaves out here, and did not in another shape, can be drawn all the same.
            chain.accept(last)
            position += 1
        context.truncate(position - 1)


def plain_tokens(
    context: Context, prompt: Sequence[int], n: int, is_end: Callable[[int], bool], law: Law = Law()
) -> tuple[list[int], list[tuple[int, float]]]:
    """Decoding one token a call: the tokens, and of each position the second best and by how much the best leads."""
    tokens: list[int] = []
    seconds: list[tuple[int, float]] = []
    for token, scores in read(context, prompt, [((), (None,))] * n, law):
        second = next(int(i) for i in np.argpartition(scores, -2)[-2:] if i != token)
        seconds.append((second, float(scores[token] - scores[second])))
        tokens.append(token)
        if is_end(token):
            break
    return tokens, seconds


def replay(context: Context, prompt: Sequence[int], rounds: Sequence[Round], law: Law = Law()) -> int:
    """Decode the rounds again in the shapes the loop used; how many emitted tokens are not the argmax."""
    batches = [(round_.drafted, round_.tokens) for round_ in rounds]
    return sum(token != int(scores.argmax()) for token, scores in read(context, prompt, batches, law))


def check_prompt(
    engine: Engine,
    context: Context,
    name: str,
    prompt: list[int],
    n: int,
    draft_max: int | None,
    law: Law = Law(),
) -> Exactness:
    """All five steps for one prompt; `context` is a second one over the target with room for n rows of logits."""
    plain, seconds = plain_tokens(context, prompt, n, engine.model.is_end, law)
    engine.reader.keep([], 0)  # so that the loop reads the prompt as the replay will
    rounds = list(engine.rounds(prompt, law.sampling, max_tokens=n, draft_max=draft_max, seed=law.seed))
    tokens = [token for round_ in rounds for token in round_.tokens]
    faults = replay(context, prompt, rounds, law)
    noise = []
    one_pass = read(context, prompt, [(plain[:-1], plain)], law)
    for (token, scores), (second, lead) in zip(one_pass, seconds, strict=True):
        moved = abs(lead - (float(scores[token]) - float(scores[second])))
        below = float(scores.max()) - float(scores[token])
        finite = [each for each in (moved, below) if np.isfinite(each)]  # samplers may leave out one, or the second
        noise += [max(finite)] if finite else []
    gaps, parts_at, parting = [], None, None
    for i, (token, scores) in enumerate(read(context, prompt, [(tokens[:-1], tokens)], law)):
        gaps.append(scores.max() - scores[token])
        if parts_at is None and i < len(plain) and plain[i] != token:
            gap = float(scores[plain[i]] - scores[token])
            parts_at, parting = i, gap if np.isfinite(gap) else None
    return Exactness(name, len(tokens), faults, np.array(gaps), np.array(noise or [0.0]), parts_at, parting)


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
    """Check token by token that the output is the target's; exit 1 for a wrong token.

    Greedily unless --temp is given, and with every sampler that is given.
    """
    if click.get_current_context().get_parameter_source("temp") is ParameterSource.DEFAULT:
        sampling = replace(sampling, temp=0.0)
    law = Law(sampling, seed or 0)
    chosen = spread(load_prompts(prompts), limit)
    found = models()
    results = []
    with (
        found.open() as engine,
        Context(
            engine.model,
            engine.context.n_ctx,
            found.n_threads,
            n_outputs=max_tokens,
            cache=found.cache,
            rewinds=REWINDS,
        ) as context,
        progress("checking", len(chosen), "prompts") as advance,
    ):
        for prompt in chosen:
            ids = engine.prompt(prompt.messages)
            results.append(check_prompt(engine, context, prompt.id, ids, max_tokens, draft_max, law))
            advance(1)
    epsilon = float(max(result.noise.max() for result in results))
    rows = [result.as_json(epsilon) for result in results]
    for row in rows:
        parting = "same text"
        if row["parts_at"] is not None:
            gap = "at a filter's edge" if row["parting_gap"] is None else f"gap {row['parting_gap']:+.3f}"
            parting = f"parts at {row['parts_at']}, {gap}"
        click.echo(f"{row['prompt']:14s} {row['tokens']:4d} tokens  greatest gap {row['greatest_gap']:.3f}  {parting}")
    summed = ("tokens", "replay_faults", "beyond_noise", "at_filters_edge")
    total = {
        "machine": machine(),
        "target": found.target.name,
        "draft": found.draft.name if found.draft else None,
        "draft_max": draft_max,
        "sampling": asdict(sampling) | {"logit_bias": {str(i): str(bias) for i, bias in sampling.logit_bias.items()}},
        "seed": law.seed,
        **{name: sum(row[name] for row in rows) for name in summed},
        "noise": epsilon,
        "noise_median": float(np.median(np.concatenate([result.noise for result in results]))),
        "greatest_gap": max(row["greatest_gap"] for row in rows),
        "parted": sum(row["parts_at"] is not None for row in rows),
        "prompts": rows,
    }
    edge = f", where filters leave {total['at_filters_edge']} out" if total["at_filters_edge"] else ""
    click.echo(
        f"{total['tokens']} tokens: {total['replay_faults']} are not the target's in the loop's own batch shapes; in "
        f"one pass the greatest gap is {total['greatest_gap']:.3f} and the measured noise {epsilon:.3f}{edge}; "
        f"{total['parted']} of {len(rows)} texts part from plain decoding"
    )
    click.echo(json.dumps(total))
    if total["replay_faults"] or total["beyond_noise"]:
        raise TrimError("some tokens are not the target's: this is a bug, please report it with the line above")


if __name__ == "__main__":
    sys.exit(main(prog_name="python -m runner.exact"))
