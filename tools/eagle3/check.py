"""Whether llama.cpp computes what PyTorch does with a head, and how often its drafts are right there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from corpus.answers import TargetAnswer
from gguf_trim.format.state_fed import Eagle3Head
from llamabase.gguf.reader import GGUFFile
from llamabase.llama.context import Context
from llamabase.llama.model import Model
from llamabase.llama.states import PairContext, Recorded
from runner.draft.reading import StateFedReading

from .head import Head, unrolled
from .target import Target
from .training import STEPS


@dataclass
class Drafts:
    """Drafts from places of texts. `counts`: by label, right drafts and drafts (STEPS x 2), as llama.cpp computes them.
    `gaps` and `spreads`: of rows of logits, the greatest difference from PyTorch's and the standard deviation; `same`:
    how many have the same first token in both.
    """

    counts: dict[str, np.ndarray] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)
    same: int = 0

    def lines(self) -> Iterator[str]:
        for label, counts in {"all": sum(self.counts.values()), **self.counts}.items():
            shares = ", ".join(f"{right / max(drafts, 1):.3f}" for right, drafts in counts)
            yield f"{label}: {counts[0, 1]} places; right first, second, third drafts: {shares}"
        if self.gaps:
            yield (
                f"{len(self.gaps)} rows of logits, which spread by {np.mean(self.spreads):.2g}, differ from PyTorch's "
                f"by at most {max(self.gaps):.2g}; {self.same} have the same first token"
            )


@torch.no_grad()
def check(
    path: Path, head: Head, target: Target, file: GGUFFile, answers: list[TargetAnswer], n_compared: int
) -> Drafts:
    """Draft from every place of the answers in llama.cpp, over the target's own states, and compare the logits of the
    first n_compared answers with PyTorch's.
    """
    n_ctx = max(len(answer.prompt) + len(answer.answer) for answer in answers) + 8
    found = Drafts()
    with Model(file.path) as judge, Model(path) as model, Context(judge, n_ctx) as context:
        exported = Eagle3Head.of(GGUFFile(path))
        recorded = Recorded.of(context, file.architecture, exported.layers)
        with PairContext(model, n_ctx, other=context) as pairs:
            for number, answer in enumerate(answers):
                tokens = [*answer.prompt, *answer.answer]
                context.truncate(0)
                context.decode(tokens[:-1], 0)
                reading = StateFedReading(pairs, recorded, exported)
                made: list[torch.Tensor] = []  # PyTorch's states
                if number < n_compared:
                    inputs = torch.from_numpy(recorded.rows[: len(tokens) - 1].copy()).to(target.device)[None]
                    steps = unrolled(head, target, torch.tensor([tokens], device=target.device), inputs, STEPS)
                    made = [head.norm(states, head.output_norm)[0] for states in steps]
                counts = found.counts.setdefault(answer.label, np.zeros((STEPS, 2), int))
                for place in range(max(len(answer.prompt) - 2, 0), len(tokens) - 2):
                    logits, _ = reading.begin(tokens[: place + 2])
                    for step, token in enumerate(tokens[place + 2 : place + 2 + STEPS]):
                        best = int(logits.argmax())
                        if made:
                            mine = target.logits(made[step][place]).cpu().numpy()
                            found.gaps.append(float(np.abs(mine - logits).max()))
                            found.spreads.append(float(logits.std()))
                            found.same += int(mine.argmax()) == best
                        counts[step] += best == token, 1
                        if best != token:
                            break
                        logits, _ = reading.follow(token)
    return found
