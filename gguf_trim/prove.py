"""Proof that a cut is right: the same bytes (structure) and the same logits at the kept ids (behaviour).

The lists in `cut` refuse architectures that are known to fail. This check decides about all others: if a graph scales
or uses its token inputs differently, the logits differ.

What it may ask of logits follows from where they are computed. On the CPU the same kernels multiply a cut and its
source, and so do those that multiply rows here, so the logits are equal but for the last bits. This is computed
everywhere, and proves the cut. On a GPU, if llama.cpp has one, kernels may depend on the number of rows: there a cut
may part from its source by as much as the source parts from itself on the CPU, and by no more. Rows that are multiplied
here are never computed on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from gguf_trim.format.assistant import POST, PRE, Assistant, AssistantSteps
from gguf_trim.format.companion import Trimmed
from gguf_trim.format.mtp import MTP, MtpBlock, kept_rows
from gguf_trim.format.state_fed import D2T, DFLASH, MARKOV, STATE_FED, Eagle3Head, row_by_id
from llamabase.cli.progress import progress
from llamabase.errors import FileFormatError, VocabularyMismatch
from llamabase.files import CHUNK
from llamabase.gguf.reader import GGUFFile, Tensor
from llamabase.gguf.tensors import ASSISTANT, EMBEDDING, HEAD, HEAD_BIAS, head_tensor
from llamabase.gguf.vocabulary import Vocabulary, require_same
from llamabase.llama.context import CONTEXT_DEFAULTS, Context
from llamabase.llama.ggml import gpus
from llamabase.llama.model import CPU_ONLY, MODEL_DEFAULTS, Model, ModelParams
from llamabase.llama.states import PairContext

from .cut import why_not

PAIRS = 24  # random pairs of token and state that both heads read
TOLERANCE = 1e-5  # by which logits may differ, as a fraction of their range
PROMPT = (
    "The quick brown fox jumps over the lazy dog. Der schnelle braune Fuchs springt. 敏捷的棕色狐狸跳过懒狗。\n"
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n"
    "Ответ: 3.14159 * 2 = 6.28318; naïve café, $42.50 — «quoted»."
)


@dataclass(frozen=True)
class Proof:
    """`differences` holds one sentence for each difference; if it is empty, the cut is proven.

    max_logit_difference, of the logits on the CPU, and logit_range are None if no logits were compared. `gpu` is None
    if llama.cpp has no GPU, or would not compute this cut on one.
    """

    kept: int
    positions: int
    max_logit_difference: float | None
    logit_range: float | None
    differences: list[str]
    gpu: OnGpu | None = None

    @property
    def ok(self) -> bool:
        return not self.differences


@dataclass(frozen=True)
class OnGpu:
    """How far logits part where llama.cpp computes on these GPUs: the cut's from its source's, and the source's there
    from its own on the CPU, which is what the cut's may do.
    """

    names: list[str]
    max_logit_difference: float
    allowed: float


class Logits(Protocol):
    """Computes the logits of a source at the kept ids and those of its cut (float32, positions x k)."""

    def __call__(self, where: ModelParams) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class _Copy:
    """A tensor of the source, or `rows` of it, which a file should hold under the same name."""

    source: GGUFFile
    tensor: Tensor
    file: GGUFFile
    rows: np.ndarray | None = None


@dataclass(frozen=True)
class _Claim:
    """What is to be proven of a cut of one kind: `copies`, `keys` of the metadata that are the source's, `logits`.

    `differences` are known before; each part is compared only if those before it do not differ. `multiplied_here`: the
    cut's logits are products that ggml computes on the CPU wherever llama.cpp computes.
    """

    differences: list[str]
    copies: list[_Copy]
    keys: list[str]
    logits: Logits
    multiplied_here: bool = False


def prove(trimmed: Path, source: Path, target: Path | None = None) -> Proof:
    """Compare a trimmed drafter with the drafter it was cut from, with a bar; `target`: that of a state-fed drafter.

    Rows for an MTP block were cut from the target itself. Raises FileFormatError if a file cannot be opened; what
    differs between two readable files is in the result.
    """
    cut, original = Trimmed.open(trimmed), GGUFFile(source)
    mtp = cut.file.architecture == MTP
    if (reason := why_not(original, mtp)) is not None:
        raise FileFormatError(f"{original.path}: is no --source to verify with: {reason}")
    if mtp:
        claim = _mtp(cut, MtpBlock.of(original))
    elif original.architecture == ASSISTANT:
        claim = _assistant(cut, Assistant.of(original), target)
    elif original.architecture in STATE_FED:
        claim = _state_fed(cut, Eagle3Head.of(original), target)
    else:
        claim = _plain(cut, original)
    if differences := claim.differences or _unequal(cut, original, claim):
        return Proof(len(cut.d2t), 0, None, None, differences)
    expected, made = claim.logits(CPU_ONLY)
    proof = _compared(cut, expected, made)
    if not proof.ok or claim.multiplied_here or not (names := gpus()):
        return proof
    return _compared_on_gpu(cut, proof, names, expected, *claim.logits(MODEL_DEFAULTS))


def _unequal(cut: Trimmed, original: GGUFFile, claim: _Claim) -> list[str]:
    """Which of the bytes claimed to be equal are not, with a bar."""
    differences = []
    with progress("verifying", sum(copy.tensor.n_bytes for copy in claim.copies), "B") as advance:
        for copy in claim.copies:
            differences += _same_bytes(copy)
            advance(copy.tensor.n_bytes)
    return differences + [
        f"{cut.file.path}: metadata {key} differs from the source's"
        for key in claim.keys
        if not key.startswith(f"{original.architecture}.vocab_size")
        and (key not in cut.file.fields or cut.file.raw(key) != original.raw(key))
    ]


def _plain(cut: Trimmed, original: GGUFFile) -> _Claim:
    """One prompt goes through both files."""

    def logits(where: ModelParams) -> tuple[np.ndarray, np.ndarray]:
        with Model(original.path, vocab_only=True) as model:
            prompt = model.tokenize(PROMPT)
        expected = _decoded(original.path, prompt, where)[:, cut.d2t]
        return expected, _decoded(cut.file.path, cut.embeddings().rows(prompt), where)

    return _like_the_source(cut, original, logits)


def _like_the_source(cut: Trimmed, original: GGUFFile, logits: Logits, moved: Sequence[str] = ()) -> _Claim:
    """Every tensor is the source's: in the cut, or if `moved` in the companion; the tables whole in the companion."""
    differences = _lacking(cut, original)
    try:
        require_same(Vocabulary(original), cut.vocabulary)
    except VocabularyMismatch as mismatch:
        differences = [str(mismatch)]
    copies = []
    for name, tensor in original.tensors.items():
        rows = cut.d2t if name in (EMBEDDING, HEAD, HEAD_BIAS) else None
        if name not in moved:
            copies.append(_Copy(original, tensor, cut.file, rows))
        if name in moved or rows is not None:
            copies.append(_Copy(original, tensor, cut.companion))
    return _Claim(differences, copies, [key for key in original.fields if not key.startswith("tokenizer.")], logits)


def _decoded(path: Path, prompt: Sequence[int] | np.ndarray, where: ModelParams) -> np.ndarray:
    """Logits after every token of a prompt, given as ids or as embeddings."""
    n = len(prompt)
    with Model(path, where) as model, Context(model, n_ctx=n + 8, n_outputs=n) as context:
        return context.decode(prompt, outputs=n).copy()


def _assistant(cut: Trimmed, whole: Assistant, target: Path | None) -> _Claim:
    """Random pairs go through both files over one text of the target, every other one after its own last state."""

    def logits(where: ModelParams) -> tuple[np.ndarray, np.ndarray]:
        if target is None:
            raise FileFormatError(f"{whole.file.path}: reads its target's states; give that as --target")
        target_file = GGUFFile(target)
        whole.require_target(target_file, Vocabulary(target_file))
        tokens, states = _random_pairs(whole.file.tensors[EMBEDDING].n_rows, whole.width)
        made: list[np.ndarray] = []
        with Model(target, where) as model, Context(model, 2 * PAIRS) as context:
            for trimmed in (None, cut):
                file = whole.file if trimmed is None else cut.file
                with Model(file.path, where) as drafter:
                    steps = AssistantSteps(drafter, context, CONTEXT_DEFAULTS, trimmed)
                    with steps.context:
                        context.decode(tokens, 0)
                        ids = cut.d2t if trimmed is None else slice(None)
                        made += [
                            (steps.follow(tokens[i]) if i % 2 else steps.begin(tokens[i], states[i]))[0][ids].copy()
                            for i in range(PAIRS)
                        ]
        return np.array(made[:PAIRS]), np.array(made[PAIRS:])

    claim = _like_the_source(cut, whole.file, logits, (PRE, POST))
    for name, values in whole.copying.items():
        if (tensor := cut.file.tensors.get(name)) is None or cut.file.read(tensor) != values.tobytes():
            claim.differences.append(f"{cut.file.path}: its {name} does not copy what it is fed")
    return claim


def _state_fed(cut: Trimmed, whole: Eagle3Head, target: Path | None) -> _Claim:
    """Random pairs, or tokens if it is a DFlash drafter, go through both files, in stock llama.cpp."""
    original, part = whole.file, Eagle3Head.of(cut.file)
    source = original if whole.own is not None else None if target is None else GGUFFile(target)
    if source is None:
        raise FileFormatError(f"{original.path}: has no head of its own; give the model it was made for as --target")
    head = replace(head_tensor(source), name=HEAD)
    known = np.arange(head.n_rows) if whole.ids is None else whole.ids
    ids = np.arange(0) if part.ids is None else part.ids
    ids, unknown = ids[np.isin(ids, known)], ids[~np.isin(ids, known)]
    differences = _lacking(cut, original, HEAD, D2T)
    if len(unknown) or not np.array_equal(np.sort(ids), cut.d2t):
        differences = [f"{cut.file.path}: its d2t is not that of the kept rows"]
    rows = row_by_id(known, whole.n_vocab)[ids]
    copies = [_Copy(source, head, cut.file, rows), _Copy(source, head, cut.companion)]
    copies += [
        _Copy(original, tensor, cut.file, rows if name == MARKOV else None)
        for name, tensor in original.tensors.items()
        if name not in (HEAD, D2T)
    ]

    def logits(where: ModelParams) -> tuple[np.ndarray, np.ndarray]:
        if target is None and (whole.own is None or EMBEDDING not in original.tensors):
            raise FileFormatError(f"{original.path}: takes token embeddings from its target; give that as --target")
        tokens, states = _random_pairs(whole.n_vocab, whole.n_embd)
        made = []
        with contextlib.ExitStack() as stack:
            other = None
            if target is not None:
                other = stack.enter_context(Context(stack.enter_context(Model(target, where)), 32))
            for path in (original.path, cut.file.path):
                if original.architecture == DFLASH:
                    made.append(_first_drafts(path, tokens, other, where)[:, cut.d2t])
                    continue
                with (
                    Model(path, where) as model,
                    PairContext(model, PAIRS + 8, other=other, n_outputs=PAIRS) as context,
                ):
                    made.append(context.pairs(tokens, states, True)[0][:, cut.d2t].copy())
        return made[0], made[1]

    return _Claim(differences, copies, list(original.fields), logits)


def _first_drafts(path: Path, tokens: list[int], other: Context | None, where: ModelParams) -> np.ndarray:
    """Logits (float32, tokens x n_vocab) of a DFlash drafter's first draft after each token, which stands alone: later
    drafts of a block may depend on what was likeliest before them.
    """
    n = 1 if GGUFFile(path).get("dflash.sample_from_anchor", True) else 2  # whether the token's own place drafts, too
    with Model(path, where) as model, Context(model, 32, n_outputs=n, other=other) as context:
        logits = []
        for token in tokens:
            context.truncate(0)
            logits.append(context.decode([token] * n, n)[-1].copy())
        return np.array(logits)


def _mtp(cut: Trimmed, block: MtpBlock) -> _Claim:
    """Random pairs go through the block: llama.cpp's logits at the kept ids, and those that the rows give."""
    block.require_rows(cut.file, Vocabulary(block.file))
    head = replace(block.head, name=HEAD)
    copies = [_Copy(block.file, head, cut.file, cut.d2t), _Copy(block.file, head, cut.companion)]

    def logits(where: ModelParams) -> tuple[np.ndarray, np.ndarray]:
        rows, expected, made = kept_rows(cut.file), [], []
        with (
            Model(block.file.path, where) as model,
            PairContext(model, PAIRS + 8, mtp=True) as context,
        ):
            # One at a time, as drafts are.
            for token, state in zip(*_random_pairs(block.n_vocab, block.n_embd), strict=True):
                logits, after = context.pairs([token], state[None], True)
                expected.append(logits[0, cut.d2t])
                made.append(rows(block.hidden(after[0])).copy())
        return np.array(expected), np.array(made)

    return _Claim([], copies, [], logits, multiplied_here=True)


def _random_pairs(n_vocab: int, width: int) -> tuple[list[int], np.ndarray]:
    """PAIRS tokens, and as many states (float32, PAIRS x width)."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, n_vocab, PAIRS).tolist()
    return tokens, rng.standard_normal((PAIRS, width)).astype(np.float32)


def _lacking(cut: Trimmed, original: GGUFFile, *but: str) -> list[str]:
    if missing := (original.tensors.keys() ^ cut.file.tensors.keys()) - set(but):
        return [f"tensors {', '.join(sorted(missing))} are in one of {original.path.name}, {cut.file.path.name} only"]
    return []


def _same_bytes(copy: _Copy) -> list[str]:
    """Whether a file holds a tensor of the source, or the rows of it, read in chunks."""
    x, path = copy.tensor, copy.file.path
    if (y := copy.file.tensors.get(x.name)) is None:
        return [f"{path}: lacks {x.name}"]
    count = x.shape[-1]
    wanted = np.arange(count) if copy.rows is None else copy.rows
    if y.type != x.type or y.shape != (*x.shape[:-1], len(wanted)):
        other = "; verify the cut before it is requantised" if y.type != x.type else ""
        return [f"{path}: {y.name} is {y.type.name} {list(y.shape)}, not {len(wanted)} rows of {x.type.name}{other}"]
    row_bytes = x.n_bytes // count
    source = np.memmap(copy.source.path, np.uint8, "r", x.offset, (count, row_bytes))
    result = np.memmap(path, np.uint8, "r", y.offset, (len(wanted), row_bytes))
    step = max(1, CHUNK // row_bytes)
    for start in range(0, len(wanted), step):
        ids = wanted[start : start + step]
        expected = source[ids[0] : ids[-1] + 1] if copy.rows is None else source[ids]
        unequal = np.flatnonzero((expected != result[start : start + step]).any(axis=1))
        if len(unequal):
            row = start + int(unequal[0])
            return [f"{path}: row {row} of {y.name} is not row {int(wanted[row])} of the source"]
    return []


def _compared(cut: Trimmed, expected: np.ndarray, made: np.ndarray) -> Proof:
    """Logits (positions x k) may differ by rounding, if at all."""
    spread = float(np.ptp(expected)) if expected.size else 0.0
    differences = _beyond(cut, expected, made, TOLERANCE * spread)
    return Proof(len(cut.d2t), len(expected), _greatest(expected - made), spread, differences)


def _compared_on_gpu(
    cut: Trimmed, proof: Proof, names: list[str], on_cpu: np.ndarray, expected: np.ndarray, made: np.ndarray
) -> Proof:
    """A proof on the CPU, where the source's logits are `on_cpu`, with what the same comparison shows on a GPU."""
    allowed = max(TOLERANCE * float(np.ptp(expected)), _greatest(expected - on_cpu))
    beyond = _beyond(cut, expected, made, allowed)
    differences = [f"{sentence}, both computed on {', '.join(names)}" for sentence in beyond]
    return replace(proof, differences=differences, gpu=OnGpu(names, _greatest(expected - made), allowed))


def _beyond(cut: Trimmed, expected: np.ndarray, made: np.ndarray, allowed: float) -> list[str]:
    """The first logit that differs by more than `allowed`, or is not a number, in a sentence."""
    wrong = np.argwhere(~(np.abs(expected - made) <= allowed))
    if not len(wrong):
        return []
    position, row = wrong[0].tolist()
    return [
        f"{cut.file.path}: at position {position} the logit of token {int(cut.d2t[row])} is "
        f"{made[position, row]:.6f} and the source's {expected[position, row]:.6f}"
    ]


def _greatest(differences: np.ndarray) -> float:
    return float(np.abs(differences).max(initial=0.0))
