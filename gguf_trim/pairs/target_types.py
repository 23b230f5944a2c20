"""What the types of a target cost on this machine: one token and four, in each of a few types.

To requantise a whole target takes minutes. So steps are timed of a part that stands for it: its first layers, and the
same share of the rows of its head, with random weights in the types that llama.cpp would choose.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gguf_trim.format.memory_bound import StepWeights
from llamabase.cli.progress import stderr, step
from llamabase.errors import TrimError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import EMBEDDING, HEAD, HEAD_BIAS
from llamabase.gguf.writer import field
from llamabase.llama.library import key_of
from llamabase.llama.timing import Step, by_turns, decode_step, medians, open_context
from llamabase.store import recall, remember

from .shapes import with_random_weights

TYPES = ("Q4_K_M", "Q4_0", "IQ4_NL", "Q8_0")
TOKENS = (1, 4)  # four: a round of three drafts
PART = 128_000_000  # weights: some 70 MB in four bits, so that the next type's part displaces it from any cache
LEAST = 2  # layers: of two, four or eight llama.cpp gives half more bits in Q4_K_M, as it does of a whole model's
ROWS = 256  # the head's rows are a multiple of it, and no fewer: the tokens of a timed step are below it
REPEAT = 5  # steps of each kind, of which the median counts


@dataclass(frozen=True)
class TypeCosts:
    """Seconds by type and number of tokens, of the first `n_layers` of all `n_whole` layers."""

    seconds: dict[str, dict[int, float]]
    n_layers: int
    n_whole: int

    def __str__(self) -> str:
        one = self.seconds[TYPES[0]][1]
        each = [f"{kind} {taken[1] / one:.2f} and {taken[4] / one:.2f}" for kind, taken in self.seconds.items()]
        best = min(self.seconds, key=lambda kind: self.seconds[kind][4])
        part = "all" if self.n_layers == self.n_whole else f"{self.n_layers} of"
        return (
            f"The target's type decides, too. One token and four take here, in units of {TYPES[0]}'s one: "
            f"{', '.join(each)}; {best} is quickest for four (measured on {part} its {self.n_whole} layers and as much "
            "of its head, random weights)."
        )


def type_costs(target: Path, n_threads: int | None = None) -> TypeCosts | None:
    """What the types of a target cost, measured once and remembered; None, with the reason on stderr, if it fails."""
    file = GGUFFile(target)
    key = key_of([target], ["types of a target", *TYPES, n_threads])
    n_whole, n_layers = _layers(file)
    known: Any = recall("types", key).get("seconds")
    try:
        seconds = {kind: {n: float(known[kind][str(n)]) for n in TOKENS} for kind in TYPES}
        if all(taken > 0 for each in seconds.values() for taken in each.values()):
            return TypeCosts(seconds, n_layers, n_whole)
    except (TypeError, LookupError, ValueError):  # nothing is remembered, or it is damaged
        pass
    try:
        with step("measuring what the target's types cost here"):
            seconds = _measured(file, n_layers, n_layers / n_whole, n_threads)
    except TrimError as error:
        stderr.print(f"what the target's types cost is not known: {error}", markup=False)
        return None
    remember("types", key, {"seconds": seconds})
    return TypeCosts(seconds, n_layers, n_whole)


def _layers(file: GGUFFile) -> tuple[int, int]:
    """Layers of a model without its MTP blocks, and how many of them, with as much of the head, have PART weights."""
    arch = file.architecture
    n_whole = file.integer(f"{arch}.block_count") - file.integer(f"{arch}.nextn_predict_layers", 0)
    n_weights = StepWeights.of(file).params_at(file.tensors[EMBEDDING].n_rows)
    n_layers = LEAST
    while n_layers < n_whole and n_weights * n_layers / n_whole < PART:
        n_layers *= 2
    return n_whole, min(n_layers, n_whole)


def part_of(file: GGUFFile, n_layers: int, share: float) -> tuple[list[bytes], dict[str, tuple[int, ...]]]:
    """Metadata and shapes of the first layers of a model and of a share of the rows of its tables."""
    arch, n_blocks = file.architecture, file.integer(f"{file.architecture}.block_count")
    n_vocab = file.tensors[EMBEDDING].n_rows
    n_rows = min(n_vocab, max(ROWS, round(n_vocab * share / ROWS) * ROWS))
    left_out = (f"{arch}.block_count", f"{arch}.vocab_size", f"{arch}.nextn_predict_layers")
    fields = [
        field(f"{arch}.block_count", n_layers),
        field(f"{arch}.vocab_size", n_rows),
        field("tokenizer.ggml.model", "none"),
    ]
    for key in file.fields:
        if key.startswith(("tokenizer.", "split.")) or key in left_out:
            continue
        value = file.get(key)
        of_layers = isinstance(value, np.ndarray) and len(value) == n_blocks and np.issubdtype(value.dtype, np.integer)
        fields.append(field(key, value[:n_layers]) if of_layers else file.raw(key))
    shapes = {}
    for name, tensor in file.tensors.items():
        block = name.split(".")[1] if name.startswith("blk.") else ""
        if not block.isdecimal() or int(block) < n_layers:
            table = name in (EMBEDDING, HEAD, HEAD_BIAS)
            shapes[name] = (*tensor.shape[:-1], n_rows) if table else tensor.shape
    return fields, shapes


def _measured(file: GGUFFile, n_layers: int, share: float, n_threads: int | None) -> dict[str, dict[int, float]]:
    fields, shapes = part_of(file, n_layers, share)
    with tempfile.TemporaryDirectory(prefix="gguf-trim-") as folder, contextlib.ExitStack() as stack:
        steps: dict[tuple[str, int], Step] = {}
        for kind in TYPES:
            path = Path(folder) / f"{kind}.gguf"
            with_random_weights(fields, shapes, path, kind, f"writing a part of the target in {kind}")
            context = open_context(stack, path, n_threads)
            steps |= {(kind, n): decode_step(context, n) for n in TOKENS}
        seconds = medians(by_turns(steps, REPEAT, "timing the target's types"))
    return {kind: {n: seconds[kind, n] for n in TOKENS} for kind in TYPES}
