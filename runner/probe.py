"""Batch invariance: has a token the same logits alone as among others? `python -m runner.exact --probe` asks.

Backends multiply one row and several with different kernels, whose sums may round differently. Only if they do not is
the text with drafts always that of plain decoding; otherwise the two may part at near-ties.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llamabase.llama.rounds import LONGEST
from runner.bench.report import table
from runner.draft.reading import Reader

BLOCK = LONGEST + 1  # tokens that are read one at a time, then in batches of every size: no round is larger
PATIENCE = 45  # seconds after which no reading begins, so that all of it takes a minute


@dataclass(frozen=True)
class Probed:
    """The logits of batches of one size, beside those of the same tokens read one at a time."""

    batch: int  # tokens
    rows: int  # of logits that were compared
    equal: int  # rows that are equal bit for bit
    median: float  # over rows: the greatest difference of a logit, as a fraction of the range of the row's logits
    greatest: float
    other_best: int  # rows whose best token is another one


def probe(
    reader: Reader, prompts: Iterable[Sequence[int]], n: int, is_end: Callable[[int], bool], patience: float = PATIENCE
) -> list[Probed]:
    """Read greedy answers of about n tokens to the prompts, block by block, until `patience` seconds have passed.

    Sizes of which nothing was read by then are left out.
    """
    deadline = time.perf_counter() + patience
    apart: dict[int, list[float]] = {batch: [] for batch in range(1, min(BLOCK, reader.context.n_outputs) + 1)}
    other = dict.fromkeys(apart, 0)
    for text, tokens, alone in _blocks(reader, prompts, n, is_end):
        for batch in apart:
            if time.perf_counter() > deadline:
                break
            for logits, wanted in zip(_in_batches(reader, text, tokens, batch), alone, strict=False):
                apart[batch].append(float(np.abs(logits - wanted).max() / np.ptp(wanted)))
                other[batch] += int(logits.argmax() != wanted.argmax())
        if time.perf_counter() > deadline:
            break
    return [
        Probed(batch, len(rows), rows.count(0.0), float(np.median(rows)), max(rows), other[batch])
        for batch, rows in apart.items()
        if rows
    ]


def _blocks(
    reader: Reader, prompts: Iterable[Sequence[int]], n: int, is_end: Callable[[int], bool]
) -> Iterator[tuple[list[int], list[int], list[np.ndarray]]]:
    """A text, the BLOCK tokens that follow it in greedy decoding, and the logits of each, from one token a call."""
    for prompt in prompts:
        text, tokens = list(prompt), list[int]()
        while len(text) < len(prompt) + n and not any(map(is_end, tokens)):
            reader.read_prompt(text)
            tokens, alone = [], []
            for _ in range(BLOCK):
                alone.append(reader.verify([*text, *tokens], ())[0].copy())
                tokens.append(int(alone[-1].argmax()))
            yield text, tokens, alone
            text = text + tokens


def _in_batches(reader: Reader, text: Sequence[int], tokens: Sequence[int], batch: int) -> Iterator[np.ndarray]:
    """The logits (n_vocab, a view until the next) that precede each token, from as many full batches as there are."""
    reader.read_prompt(text)
    text = list(text)
    for i in range(0, len(tokens) - batch + 1, batch):
        yield from reader.verify(text, tokens[i : i + batch - 1])
        text += tokens[i : i + batch]


def verdict(found: Sequence[Probed], backends: str) -> str:
    """What the probe means for "the same text", in a sentence or two; `backends` is what was computed on."""
    if not found:
        return f"{backends}: no batch was read within {PATIENCE} seconds, so nothing is known."
    rows, other = sum(p.rows for p in found), sum(p.other_best for p in found)
    if all(p.equal == p.rows for p in found):
        return (
            f"{backends}: in {rows} rows of batches of up to {found[-1].batch} tokens each token has the logits, bit "
            "for bit, that it has alone: as far as these texts go, the text with drafts is plain decoding's."
        )
    greatest = max(p.greatest for p in found)
    twice = "" if found[0].equal == found[0].rows else " One token read twice differs, too, so plain texts may part."
    return (
        f"{backends}: batches move a logit by up to {greatest:.3%} of the logits' range, and {other} of {rows} rows "
        "have another best token: each token is the target's, but with drafts a text may part from plain decoding's."
        f"{twice}"
    )


def probed_table(found: Sequence[Probed]) -> str:
    rows = [
        [str(p.batch), str(p.rows), str(p.equal), f"{p.median:.3%}", f"{p.greatest:.3%}", str(p.other_best)]
        for p in found
    ]
    return table(["batch", "rows", "equal", "median apart, of range", "most apart", "other best token"], rows)
