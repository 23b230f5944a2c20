"""Who proposes tokens: nobody, a stock GGUF drafter, or a trimmed one. All behind one small base class."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from gguf_trim.companion import EmbeddingTable, Trimmed
from gguf_trim.cut import companion_path
from gguf_trim.dynamic.rows import NEAR, DynamicHead
from gguf_trim.dynamic.speculator import Speculator
from gguf_trim.hanging import DFLASH, EAGLE3, HangingHead
from gguf_trim.mtp import MTP, MtpBlock, kept_rows
from llamabase.errors import EngineError, FileFormatError
from llamabase.ggml import Backend
from llamabase.gguf_file import GGUFFile
from llamabase.llama import F16, Cache, Context, Model
from llamabase.noise import Noise
from llamabase.samplers import Chain
from llamabase.sampling import Sampling
from llamabase.states import PairContext, Recorded
from llamabase.vocabulary import Vocabulary, require_same

from .reading import HangingReading, OwnReading

AUTO = "auto"
VOCABS = (AUTO, "trim", "context", "spec")
HIDDEN_ROWS = 8  # tokens that are read in one batch with the one whose hidden state is wanted
_NO_IDS, _NO_LOGITS = np.empty(0, np.int32), np.empty(0, np.float32)


@dataclass(frozen=True)
class Proposal:
    """One drafted token (target id), and how sure the drafter is of it (its own probability, 0 to 1)."""

    token: int
    certainty: float


def _weight(logits: np.ndarray, best: float) -> float:
    """What these tokens weigh at temperature 1 where one of logit `best` weighs 1."""
    return float(np.exp(logits - best).sum())


class Drafter:
    """Proposes tokens; keeps its own cache in step with the text it is given."""

    def draft(self, text: Sequence[int], n: int, sampling: Sampling, noise: Noise) -> list[int]:
        """Up to n tokens to follow `text` (the whole of it, target ids); what is drawn is drawn with the noise."""
        return []

    def prepare(self, text: Sequence[int], left: int) -> None:
        """Read a prompt ahead of the first draft; at most `left` tokens will follow."""

    def learn(
        self, drafted: int, verified: int, accepted: int, tokens: int, seconds: float, verify_seconds: float
    ) -> None:
        """Hear what became of a round: how many drafts it made, verified and accepted, the tokens it emitted, its
        seconds in all and those of the target.
        """

    def settle(self) -> None:
        """Make the cache agree with what is known of it, after an interruption at any point."""

    @property
    def seconds(self) -> float:
        """Wall time spent inside llama.cpp so far."""
        return 0.0


class NoDrafter(Drafter):
    """Plain decoding: the same loop, with nothing to verify."""


class ModelDrafter(Drafter):
    """A drafter GGUF, or a block of the target's (`model` None); its model is closed with it where it is `owned`.

    `ids` (ascending) are the target ids of its head's rows, None where they agree.

    `dynamic` adds rows of the full head to a trimmed one's, chosen at every step.
    """

    def __init__(
        self,
        model: Model | None,
        reading: OwnReading | HangingReading,
        ids: np.ndarray | None = None,
        dynamic: DynamicHead | None = None,
        owned: bool = True,
    ) -> None:
        self.model, self.reading, self._ids, self.dynamic, self._owned = model, reading, ids, dynamic, owned
        self._all = dynamic  # whether or not it is used

    def draft(self, text: Sequence[int], n: int, sampling: Sampling, noise: Noise) -> list[int]:
        return [found.token for found in islice(self.propose(text, sampling, noise), n)] if n > 0 else []

    def propose(self, text: Sequence[int], sampling: Sampling, noise: Noise) -> Iterator[Proposal]:
        """Drafted tokens one after another, each computed when it is asked for, until the context is full."""
        if self.dynamic is not None:
            self.dynamic.follow(text)
        # Without the grammar, which only the target's p must obey; None where it would change nothing.
        chain = None if sampling.plain else Chain(sampling, text, noise=noise)
        token = -1
        for i in range(self.reading.room(text)):
            logits, hidden = self.reading.follow(token) if i else self.reading.begin(text)
            more, added = (_NO_IDS, _NO_LOGITS) if self.dynamic is None else self.dynamic.logits(hidden)
            if chain is None:
                found = self._likeliest(logits, more, added)
            else:
                row, ids = self._merged(logits, more, added)
                q = chain.distribution(row, ids)
                token = q.draw(noise, len(text) + i)
                chain.accept(token)
                found = Proposal(token, 1 / _weight(row, row.max()) if sampling.greedy else q.of(token))
            yield found
            token = found.token

    @property
    def vocabs(self) -> list[str]:
        """What it may be told to draft from."""
        if self._all is None:
            return [AUTO]
        return [AUTO, "trim", "context", *(["spec"] if self._all.speculates else [])]

    def use(self, vocab: str) -> None:
        """Draft from one of `vocabs` from now on."""
        self.dynamic = None if vocab == "trim" else self._all
        if self._all is not None:
            self._all.speculating = vocab != "context"

    def heed(self, go_on: Callable[[], bool]) -> None:
        """Ask this before every batch; where it says no, EngineError is raised."""
        self.reading.context.go_on = go_on

    @property
    def acceptance(self) -> float:
        """What the fit of its speculator has measured, 0 where there is none."""
        return self.dynamic.acceptance if self.dynamic is not None else 0.0

    @property
    def n_ctx(self) -> int:
        return self.reading.context.n_ctx

    def unread(self, text: Sequence[int]) -> int:
        """How many tokens of `text` the next draft has to read first."""
        return self.reading.unread(text)

    def _likeliest(self, logits: np.ndarray, more: np.ndarray, added: np.ndarray) -> Proposal:
        """The token of the greatest logit of a step, of equals that of the lowest id: as `_merged` has it, sooner."""
        place = int(logits.argmax())
        token, best = place if self._ids is None else int(self._ids[place]), logits[place]
        if len(more) and (most := added.max()) >= best:
            other = int(more[added == most].min())
            token, best = other if most > best else min(token, other), most
        return Proposal(token, 1 / (_weight(logits, best) + _weight(added, best)))

    def _merged(self, logits: np.ndarray, more: np.ndarray, added: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """A step's logits as one row, and the ids they are of (ascending; None: their places)."""
        if self._ids is None or not len(more):
            return logits, self._ids
        ids = np.concatenate([self._ids, more])
        order = np.argsort(ids, kind="stable")  # a tenth of another's time, since most are in order
        return np.concatenate([logits, added])[order], ids[order]

    def prepare(self, text: Sequence[int], left: int) -> None:
        self.reading.prepare(text)

    def settle(self) -> None:
        self.reading.settle()
        if self.dynamic is not None:  # an interruption may have come between a token's slot and its row
            self.dynamic.recent.forget()

    @property
    def seconds(self) -> float:
        return self.reading.seconds + (self.dynamic.seconds if self.dynamic else 0.0)

    def close(self) -> None:
        self.reading.context.close()
        if self.model is not None and self._owned:
            self.model.close()


def open_drafter(
    path: Path,
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
    rows for its MTP block, and `mtp`, which is that block with its whole head.

    `vocab` (one of VOCABS) says what a trimmed one may draft from: the rows it kept ("trim"), those and the tokens of
    the text ("context"), those and the speculator's candidates too ("spec"), or the most that its files allow ("auto").
    A stock drafter has all its rows. `model`: its weights where they are loaded already, which stay their owner's.
    Raises VocabularyMismatch where an id would not mean the same to both, naming both files, and EngineError for "spec"
    without a speculator.
    """
    if path == Path(MTP):
        return _open_mtp(None, target, target_context, n_threads, vocab, cache)
    file = GGUFFile(path)
    if file.architecture == MTP:
        return _open_mtp(Trimmed.open(path), target, target_context, n_threads, vocab, cache)
    if "gguf_trim.companion" in file.fields:
        raise EngineError(f"{path}: is the companion of a trimmed drafter; give the file beside it")
    if file.architecture == DFLASH:
        raise FileFormatError(f"{path}: is a DFlash drafter, which llama-server runs and this runner does not")
    if file.architecture == "gemma4-assistant":  # llama.cpp would end the process
        raise FileFormatError(
            f"{path}: is an assistant that hangs on its Gemma 4 target, which this runner does not run"
        )
    if file.architecture == EAGLE3:
        return _open_hanging(HangingHead.of(file), target, target_context, n_threads, n_gpu_layers, vocab, model)
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


def _open_hanging(
    head: HangingHead,
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
    if "gguf_trim.d2t" in head.file.fields and vocab != "trim" and (vocab != AUTO or companion_path(path).exists()):
        dynamic = _dynamic(Trimmed.open(path), vocab, len(target), n_threads)
    owned = model is None
    with contextlib.ExitStack() as opened:
        model = model or opened.enter_context(Model(path, n_gpu_layers))
        context = opened.enter_context(PairContext(model, target_context.n_ctx, n_threads, target_context))
        reading = HangingReading(context, inputs, head)
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
        return ModelDrafter(None, HangingReading(context, recorded, block))
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
    return ModelDrafter(None, HangingReading(context, recorded, block, rows), trimmed.d2t, dynamic)


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
