"""python -m runner.exact: is the output really the target's, and only the target's?

Batch shape changes floating point: a quantised target's logits for one position differ slightly between a batch of one
and a batch of four, so two correct greedy runs part at near-ties. This check tells near-ties from bugs. For every
prompt, greedily or with the noise of a seed:

1. plain: the target decodes one token a call, in code that shares nothing with the speculative loop;
2. loop: the speculative loop answers, and its rounds are kept;
3. replay: the rounds are decoded again in the same batches on an empty cache; every emitted token must be the argmax of
   its row of scores, that is, of logits after samplers and noise;
4. one pass: the emitted text is read in one batch; no token may score further below the maximum than batch shape alone
   moves scores, which is measured on the same text, read one token a call; a token that a filter such as top-p leaves
   out is counted apart;
5. parting: if the loop's text parts from the plain one, the gap between the two tokens is printed.

`--probe` asks the backend itself, without a drafter: see runner.probe.
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
from typing import Any, NamedTuple

import click
import numpy as np
from click.core import ParameterSource

from corpus.prompts import Prompt, load_prompts, spread
from llamabase.cli.command import FILE, OneCommand
from llamabase.cli.progress import progress, step
from llamabase.errors import TrimError
from llamabase.llama.context import Context
from llamabase.sampling.chain import Chain
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import GREEDY, Sampling
from runner.bench.machine import machine
from runner.draft.contracts import Round
from runner.draft.reading import Reader
from runner.loop.engine import REWINDS, Engine

from .options import Models, model_options, sampling_options
from .probe import probe, probed_table, verdict

MOST = 512  # tokens of an answer, since it is read in one batch


@dataclass(frozen=True)
class Exactness:
    """What one prompt showed. Gaps and noise are in logits."""

    prompt: str
    tokens: int
    replay_faults: int
    gaps: np.ndarray  # one pass: the maximum minus the emitted token's score, by position
    noise: np.ndarray  # of batch shape, by position: how far it moves the two best tokens, whichever was emitted
    parts_at: int | None
    parting_gap: float | None  # None, too, if a filter leaves one of the two tokens out
    drafted: int  # drafts that were verified

    def as_json(self, epsilon: float) -> dict[str, Any]:
        finite = self.gaps[np.isfinite(self.gaps)]
        return {
            "prompt": self.prompt,
            "tokens": self.tokens,
            "drafted": self.drafted,
            "replay_faults": self.replay_faults,
            "greatest_gap": float(finite.max(initial=0)),
            "beyond_noise": int((finite > epsilon).sum()),
            "at_filters_edge": len(self.gaps) - len(finite),
            "parts_at": self.parts_at,
            "parting_gap": self.parting_gap,
        }


@dataclass(frozen=True)
class Law:
    """How the target draws: its samplers, and the seed of the noise if they are not greedy."""

    sampling: Sampling = GREEDY
    seed: int = 0

    def scores(self, chain: Chain, logits: np.ndarray, position: int) -> np.ndarray:
        """One score (float64) per token, such that the token to draw is the argmax; -inf for what samplers leave out.

        Greedily these are the logits with bias and penalties. Otherwise noise is added, and the sum is multiplied by
        the temperature, so that differences are still in logits.
        """
        if self.sampling.sight == 1:
            return chain.logits(logits).astype(np.float64)
        scores, law = np.full(len(logits), -np.inf), chain.distribution(logits)
        gumbel = -np.log(Noise(self.seed).exponentials(position, law.ids))
        scores[law.ids] = self.sampling.temp * (np.log(law.probs) + gumbel)
        return scores


class Batch(NamedTuple):
    """One call of the target: the drafts that follow the last token, and the tokens emitted (None: the argmax)."""

    drafted: Sequence[int] = ()
    emitted: Sequence[int | None] = (None,)


class Lead(NamedTuple):
    """The best token of a position, the second-best one, and by how many logits the best one leads it."""

    best: int
    second: int
    logits: float

    @classmethod
    def of(cls, scores: np.ndarray) -> Lead:
        second, best = map(int, np.argpartition(scores, -2)[-2:])
        return cls(best, second, float(scores[best]) - float(scores[second]))

    def moved(self, scores: np.ndarray) -> float:
        """How far the scores of another batch shape move the lead, or put the best token below another one.

        What cannot be compared, since samplers leave out one of the two tokens, moves nothing.
        """
        best, second = float(scores[self.best]), float(scores[self.second])
        moves = abs(self.logits - (best - second)), float(scores.max()) - best
        return max((move for move in moves if np.isfinite(move)), default=0.0)


def read(
    context: Context, prompt: Sequence[int], batches: Iterable[Batch], law: Law
) -> Iterator[tuple[int, np.ndarray]]:
    """Decode a text in these batches; yields each token with the scores (n_vocab) that precede it."""
    reader, text = Reader(context), list(prompt)
    context.truncate(0)
    if len(prompt) > 1:
        reader.read(prompt[:-1], 0)
    chain = Chain(law.sampling, prompt, context.model, Noise(law.seed))
    for batch in batches:
        logits = reader.verify(text, batch.drafted)
        for row, token in zip(logits, batch.emitted, strict=False):  # an end token may end the batch early
            scores = law.scores(chain, row, len(text))
            text.append(int(scores.argmax()) if token is None else token)
            yield text[-1], scores
            chain.accept(text[-1])  # even if a filter leaves it out here: in another shape it may not
        reader.keep(text, len(text) - 1)


def plain_tokens(
    context: Context, prompt: Sequence[int], n: int, is_end: Callable[[int], bool], law: Law = Law()
) -> list[int]:
    """The tokens of decoding one token a call."""
    tokens = list[int]()
    for token, _ in read(context, prompt, [Batch()] * n, law):
        tokens.append(token)
        if is_end(token):
            break
    return tokens


def replay(context: Context, prompt: Sequence[int], rounds: Sequence[Round], law: Law = Law()) -> int:
    """Decode the rounds again in the loop's own batches; how many emitted tokens are not the argmax."""
    batches = [Batch(round_.drafted, round_.tokens) for round_ in rounds]
    return sum(token != int(scores.argmax()) for token, scores in read(context, prompt, batches, law))


def check_prompt(
    engine: Engine, context: Context, name: str, prompt: list[int], n: int, draft_max: int | None, law: Law = Law()
) -> Exactness:
    """All five steps for one prompt; `context` is a second one over the target with room for n rows of logits."""
    plain = plain_tokens(context, prompt, n, engine.model.is_end, law)
    engine.reader.keep([], 0)  # so that the loop reads the prompt as the replay will
    rounds = list(engine.rounds(prompt, law.sampling, max_tokens=n, draft_max=draft_max, seed=law.seed))
    tokens = [token for round_ in rounds for token in round_.tokens]
    faults = replay(context, prompt, rounds, law)
    leads = [Lead.of(scores) for _, scores in read(context, prompt, [Batch(emitted=[token]) for token in tokens], law)]
    gaps, noise, parting = [], [], None
    parts_at = next((i for i, (a, b) in enumerate(zip(plain, tokens, strict=False)) if a != b), None)
    for i, (token, scores) in enumerate(read(context, prompt, [Batch(tokens[:-1], tokens)], law)):
        gaps.append(scores.max() - scores[token])
        noise.append(leads[i].moved(scores))
        if i == parts_at and np.isfinite(gap := float(scores[plain[i]] - scores[token])):
            parting = gap
    drafted = sum(len(round_.drafted) for round_ in rounds)
    return Exactness(name, len(tokens), faults, np.array(gaps), np.array(noise), parts_at, parting, drafted)


def run_probe(pair: Models, prompts: Sequence[Prompt], max_tokens: int) -> None:
    """Print how far batches of several tokens part from one token at a time, by size, and a record of it."""
    with replace(pair, draft=None).open() as engine, step("comparing batches"):
        ids = (engine.prompt(prompt.messages) for prompt in prompts)
        found = probe(engine.reader, ids, max_tokens, engine.model.is_end)
    card = machine()
    click.echo(f"{probed_table(found)}\n\n{verdict(found, ', '.join(card['backends']))}")
    record = {"machine": card, "target": pair.target.name, "cache": asdict(pair.cache)}
    click.echo(json.dumps(record | {"batches": [asdict(probed) for probed in found]}))


@click.command(cls=OneCommand)
@model_options
@click.option("--prompts", type=FILE, help="JSON lines.  [default: the bundled ones]")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="How many of the prompts.")
@click.option(
    "-n", "--max-tokens", type=click.IntRange(2, MOST), default=128, show_default=True, help="Most per answer."
)
@click.option("--probe", "probing", is_flag=True, help="Only ask whether batches change logits here; one minute.")
@sampling_options
def main(
    models: Callable[[], Models],
    probing: bool,
    sampling: Sampling,
    prompts: Path | None,
    limit: int,
    max_tokens: int,
    draft_max: int | None,
    seed: int | None,
) -> None:
    """Check token by token that the output is the target's; exit 1 for a wrong token.

    Greedily unless --temp is given, and with every sampler that is given. With --probe: whether a token has the same
    logits alone and among others, by batch size, which decides where texts may part from plain decoding's.
    """
    if probing:
        run_probe(models(), spread(load_prompts(prompts), limit), max_tokens)
        return
    if click.get_current_context().get_parameter_source("temp") is ParameterSource.DEFAULT:
        sampling = replace(sampling, temp=0.0)
    law = Law(sampling, seed or 0)
    chosen, pair, results = spread(load_prompts(prompts), limit), models(), []
    with pair.open() as engine:
        context = Context(
            engine.model, engine.context.n_ctx, replace(pair.context_params, n_batch=MOST), max_tokens, REWINDS
        )
        with context, progress("checking", len(chosen), "prompts") as advance:
            for prompt in chosen:
                ids = engine.prompt(prompt.messages)
                results.append(check_prompt(engine, context, prompt.id, ids, max_tokens, draft_max, law))
                advance(1)
    noise = np.concatenate([result.noise for result in results])
    epsilon = float(noise.max())
    rows = [result.as_json(epsilon) for result in results]
    for row in rows:
        parting = "same text"
        if row["parts_at"] is not None:
            gap = "at a filter's edge" if row["parting_gap"] is None else f"gap {row['parting_gap']:+.3f}"
            parting = f"parts at {row['parts_at']}, {gap}"
        click.echo(f"{row['prompt']:14s} {row['tokens']:4d} tokens  greatest gap {row['greatest_gap']:.3f}  {parting}")
    summed = ("tokens", "drafted", "replay_faults", "beyond_noise", "at_filters_edge")
    total = {
        "machine": machine(),
        "target": pair.target.name,
        "draft": pair.draft.name if pair.draft else None,
        "draft_max": draft_max,
        "sampling": asdict(sampling) | {"logit_bias": {str(i): str(bias) for i, bias in sampling.logit_bias.items()}},
        "seed": law.seed,
        **{name: sum(row[name] for row in rows) for name in summed},
        "noise": epsilon,
        "noise_median": float(np.median(noise)),
        "greatest_gap": max(row["greatest_gap"] for row in rows),
        "parted": sum(row["parts_at"] is not None for row in rows),
        "prompts": rows,
    }
    edge = f", and filters leave out {total['at_filters_edge']} tokens" if total["at_filters_edge"] else ""
    click.echo(
        f"{total['tokens']} tokens, {total['drafted']} drafts verified: {total['replay_faults']} tokens are not the "
        f"target's in the loop's own batches; in one pass the greatest gap is {total['greatest_gap']:.3f} and the "
        f"measured noise {epsilon:.3f}{edge}; "
        f"{total['parted']} of {len(rows)} texts part from plain decoding"
    )
    click.echo(json.dumps(total))
    if total["replay_faults"] or total["beyond_noise"]:
        raise TrimError("some tokens are not the target's: this is a bug, please report it with the line above")


if __name__ == "__main__":
    sys.exit(main(prog_name="python -m runner.exact"))
