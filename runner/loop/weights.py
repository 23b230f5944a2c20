"""What is loaded once for a pair, whatever the number of conversations: weights, vocabulary, template, step costs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from gguf_trim.format.companion import companion_of
from gguf_trim.format.mtp import DrafterSource, OwnBlock
from gguf_trim.format.state_fed import STATE_FED
from llamabase.errors import EngineError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import ASSISTANT
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.context import F16, Cache
from llamabase.llama.library import Closing, key_of
from llamabase.llama.model import Model
from llamabase.llama.template import ChatTemplate
from llamabase.llama.timing import StepCost
from runner.draft.auto import AutoDrafter
from runner.draft.contracts import AUTO
from runner.draft.cost import DraftStats
from runner.draft.drafters import ModelDrafter
from runner.draft.measured import recall_known, recall_vocab, remember_known, step_costs
from runner.draft.opening import DraftOptions
from runner.draft.reading import Reader


@dataclass(frozen=True)
class LoadOptions:
    """Which files to run, and how to load them.

    draft: a file of the target's vocabulary, trimmed or not, the target's own MTP block, or None. n_ctx: tokens of
    context; 0 takes as many as the model was trained on. n_threads: None for one per physical core. n_gpu_layers: None
    for llama.cpp's default. vocab: see `DraftOptions`. n_ctx_draft: tokens that the drafter remembers, if fewer than
    n_ctx. n_threads_draft, n_gpu_layers_draft: the drafter's; None for the target's. cache, cache_draft: the types of
    the KV caches.
    """

    target: Path
    draft: DrafterSource | None = None
    n_ctx: int = 4096
    n_threads: int | None = None
    n_gpu_layers: int | None = None
    vocab: str = AUTO
    n_ctx_draft: int | None = None
    cache: Cache = F16
    cache_draft: Cache = F16
    n_threads_draft: int | None = None
    n_gpu_layers_draft: int | None = None

    def of_drafter(self, source: DrafterSource, n_ctx: int) -> DraftOptions:
        """The drafter's share, for a target that has n_ctx tokens of context."""
        layers = self.n_gpu_layers if self.n_gpu_layers_draft is None else self.n_gpu_layers_draft
        n_ctx = min(self.n_ctx_draft or n_ctx, n_ctx)
        threads = self.n_threads_draft or self.n_threads
        return DraftOptions(source, n_ctx, threads, layers, self.vocab, self.cache_draft)


class Weights(Closing):
    """A target loaded with its vocabulary and chat template, the drafter's model once a conversation has loaded it, and
    what steps cost here and sessions have learned of the pair.

    Raises EngineError or FileFormatError if the target does not load.
    """

    def __init__(self, options: LoadOptions) -> None:
        self.options = options
        file = GGUFFile(options.target)
        if "gguf_trim.d2t" in file.fields:
            raise EngineError(f"{file.path}: is a trimmed drafter and cannot be the target; give it as the drafter")
        if "gguf_trim.companion" in file.fields:
            raise EngineError(f"{file.path}: is the companion of a trimmed drafter, not a model")
        if file.architecture in (*STATE_FED, ASSISTANT):
            raise EngineError(
                f"{file.path}: is a drafter that reads its target's states and cannot be the target; give it as the "
                "drafter"
            )
        self.vocabulary = Vocabulary(file)
        self.template = ChatTemplate(file, self.vocabulary)
        self.architecture = file.architecture
        self.model = Model(options.target, options.n_gpu_layers)
        self.draft_model: Model | None = None
        self._costs: tuple[StepCost, StepCost | None] | None = None
        self._vocab: object = None  # what costs have decided that drafters draft from
        self._stats = DraftStats()

    @cached_property
    def _key(self) -> str:
        draft = self.options.draft
        files = [self.options.target, *([draft, companion_of(draft)] if isinstance(draft, Path) else [])]
        how = [getattr(self.options, field.name) for field in fields(LoadOptions)[2:]]  # all but target and draft
        return key_of(files, [isinstance(draft, OwnBlock), *how])

    def measure(self, reader: Reader, drafter: ModelDrafter | None) -> None:
        """Find out what steps cost here, which takes seconds if this pair never drafted here before."""
        self._costs = step_costs(reader, drafter, self._key)
        self._vocab = None if drafter is None else drafter.auto
        self._stats = recall_known(self._key) or DraftStats()

    def choose(self, drafter: ModelDrafter) -> None:
        """Make a drafter draft from what costs have decided, now or earlier, unless something else is asked for."""
        if self._vocab is None:
            self._vocab = recall_vocab(self._key)
        if self._vocab in drafter.candidates:
            drafter.auto = str(self._vocab)

    def auto(self, reader: Reader, drafter: ModelDrafter | None) -> AutoDrafter:
        """Drafting by cost for a conversation. All conversations share what is measured and learned."""
        if self._costs is None:
            self.measure(reader, drafter)
        assert self._costs is not None
        if drafter is not None:
            self.choose(drafter)
        return AutoDrafter(drafter, *self._costs, self._stats)

    def close(self) -> None:
        if self._costs is not None:
            remember_known(self._key, self._stats)
            self._costs = None
        self.model.close()
