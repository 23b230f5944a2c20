"""Proof that a cut is right: the same bytes (structure) and the same logits at the kept ids (behaviour).

This check, not a list of names, decides whether an architecture is supported: a graph that scales or looks at its
token inputs differently shows up here as a difference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gguf_trim.format.companion import Trimmed
from gguf_trim.format.mtp import MTP, MtpBlock, kept_rows
from gguf_trim.format.state_fed import D2T, EAGLE3, STATE_FED, StateFedHead, row_by_id
from llamabase.cli.progress import progress
from llamabase.errors import FileFormatError, VocabularyMismatch
from llamabase.files import CHUNK
from llamabase.gguf.reader import GGUFFile, Tensor
from llamabase.gguf.tensors import EMBEDDING, HEAD, HEAD_BIAS, head_tensor
from llamabase.gguf.vocabulary import Vocabulary, require_same
from llamabase.llama.context import Context
from llamabase.llama.model import Model
from llamabase.llama.states import PairContext

from .cut import why_not

PAIRS = 24  # that are read with both heads
PROMPT = (
    "The quick brown fox jumps over the lazy dog. Der schnelle braune Fuchs springt. 敏捷的棕色狐狸跳过懒狗。\n"
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n"
    "Ответ: 3.14159 * 2 = 6.28318; naïve café, $42.50 — «quoted»."
)


@dataclass(frozen=True)
class Proof:
    """`differences` holds one sentence per fault found; empty means proven."""

    kept: int
    positions: int
    max_logit_difference: float | None
    logit_range: float | None
    differences: list[str]

    @property
    def ok(self) -> bool:
        return not self.differences


def prove(trimmed: Path, source: Path, target: Path | None = None) -> Proof:
    """Compare a trimmed drafter with the drafter it was cut from, with a bar; `target`: of a head that hangs on one.

    Rows for an MTP block were cut from the target itself.

    Raises FileFormatError where a file cannot be opened; what differs between two readable files is in the result.
    """
    cut, original = Trimmed.open(trimmed), GGUFFile(source)
    mtp = cut.file.architecture == MTP
    if (reason := why_not(original, mtp)) is not None:
        raise FileFormatError(f"{original.path}: is no --source to verify with: {reason}")
    with progress("verifying", sum(tensor.n_bytes for tensor in original.tensors.values()), "B") as advance:
        if mtp:
            differences = _mtp_structure(cut, MtpBlock.of(original), advance)
        elif original.architecture in STATE_FED:
            differences = _state_fed_structure(
                cut, StateFedHead.of(original), StateFedHead.of(cut.file), target, advance
            )
        else:
            differences = _structure(cut, original, advance)
    if differences:  # logits of files that differ say nothing more
        return Proof(len(cut.d2t), 0, None, None, differences)
    if mtp:
        return _compared(cut, *_mtp_logits(cut, MtpBlock.of(original)))
    if original.architecture in STATE_FED:
        return _compared(cut, *_state_fed_logits(cut, StateFedHead.of(original), target))
    return _compared(cut, *_logits(cut, original))


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
    return differences + _other_keys(cut, original, ("tokenizer.",))


def _other_keys(cut: Trimmed, original: GGUFFile, changed: tuple[str, ...]) -> list[str]:
    return [
        f"{cut.file.path}: metadata {key} differs from the source's"
        for key in original.fields
        if not key.startswith((*changed, f"{original.architecture}.vocab_size"))
        and (key not in cut.file.fields or cut.file.raw(key) != original.raw(key))
    ]


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


def _state_fed_structure(
    cut: Trimmed, whole: StateFedHead, part: StateFedHead, target: Path | None, advance: Callable[[float], object]
) -> list[str]:
    original = whole.file
    source = original if HEAD in original.tensors else None if target is None else GGUFFile(target)
    if source is None:
        raise FileFormatError(f"{original.path}: has no head of its own; give the model it was made for as --target")
    head = head_tensor(source)
    ids = np.arange(head.n_rows) if whole.ids is None else whole.ids
    row_of = row_by_id(ids, whole.n_vocab)
    if part.ids is None or not np.array_equal(np.sort(part.ids), cut.d2t) or (row_of[part.ids] < 0).any():
        return [f"{cut.file.path}: its d2t is not that of the kept rows"]
    if missing := (original.tensors.keys() ^ cut.file.tensors.keys()) - {HEAD, D2T}:
        return [f"tensors {', '.join(sorted(missing))} are in one of {original.path.name}, {cut.file.path.name} only"]
    differences = _same_bytes(source, head, cut.file, cut.file.tensors[HEAD], row_of[part.ids])
    differences += _same_bytes(source, head, cut.companion, cut.companion.tensors[HEAD], None)
    for name, tensor in original.tensors.items():
        if name not in (HEAD, D2T):
            differences += _same_bytes(original, tensor, cut.file, cut.file.tensors[name], None)
        advance(tensor.n_bytes)
    return differences + _other_keys(cut, original, ())


def _state_fed_logits(cut: Trimmed, whole: StateFedHead, target: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Random pairs through both files, in stock llama.cpp: logits at the kept ids."""
    original = whole.file
    if original.architecture != EAGLE3:
        nothing = np.zeros((0, len(cut.d2t)), np.float32)
        return nothing, nothing  # what else a DFlash step needs is its target's; the bytes were compared
    if target is None and not {HEAD, EMBEDDING} <= original.tensors.keys():
        raise FileFormatError(f"{original.path}: takes token embeddings from its target; give that as --target")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, whole.n_vocab, PAIRS).tolist()
    states = rng.standard_normal((PAIRS, whole.n_embd)).astype(np.float32)
    found = []
    with contextlib.ExitStack() as stack:
        other = None
        if target is not None:
            other = stack.enter_context(Context(stack.enter_context(Model(target)), 32))
        for path in (original.path, cut.file.path):
            with Model(path) as model, PairContext(model, PAIRS + 8, None, other, n_outputs=PAIRS) as context:
                found.append(context.pairs(tokens, states, True)[0][:, cut.d2t].copy())
    return found[0], found[1]


def _mtp_structure(cut: Trimmed, block: MtpBlock, advance: Callable[[float], object]) -> list[str]:
    block.require_rows(cut.file, Vocabulary(block.file))
    differences = _same_bytes(block.file, block.head, cut.file, cut.file.tensors[HEAD], cut.d2t)
    differences += _same_bytes(block.file, block.head, cut.companion, cut.companion.tensors[HEAD], None)
    advance(sum(tensor.n_bytes for tensor in block.file.tensors.values()))
    return differences


def _mtp_logits(cut: Trimmed, block: MtpBlock) -> tuple[np.ndarray, np.ndarray]:
    """Random pairs through the block: logits at the kept ids as llama.cpp has them, and as the rows give them."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, block.n_vocab, PAIRS).tolist()
    states = rng.standard_normal((PAIRS, block.n_embd)).astype(np.float32)
    rows, expected, found = kept_rows(cut.file), [], []
    with Model(block.file.path) as model, PairContext(model, PAIRS + 8, None, mtp=True) as context:
        for i, token in enumerate(tokens):  # one at a time, as drafts are
            logits, made = context.pairs([token], states[i : i + 1], True)
            expected.append(logits[0, cut.d2t])
            found.append(rows(block.hidden(made[0])).copy())
    return np.array(expected), np.array(found)


def _logits(cut: Trimmed, original: GGUFFile) -> tuple[np.ndarray, np.ndarray]:
    """One prompt through both: logits at the kept ids."""
    with Model(original.path) as model:
        prompt = model.tokenize(PROMPT)
        with Context(model, n_ctx=len(prompt) + 8, n_outputs=len(prompt)) as context:
            expected = context.decode(prompt, outputs=len(prompt))[:, cut.d2t].copy()
    with Model(cut.file.path) as model:
        vectors = cut.embeddings().rows(prompt)
        with Context(model, n_ctx=len(prompt) + 8, n_outputs=len(prompt)) as context:
            return expected, context.decode(vectors, outputs=len(prompt)).copy()


def _compared(cut: Trimmed, expected: np.ndarray, found: np.ndarray) -> Proof:
    """Logits (positions x k) may differ by rounding, if at all."""
    gaps = np.abs(expected - found)
    greatest = float(gaps.max(initial=0.0))
    spread = float(np.ptp(expected)) if expected.size else 0.0
    differences = []
    if not greatest <= 1e-5 * spread:  # also where it is not a number
        position, row = (int(i) for i in np.argwhere(~(gaps <= 1e-5 * spread))[0])
        differences.append(
            f"{cut.file.path}: at position {position} the logit of token {int(cut.d2t[row])} is "
            f"{found[position, row]:.6f} and the source's {expected[position, row]:.6f}"
        )
    return Proof(len(cut.d2t), len(expected), greatest, spread, differences)
