"""Proof that a cut is right: the same bytes (structure) and the same logits at the kept ids (behaviour).

This check, not a list of names, decides whether an architecture is supported: a graph that scales or looks at its
token inputs differently shows up here as a difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamabase.errors import FileFormatError, VocabularyMismatch
from llamabase.files import CHUNK
from llamabase.gguf_file import GGUFFile, Tensor
from llamabase.llama import Context, Model
from llamabase.progress import progress
from llamabase.vocabulary import Vocabulary, require_same

from .companion import Trimmed
from .cut import why_not
from .layout import EMBEDDING, HEAD, HEAD_BIAS

PROMPT = (
    "The quick brown fox jumps over the lazy dog. Der schnelle braune Fuchs springt. 敏捷的棕色狐狸跳过懒狗。\n"
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n"
    "Ответ: 3.14159 * 2 = 6.28318; naïve café, $42.50 — «quoted»."
)


@dataclass(frozen=True)
class Verification:
    """`differences` holds one sentence per fault found; empty means proven."""

    kept: int
    positions: int
    max_logit_difference: float | None
    logit_range: float | None
    differences: list[str]

    @property
    def ok(self) -> bool:
        return not self.differences


def verify(trimmed: Path, source: Path) -> Verification:
    """Compare a trimmed drafter with the drafter it was cut from, with a bar.

    Raises FileFormatError where a file cannot be opened; what differs between two readable files is in the result.
    """
    cut, original = Trimmed.open(trimmed), GGUFFile(source)
    if (reason := why_not(original)) is not None:
        raise FileFormatError(f"{original.path}: is no --source to verify with: {reason}")
    with progress("verifying", sum(tensor.n_bytes for tensor in original.tensors.values()), "B") as advance:
        differences = _structure(cut, original, advance)
    if differences:  # logits of files that differ say nothing more
        return Verification(len(cut.d2t), 0, None, None, differences)
    return _behaviour(cut, original)


def _structure(cut: Trimmed, original: GGUFFile, advance: Callable[[float], object]) -> list[str]:
    differences: list[str] = []
    try:
        require_same(Vocabulary(original), cut.vocabulary)
    except VocabularyMismatch as mismatch:
        return [str(mismatch)]
    rows_cut = {EMBEDDING, HEAD, HEAD_BIAS}
    if missing := original.tensors.keys() ^ cut.file.tensors.keys():
        return [f"tensors {', '.join(sorted(missing))} are in one of {original.path.name}, {cut.file.path.name} only"]
    for name, tensor in original.tensors.items():
        rows = cut.d2t if name in rows_cut else None
        differences += _same_bytes(original, tensor, cut.file, cut.file.tensors[name], rows)
        if rows is not None:
            full = cut.companion.tensors.get(name)
            differences += (
                [f"{cut.companion.path}: lacks {name}"]
                if full is None
                else _same_bytes(original, tensor, cut.companion, full, None)
            )
        advance(tensor.n_bytes)
    arch = original.architecture
    for key in original.fields:
        if key.startswith("tokenizer.") or key == f"{arch}.vocab_size":
            continue
        if key not in cut.file.fields or cut.file.raw(key) != original.raw(key):
            differences.append(f"{cut.file.path}: metadata {key} differs from the source's")
    return differences


def _same_bytes(a: GGUFFile, x: Tensor, b: GGUFFile, y: Tensor, rows: np.ndarray | None) -> list[str]:
    """Whether b's tensor y holds exactly the rows (all of them for None) of a's tensor x, read in chunks."""
    count = x.shape[-1]
    wanted = np.arange(count) if rows is None else rows
    if y.type != x.type or y.shape != (*x.shape[:-1], len(wanted)):
        return [f"{b.path}: {y.name} is {y.type.name} {list(y.shape)}, not {len(wanted)} rows of {x.type.name}"]
    row_bytes = x.n_bytes // count
    source = np.memmap(a.path, np.uint8, "r", x.offset, (count, row_bytes))
    result = np.memmap(b.path, np.uint8, "r", y.offset, (len(wanted), row_bytes))
    step = max(1, CHUNK // row_bytes)
    for start in range(0, len(wanted), step):
        ids = wanted[start : start + step]
        expected = source[ids[0] : ids[-1] + 1] if rows is None else source[ids]
        unequal = np.flatnonzero((expected != result[start : start + step]).any(axis=1))
        if len(unequal):
            row = start + int(unequal[0])
            return [f"{b.path}: row {row} of {y.name} is not row {int(wanted[row])} of the source"]
    return []


def _behaviour(cut: Trimmed, original: GGUFFile) -> Verification:
    """One prompt through both: logits may differ by rounding, if at all."""
    with Model(original.path) as model:
        prompt = model.tokenize(PROMPT)
        with Context(model, n_ctx=len(prompt) + 8, n_outputs=len(prompt)) as context:
            expected = context.decode(prompt, outputs=len(prompt))[:, cut.d2t].copy()
    with Model(cut.file.path) as model:
        vectors = cut.embeddings().rows(prompt)
        with Context(model, n_ctx=len(prompt) + 8, n_outputs=len(prompt)) as context:
            found = context.decode(vectors, outputs=len(prompt)).copy()
    gaps = np.abs(expected - found)
    greatest = float(gaps.max())
    spread = float(expected.max() - expected.min())
    differences = []
    if not greatest <= 1e-5 * spread:  # also where it is not a number
        position, row = (int(i) for i in np.argwhere(~(gaps <= 1e-5 * spread))[0])
        differences.append(
            f"{cut.file.path}: at position {position} the logit of token {int(cut.d2t[row])} is "
            f"{found[position, row]:.6f} and the source's {expected[position, row]:.6f}"
        )
    return Verification(len(cut.d2t), len(prompt), greatest, spread, differences)
