"""Opens a drafter: a stock or trimmed GGUF, an EAGLE-3 head, rows of an MTP block."""

from __future__ import annotations

import contextlib

import numpy as np

from gguf_trim.format.companion import EmbeddingTable, Trimmed, companion_of
from gguf_trim.format.mtp import MTP, DrafterSource, MtpBlock, OwnBlock, kept_rows
from gguf_trim.format.speculator import Speculator
from gguf_trim.format.state_fed import DFLASH, EAGLE3, Eagle3Head
from llamabase.errors import EngineError, FileFormatError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary, require_same
from llamabase.llama.context import F16, Cache, Context
from llamabase.llama.ggml import Backend
from llamabase.llama.model import Model
from llamabase.llama.states import PairContext, Recorded

from .drafters import AUTO, ModelDrafter
from .reading import OwnReading, StateFedReading
from .rows import NEAR, DynamicHead

HIDDEN_ROWS = 8  # tokens that are read in one batch with the one whose hidden state is wanted


def open_drafter(
    path: DrafterSource,
    target: Vocabulary,
    n_ctx: int,
    n_threads: int | None = None,
    n_gpu_layers: int | None = None,
    vocab: str = AUTO,
    cache: Cache = F16,
    target_context: Context | None = None,
    model: Model | None = None,
) -> ModelDrafter:
    """Open a stock or trimmed drafter for a target's vocabulary; an EAGLE-3 head hangs on the target's context, as do
    rows for its MTP block, and that block itself with its whole head.

    `vocab` (one of VOCABS) says what a trimmed one may draft from: the rows it kept ("trim"), those and the tokens of
    the text ("context"), those and the speculator's candidates too ("spec"), or the most that its files allow ("auto").
    A stock drafter has all its rows. `model`: its weights where they are loaded already, which stay their owner's.
    Raises VocabularyMismatch where an id would not mean the same to both, naming both files, and EngineError for "spec"
    without a speculator.
    """
    if isinstance(path, OwnBlock):
        return _open_mtp(None, target, target_context, n_threads, vocab, cache)
    file = GGUFFile(path)
    if file.architecture == MTP:
        return _open_mtp(Trimmed.open(path), target, target_context, n_threads, vocab, cache)
    if "gguf_trim.companion" in file.fields:
        raise EngineError(f"{path}: is the companion of a trimmed drafter; give the file beside it")
    if file.architecture == DFLASH:
        raise FileFormatError(f"{path}: is a DFlash drafter, which llama-server runs and this runner does not")
    if file.architecture == "gemma4-assistant":  # llama.cpp would end the process
        raise FileFormatError(f"{path}: is an assistant that hangs on its Gemma 4 target: this runner cannot run it")
    if file.architecture == EAGLE3:
        return _open_state_fed(Eagle3Head.of(file), target, target_context, n_threads, n_gpu_layers, vocab, model)
    trimmed = Trimmed.open(path) if "gguf_trim.d2t" in file.fields else None
    require_same(target, trimmed.vocabulary if trimmed else Vocabulary(file))
    dynamic = _dynamic(trimmed, vocab, len(target), n_threads) if trimmed is not None and vocab != "trim" else None
    owned = model is None
    with contextlib.ExitStack() as opened:  # to be closed where something fails
        model = model or opened.enter_context(Model(path, n_gpu_layers))
        if model.recurrent:
            raise EngineError(
                f"{path}: llama.cpp cannot take back what a {file.architecture} model has drafted; use a drafter with "
                "attention only"
            )
        n_outputs = HIDDEN_ROWS if dynamic else 1
        context = opened.enter_context(Context(model, n_ctx, n_threads, n_outputs=n_outputs, cache=cache))
        if trimmed is None:
            # Tables of one family are padded to different lengths: an id of one's padding must not reach the other.
            ids, rows, last = None, min(model.n_vocab, len(target)), model.n_vocab - 1
            reading = OwnReading(context, rows, lambda ids: np.minimum(ids, last), False)
        else:
            embeddings = trimmed.embeddings()
            if dynamic is not None and not _multiplies(dynamic, context, embeddings):
                if vocab != AUTO:
                    raise EngineError(
                        f"{path}: its head does more than multiply, so rows cannot be added to it; use vocabulary trim"
                    )
                dynamic = None
            ids = trimmed.d2t[: int(np.searchsorted(trimmed.d2t, len(target)))]
            reading = OwnReading(context, len(ids), embeddings.rows, dynamic is not None)
        opened.pop_all()
    return ModelDrafter(model, reading, ids, dynamic, owned)


def _open_state_fed(
    head: Eagle3Head,
    target: Vocabulary,
    target_context: Context | None,
    n_threads: int | None,
    n_gpu_layers: int | None,
    vocab: str,
    model: Model | None,
) -> ModelDrafter:
    if target_context is None:
        raise EngineError(f"{head.file.path}: hangs on its target's states, which only this runner gives it")
    target_file = GGUFFile(target_context.model.path)
    head.require_target(target_file, target)
    inputs = Recorded.of(target_context, target_file.architecture, head.layers)
    dynamic, path = None, head.file.path
    # Its companion is needed for rows beyond the kept ones only.
    if "gguf_trim.d2t" in head.file.fields and vocab != "trim" and (vocab != AUTO or companion_of(path).exists()):
        dynamic = _dynamic(Trimmed.open(path), vocab, len(target), n_threads)
    owned = model is None
    with contextlib.ExitStack() as opened:
        model = model or opened.enter_context(Model(path, n_gpu_layers))
        context = opened.enter_context(PairContext(model, target_context.n_ctx, n_threads, target_context))
        reading = StateFedReading(context, inputs, head)
        opened.pop_all()
    return ModelDrafter(model, reading, reading.ids, dynamic, owned)


def _open_mtp(
    trimmed: Trimmed | None,
    target: Vocabulary,
    target_context: Context | None,
    n_threads: int | None,
    vocab: str,
    cache: Cache,
) -> ModelDrafter:
    """The target's MTP block: with llama.cpp's head, or with the rows of a trimmed file."""
    if target_context is None:
        raise EngineError("an MTP block reads its target's states, which only this runner gives it")
    block = MtpBlock.of(GGUFFile(target_context.model.path))
    model, n_ctx = target_context.model, target_context.n_ctx
    recorded = Recorded.of(target_context)
    if trimmed is None:
        context = PairContext(model, n_ctx, n_threads, mtp=True, cache=cache)
        return ModelDrafter(None, StateFedReading(context, recorded, block))
    block.require_rows(trimmed.file, target)
    dynamic = _dynamic(trimmed, vocab, len(target), n_threads) if vocab != "trim" else None
    rows = kept_rows(trimmed.file, n_threads)
    with PairContext(model, 8, n_threads, mtp=True) as probe:  # one step of llama.cpp's own, with its head
        logits, states = probe.pairs([0], np.ones((1, block.n_embd), np.float32), True)
        expected, found = logits[0, trimmed.d2t], rows(block.hidden(states[0]))
    if not np.abs(found - expected).max() <= NEAR * np.ptp(expected):
        raise EngineError(
            f"{trimmed.file.path}: its rows are not the head of {block.file.path}; cut it again with --mtp"
        )
    context = PairContext(model, n_ctx, n_threads, mtp=True, head=False, cache=cache)
    return ModelDrafter(None, StateFedReading(context, recorded, block, rows), trimmed.d2t, dynamic)


def _dynamic(trimmed: Trimmed, vocab: str, n_ids: int, n_threads: int | None) -> DynamicHead:
    speculator = None if vocab == "context" else Speculator.of(trimmed)
    if vocab == "spec" and speculator is None:
        raise EngineError(
            f"{trimmed.companion.path}: holds no speculator; make one with `python -m gguf_trim speculator`"
        )
    return DynamicHead(trimmed, Backend(n_threads), speculator, n_ids=n_ids)


def _multiplies(dynamic: DynamicHead, context: Context, embeddings: EmbeddingTable) -> bool:
    """Whether rows of the full head times the hidden state are the logits: shown on the kept ones, by one step."""
    logits = context.decode(embeddings.rows([0]), 1, hidden=True)[0]
    agree = dynamic.agrees(logits, context.hidden_states(1)[0])
    context.truncate(0)
    return agree
