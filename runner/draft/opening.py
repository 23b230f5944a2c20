"""Opens a drafter: a GGUF, stock or trimmed, an EAGLE-3 head, an assistant, an MTP block where it lies, or its rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gguf_trim.format.assistant import Assistant, AssistantSteps
from gguf_trim.format.companion import EmbeddingTable, Trimmed, companion_of
from gguf_trim.format.mtp import MTP, DrafterSource, MtpBlock, OwnBlock, kept_rows
from gguf_trim.format.speculator import Speculator
from gguf_trim.format.state_fed import DFLASH, EAGLE3, Eagle3Head
from llamabase.errors import EngineError, FileFormatError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import ASSISTANT, is_block_alone
from llamabase.gguf.vocabulary import Vocabulary, require_same
from llamabase.llama.context import CONTEXT_DEFAULTS, Context, ContextParams
from llamabase.llama.ggml import Backend
from llamabase.llama.model import MODEL_DEFAULTS, Model, ModelParams
from llamabase.llama.states import PairContext, Recorded

from .contracts import AUTO
from .drafters import ModelDrafter
from .reading import AHEAD, AssistantReading, OwnReading, StateFedReading
from .rows import NEAR, DynamicHead

HIDDEN_ROWS = 8  # tokens that may be read in one batch with the one whose hidden state is wanted


@dataclass(frozen=True)
class DraftOptions:
    """How to load a drafter: n_ctx tokens of context, where its weights go, and how it computes.

    `vocab`, one of VOCABS, is what a trimmed drafter may draft from: the rows that it kept ("trim"), those and the
    tokens of the text ("context"), or those and the speculator's candidates ("spec"). With "auto" it is the most that
    its files allow, until what steps cost here has decided. A stock drafter has all its rows.
    """

    source: DrafterSource
    n_ctx: int = 4096
    vocab: str = AUTO
    model: ModelParams = MODEL_DEFAULTS
    how: ContextParams = CONTEXT_DEFAULTS


def open_drafter(
    options: DraftOptions,
    target: Vocabulary,
    target_context: Context | None = None,
    model: Model | None = None,
    first: ModelDrafter | None = None,
) -> ModelDrafter:
    """Open a drafter for a target's vocabulary. One that is fed the target's states needs the target's context.

    `model`: its weights if they are loaded already; whoever loaded them closes them. `first`: the first drafter of
    them, in whose cache this one takes the place that the target's context has in its own, if that has room for
    several. Raises VocabularyMismatch, naming both files, if an id does not mean the same to both, and EngineError for
    "spec" without a speculator.
    """
    drafter = _opened(options, target, target_context, model, first)
    if options.vocab != AUTO:
        drafter.candidates = [drafter.auto]
    return drafter


def _opened(
    options: DraftOptions,
    target: Vocabulary,
    target_context: Context | None,
    model: Model | None,
    first: ModelDrafter | None,
) -> ModelDrafter:
    source = options.source
    if isinstance(source, OwnBlock):
        return _open_mtp(options, None, target, target_context)
    file = GGUFFile(source)
    if file.architecture == MTP:
        return _open_mtp(options, Trimmed.open(source), target, target_context)
    if "gguf_trim.companion" in file.fields:
        raise EngineError(f"{source}: is the companion of a trimmed drafter; give the file beside it")
    if file.architecture == DFLASH:
        raise FileFormatError(f"{source}: is a DFlash drafter, which llama-server runs and this runner does not")
    if file.architecture == ASSISTANT:
        return _open_assistant(options, Assistant.of(file), target, target_context, model)
    if file.architecture == EAGLE3:
        return _open_state_fed(options, Eagle3Head.of(file), target, target_context, model)
    if is_block_alone(file):
        return _open_block(options, MtpBlock.of(file), target, target_context, model)
    return _open_own(options, file, target, target_context, model, first)


def _open_own(
    options: DraftOptions,
    file: GGUFFile,
    target: Vocabulary,
    target_context: Context | None,
    loaded: Model | None,
    first: ModelDrafter | None,
) -> ModelDrafter:
    """A drafter that reads the text itself."""
    trimmed = Trimmed.open(file.path) if "gguf_trim.d2t" in file.fields else None
    require_same(target, trimmed.vocabulary if trimmed else Vocabulary(file))
    dynamic = None if trimmed is None else _dynamic(options, trimmed, len(target))
    with _closed_on_failure() as opened:
        model, owned = _model(opened, options, file.path, loaded)
        shared = None if first is None or not isinstance(first.reading.context, Context) else first.reading.context
        if target_context is not None and shared is not None and shared.n_parallel > 1:
            context = shared.beside(target_context.sequence)
        else:
            shared, n_ctx, n_parallel = None, options.n_ctx, 1
            if target_context is not None and target_context.n_parallel > 1 and not model.recurrent:
                n_parallel = target_context.n_parallel
                n_ctx = min(n_parallel * n_ctx, target_context.n_cells) + n_parallel * AHEAD  # of all, with drafts
            outputs = n_parallel * (HIDDEN_ROWS if dynamic else 1)
            context = Context(model, n_ctx, options.how, n_outputs=outputs, n_parallel=n_parallel)
            context.n_ctx = min(context.n_ctx, options.n_ctx)
        opened.enter_context(context)
        embeddings = None if trimmed is None else trimmed.embeddings()
        # What the first one has shown holds for this one, too; others may be using what the cache has just computed.
        if shared is None and not context.goes_back([0, 1] if embeddings is None else embeddings.rows([0, 1])):
            raise EngineError(
                f"{file.path}: llama.cpp cannot copy the state of a {file.architecture} model, so its drafts cannot be "
                "taken back; use another drafter"
            )
        if trimmed is None or embeddings is None:
            # Tables of one family are padded to different lengths: an id of one's padding must not reach the other.
            rows, last = min(model.n_vocab, len(target)), model.n_vocab - 1
            reading = OwnReading(context, rows, lambda ids: np.minimum(ids, last), hidden=False)
            return ModelDrafter(reading, owned=owned)
        if shared is not None and first is not None and first.dynamic is None:
            dynamic = None
        elif dynamic is not None and shared is None and not _multiplies(dynamic, context, embeddings):
            if options.vocab != AUTO:
                raise EngineError(
                    f"{file.path}: llama.cpp's logits are not the product of its head and the hidden states that it "
                    "gives, so rows cannot be added; use vocabulary trim"
                )
            dynamic = None
        ids = trimmed.d2t[: int(np.searchsorted(trimmed.d2t, len(target)))]
        reading = OwnReading(context, len(ids), embeddings.rows, hidden=dynamic is not None)
        return ModelDrafter(reading, ids, dynamic, owned)


def _open_state_fed(
    options: DraftOptions, head: Eagle3Head, target: Vocabulary, target_context: Context | None, loaded: Model | None
) -> ModelDrafter:
    path = head.file.path
    fed_by = _required(target_context, path)
    target_file = GGUFFile(fed_by.model.path)
    head.require_target(target_file, target)
    recorded = Recorded.of(fed_by, target_file.architecture, head.layers)
    # Only rows beyond the kept ones need the companion.
    whole = "gguf_trim.d2t" not in head.file.fields or options.vocab == "trim"
    whole = whole or (options.vocab == AUTO and not companion_of(path).exists())
    dynamic = None if whole else _dynamic(options, Trimmed.open(path), len(target))
    with _closed_on_failure() as opened:
        model, owned = _model(opened, options, path, loaded)
        context = PairContext(model, fed_by.n_ctx, options.how, fed_by)
        reading = StateFedReading(opened.enter_context(context), recorded, head)
        return ModelDrafter(reading, reading.ids, dynamic, owned)


def _open_block(
    options: DraftOptions, block: MtpBlock, target: Vocabulary, target_context: Context | None, loaded: Model | None
) -> ModelDrafter:
    """An MTP block in a file beside its target's, with llama.cpp's head."""
    path = block.file.path
    fed_by = _required(target_context, path)
    block.require_target(GGUFFile(fed_by.model.path), target)
    with _closed_on_failure() as opened:
        model, owned = _model(opened, options, path, loaded)
        context = PairContext(model, fed_by.n_ctx, options.how, mtp=True)
        reading = StateFedReading(opened.enter_context(context), Recorded.of(fed_by), block)
        return ModelDrafter(reading, owned=owned)


def _open_assistant(
    options: DraftOptions,
    assistant: Assistant,
    target: Vocabulary,
    target_context: Context | None,
    loaded: Model | None,
) -> ModelDrafter:
    path = assistant.file.path
    fed_by = _required(target_context, path)
    assistant.require_target(GGUFFile(fed_by.model.path), target)
    if options.model.device != fed_by.model.how.device:  # llama.cpp would end the process
        raise EngineError(
            f"{path}: attends to its target's cache, so it must be on the target's devices; leave out --device-draft"
        )
    trimmed = Trimmed.open(path) if "gguf_trim.d2t" in assistant.file.fields else None
    dynamic = None if trimmed is None else _dynamic(options, trimmed, len(target))
    with _closed_on_failure() as opened:
        model, owned = _model(opened, options, path, loaded)
        recorded = Recorded.of(fed_by)
        steps = AssistantSteps(model, fed_by, options.how, trimmed)
        opened.enter_context(steps.context)
        reading = AssistantReading(steps, recorded, fed_by)
        return ModelDrafter(reading, None if trimmed is None else trimmed.d2t, dynamic, owned)


def _open_mtp(
    options: DraftOptions, trimmed: Trimmed | None, target: Vocabulary, target_context: Context | None
) -> ModelDrafter:
    """The target's MTP block, with llama.cpp's head or with the rows of a trimmed file."""
    if target_context is None:
        raise EngineError("an MTP block reads its target's states, which only this runner gives it")
    model, n_ctx, how = target_context.model, target_context.n_ctx, options.how
    own, its = options.model, model.how
    if (own.device, own.n_gpu_layers) != (its.device, its.n_gpu_layers) or own.override_tensor or own.n_cpu_moe:
        raise EngineError(
            f"{model.path}: its own block drafts, and is where the target is; leave out --device-draft, "
            "--n-gpu-layers-draft, --override-tensor-draft, --cpu-moe-draft and --n-cpu-moe-draft"
        )
    block, recorded = MtpBlock.of(GGUFFile(model.path)), Recorded.of(target_context)
    if trimmed is None:
        context = PairContext(model, n_ctx, how, mtp=True)
        return ModelDrafter(StateFedReading(context, recorded, block))
    block.require_rows(trimmed.file, target)
    dynamic, rows = _dynamic(options, trimmed, len(target)), kept_rows(trimmed.file, how.n_threads)
    with PairContext(model, 8, how, mtp=True) as probe:  # one step of llama.cpp's own, with its head
        logits, states = probe.pairs([0], np.ones((1, block.n_embd), np.float32), True)
        expected, computed = logits[0, trimmed.d2t], rows(block.hidden(states[0]))
    if not np.abs(computed - expected).max() <= NEAR * np.ptp(expected):
        raise EngineError(
            f"{trimmed.file.path}: its rows are not the head of {block.file.path}; cut it again with --mtp"
        )
    context = PairContext(model, n_ctx, how, mtp=True, head=False)
    whole = context if options.vocab == AUTO else None
    return ModelDrafter(StateFedReading(context, recorded, block, rows), trimmed.d2t, dynamic, whole=whole)


def _required(target_context: Context | None, path: Path) -> Context:
    if target_context is None:
        raise EngineError(f"{path}: is fed its target's states, which only this runner gives it")
    return target_context


def _model(
    opened: contextlib.ExitStack, options: DraftOptions, path: Path, loaded: Model | None
) -> tuple[Model, Model | None]:
    """A drafter's model, and the same if the drafter owns it: one that is not loaded yet."""
    if loaded is not None:
        return loaded, None
    model = opened.enter_context(Model(path, options.model))
    return model, model


@contextlib.contextmanager
def _closed_on_failure() -> Iterator[contextlib.ExitStack]:
    """A stack of what the body opens: closed if the body fails, else left open."""
    with contextlib.ExitStack() as opened:
        yield opened
        opened.pop_all()


def _dynamic(options: DraftOptions, trimmed: Trimmed, n_ids: int) -> DynamicHead | None:
    if options.vocab == "trim":
        return None
    speculator = None if options.vocab == "context" else Speculator.of(trimmed)
    if options.vocab == "spec" and speculator is None:
        raise EngineError(
            f"{trimmed.companion.path}: holds no speculator; make one with `python -m gguf_trim speculator`"
        )
    return DynamicHead(trimmed, Backend(options.how.n_threads), speculator, n_ids)


def _multiplies(dynamic: DynamicHead, context: Context, embeddings: EmbeddingTable) -> bool:
    """Whether rows of the full head times the hidden state are the logits. One step shows it for the kept rows."""
    logits = context.decode(embeddings.rows([0]), 1, hidden=True)[0]
    agree = dynamic.agrees(logits, context.hidden_states(1)[0])
    context.truncate(0)
    return agree
