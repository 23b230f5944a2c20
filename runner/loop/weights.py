"""What is loaded once for a pair, whatever the number of conversations: weights, vocabulary, template, step costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf_trim.format.companion import companion_of
from gguf_trim.format.mtp import DrafterSource, OwnBlock
from gguf_trim.format.state_fed import STATE_FED
from llamabase.errors import EngineError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import ASSISTANT
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.context import BATCH, F16, Cache, ContextParams
from llamabase.llama.library import Closing, key_of
from llamabase.llama.model import Model, ModelParams
from llamabase.llama.template import ChatTemplate
from llamabase.llama.timing import StepCost
from runner.draft.auto import AutoDrafter
from runner.draft.company import Company
from runner.draft.contracts import AUTO
from runner.draft.cost import DraftStats
from runner.draft.drafters import ModelDrafter
from runner.draft.lookup import Answers
from runner.draft.measured import check_costs, recall_known, recall_vocab, remember_known, step_costs
from runner.draft.opening import DraftOptions
from runner.draft.reading import Reader


@dataclass(frozen=True)
class LoadOptions:
    """Which files to run, and how to load them.

    draft: a file of the target's vocabulary, trimmed or not, the target's own MTP block, or None. n_ctx: tokens of
    context; 0 takes as many as the model was trained on. n_threads: None for one per physical core. n_gpu_layers: None
    for llama.cpp's default. vocab: see `DraftOptions`. n_ctx_draft: tokens that the drafter remembers, if fewer than
    n_ctx. n_threads_draft, n_gpu_layers_draft: the drafter's; None for the target's. cache, cache_draft: the types of
    the KV caches. share_answers: drafts may come from the answers of earlier conversations over these weights. They
    change no text, but an answer then comes quicker if it repeats another one, which tells that there was one.

    device to n_cpu_moe_draft say where the weights go, as `ModelParams` does. A drafter takes the target's devices
    unless device_draft is given; tensor_split and main_gpu count the target's devices. override_tensor and n_cpu_moe
    name tensors of one model, so each model has its own. n_batch to offload_kqv: as in `ContextParams`, for both.

    Raises SettingError for what does not exist here.
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
    device: str | None = None
    device_draft: str | None = None
    split_mode: str = "layer"
    tensor_split: Sequence[float] = ()
    main_gpu: int = 0
    load_mode: str = "auto"
    override_tensor: str = ""
    override_tensor_draft: str = ""
    n_cpu_moe: int = 0
    n_cpu_moe_draft: int = 0
    n_batch: int | None = None
    n_ubatch: int = BATCH
    offload_kqv: bool = True
    share_answers: bool = True

    def __post_init__(self) -> None:
        _ = self.model_params, self.model_params_draft, self.context_params  # which are checked as they are made

    @property
    def model_params(self) -> ModelParams:
        """Where the target's weights go."""
        return ModelParams(**{field.name: getattr(self, field.name) for field in fields(ModelParams)})

    @property
    def model_params_draft(self) -> ModelParams:
        """Where the drafter's weights go."""
        named: dict[str, Any] = {"override_tensor": self.override_tensor_draft, "n_cpu_moe": self.n_cpu_moe_draft}
        if self.n_gpu_layers_draft is not None:
            named["n_gpu_layers"] = self.n_gpu_layers_draft
        if self.device_draft is not None:
            named |= {"device": self.device_draft, "tensor_split": (), "main_gpu": 0}
        return replace(self.model_params, **named)

    @property
    def context_params(self) -> ContextParams:
        """How the target computes."""
        return ContextParams(**{field.name: getattr(self, field.name) for field in fields(ContextParams)})

    def of_drafter(self, source: DrafterSource, n_ctx: int) -> DraftOptions:
        """The drafter's share, for a target that has n_ctx tokens of context."""
        threads = self.n_threads_draft or self.n_threads
        how = replace(self.context_params, n_threads=threads, cache=self.cache_draft)
        return DraftOptions(source, min(self.n_ctx_draft or n_ctx, n_ctx), self.vocab, self.model_params_draft, how)


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
        self.model = Model(options.target, options.model_params)
        self.draft_model: Model | None = None
        self.answers = Answers() if options.share_answers else None
        self._costs: tuple[StepCost, StepCost | None] | None = None
        self._measured = 0.0  # seconds that a plain step was measured to take
        self._vocab: object = None  # what costs have decided that drafters draft from
        self._stats = DraftStats()
        self.company = Company()

    @cached_property
    def _key(self) -> str:
        draft = self.options.draft
        files = [self.options.target, *([draft, companion_of(draft)] if isinstance(draft, Path) else [])]
        costless = ("target", "draft", "share_answers")  # what a step costs does not depend on them
        how = [getattr(self.options, field.name) for field in fields(LoadOptions) if field.name not in costless]
        return key_of(files, [isinstance(draft, OwnBlock), *how])

    def measure(self, reader: Reader, drafter: ModelDrafter | None) -> None:
        """Find out what steps cost here, which takes seconds if this pair never drafted here before."""
        self._costs = step_costs(reader, drafter, self._key)
        self._measured = self._costs[0].of(1)
        self._vocab = None if drafter is None else drafter.auto
        self._stats = recall_known(self._key) or DraftStats()

    def choose(self, drafter: ModelDrafter) -> None:
        """Make a drafter draft from what costs have decided, now or earlier, unless something else is asked for."""
        if self._vocab is None:
            self._vocab = recall_vocab(self._key)
        if self._vocab in drafter.candidates:
            drafter.auto = str(self._vocab)

    @property
    def may_share_cache(self) -> bool:
        """Whether conversations can share one cache: not of a recurrent target, whose states take much memory, nor of
        one whose cache an assistant reads, too.
        """
        draft = self.options.draft
        return not self.model.recurrent and not (isinstance(draft, Path) and GGUFFile(draft).architecture == ASSISTANT)

    def auto(self, reader: Reader, drafter: ModelDrafter | None) -> AutoDrafter:
        """Drafting by cost for a conversation. All conversations share what is measured and learned."""
        if self._costs is None:
            self.measure(reader, drafter)
        assert self._costs is not None
        if drafter is not None:
            self.choose(drafter)
        company = self.company if reader.context.n_parallel > 1 else None  # of a cache of its own nobody shares batches
        return AutoDrafter(drafter, *self._costs, self._stats, self.answers, company)

    def close(self) -> None:
        if self._costs is not None:
            remember_known(self._key, self._stats)
            check_costs(self._key, self._measured, self._costs[0].of(1))
            self._costs = None
        self.model.close()
