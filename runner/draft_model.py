"""TrimmedDraft: a trimmed (or stock) drafter as the draft model of llama-cpp-python's `Llama`.

from llama_cpp import Llama
from runner import TrimmedDraft

draft = TrimmedDraft("trimmed.gguf", num_pred_tokens=3, target="target.gguf")
llm = Llama("target.gguf", n_ctx=2048, logits_all=True, draft_model=draft)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp.llama_speculative import LlamaDraftModel

from gguf_trim.format.companion import Trimmed
from llamabase.errors import EngineError, VocabularyMismatch
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.context import ContextParams
from llamabase.llama.library import Closing
from llamabase.llama.model import ModelParams
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import GREEDY
from runner.draft.contracts import AUTO
from runner.draft.drafters import ModelDrafter
from runner.draft.opening import DraftOptions, open_drafter

_NO_NOISE = Noise(0)  # greedy drafts have none


class TrimmedDraft(Closing, LlamaDraftModel):  # type: ignore[misc]  # the package is untyped
    """Drafts num_pred_tokens tokens greedily from a drafter GGUF; for one `Llama` at a time, in one thread.

    With `target`, the path that `Llama` loads, the pair is checked here, and VocabularyMismatch is raised for a wrong
    one. Without it a wrong drafter shows only by ids that it does not have (VocabularyMismatch at the call) or by
    drafts that are never accepted; if the target's table is shorter, `Llama` may get an id that it does not know. n_ctx
    should be no less than Llama's, since nothing is drafted for longer texts. n_gpu_layers, device: see `ModelParams`.
    `vocab` and other errors: see `runner.draft.opening`.

    `Llama` (llama-cpp-python 0.3.36) uses drafts more slowly than `SpeculativeLM` does; see docs/llama-cpp-python.md.
    It keeps the logits of every position, and needs logits_all=True for texts beyond n_batch tokens. It asks for drafts
    of the same length whatever is left to say. At a temperature it samples from the target and compares, which is
    exact but accepts less often than shared noise does. It does not notice refused rewinds (recurrent targets).
    """

    def __init__(
        self,
        path: str | Path,
        num_pred_tokens: int = 3,
        *,
        target: str | Path | None = None,
        n_ctx: int = 4096,
        n_threads: int | None = None,
        n_gpu_layers: int | None = None,
        vocab: str = AUTO,
        device: str | None = None,
    ) -> None:
        self._path, self.num_pred_tokens = Path(path), num_pred_tokens
        vocabulary = self._own_vocabulary() if target is None else Vocabulary(GGUFFile(target))
        self._n_ids = len(vocabulary)
        options = DraftOptions(self._path, n_ctx, vocab, ModelParams(n_gpu_layers, device), ContextParams(n_threads))
        self._drafter: ModelDrafter | None = open_drafter(options, vocabulary)
        self._settled = True

    def _own_vocabulary(self) -> Vocabulary:
        file = GGUFFile(self._path)
        return Trimmed.open(self._path).vocabulary if "gguf_trim.d2t" in file.fields else Vocabulary(file)

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        """At most num_pred_tokens ids (int32) to follow `input_ids`, the text so far; none if its context is full.

        Reading continues from the longest prefix shared with the last call, whatever conversation that was.
        """
        if self._drafter is None:
            raise EngineError(f"{self._path}: used after it was closed")
        text = input_ids.tolist()
        if not text:
            return np.empty(0, np.intc)
        if not 0 <= min(text) <= max(text) < self._n_ids:
            wrong = max(text) if max(text) >= self._n_ids else min(text)
            raise VocabularyMismatch(
                f"{self._path}: was given token {wrong} and knows {self._n_ids}, so it is no drafter for this model; "
                "give TrimmedDraft target= to have a pair checked when it is opened"
            )
        if not self._settled:  # an interruption cut the last call short
            self._drafter.settle()
        self._settled = False
        draft = self._drafter.draft(text, self.num_pred_tokens, GREEDY, _NO_NOISE)
        self._settled = True
        return np.array(draft, np.intc)

    def close(self) -> None:
        """Free the drafter; later calls raise EngineError."""
        if self._drafter is not None:
            self._drafter.close()
            self._drafter = None
