"""An Engine holds one conversation of a target and its drafter, and answers prompts with it."""

from __future__ import annotations

import codecs
import contextlib
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any

import numpy as np

from llamabase.errors import EngineError
from llamabase.llama.context import Context
from llamabase.llama.ggml import release_threads
from llamabase.llama.library import Closing
from llamabase.llama.meeting import Meeting
from llamabase.llama.model import Model
from llamabase.llama.rounds import LONGEST
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import Sampling
from runner.draft.auto import AutoDrafter
from runner.draft.contracts import Drafter, NoDrafter, Round
from runner.draft.drafters import ModelDrafter
from runner.draft.lookup import Answers
from runner.draft.opening import open_drafter
from runner.draft.reading import Reader

from .record import Record
from .speculative import generate
from .stops import StopFilter, TextPiece
from .weights import LoadOptions, Weights

# REWINDS: tokens of a batch whose states a recurrent target keeps. A state takes 50 MB for Qwen3.5-4B and -9B, of which
# there are 2 (1 + REWINDS), and keeping them takes up to 7 % of a step. Without them the accepted tokens of a round are
# read again, each for a quarter to a half of a plain step (docs/results/2026-11-29-hybrid-targets.json).
REWINDS = 3
OUTPUTS = 32  # tokens of a round


class Engine(Closing):
    """One conversation of a target and, if there is one, its drafter. `first`: another one of the same weights, which
    must be closed after this one. `n_parallel`: how many conversations there may be, which share the cache.

    Raises EngineError or FileFormatError if a file does not load, and VocabularyMismatch for a wrong pair.
    """

    def __init__(self, options: LoadOptions, n_parallel: int = 1, first: Engine | None = None) -> None:
        self.weights: Weights = Weights(options) if first is None else first.weights
        self.context: Context
        self.taken: set[int]  # numbers of sequences of its cache
        self.model: Model = self.weights.model
        self.drafter: ModelDrafter | None = None
        self._auto: AutoDrafter | None = None
        self._opened = contextlib.ExitStack()
        try:
            if first is None:
                self._opened.callback(self.weights.close)
            self._open(options, n_parallel, first)
        except BaseException:
            self.close()
            raise

    def _open(self, options: LoadOptions, n_parallel: int, first: Engine | None) -> None:
        model = self.model
        n_ctx = options.n_ctx or model.n_ctx_train
        if first is not None and first.context.n_parallel > 1:
            place = min(set(range(first.context.n_parallel)) - first.taken)
            self.context, self.taken = first.context.beside(place), first.taken
            self.taken.add(place)
            self._opened.callback(self.taken.discard, place)
        else:
            n_parallel = n_parallel if self.weights.may_share_cache else 1
            outputs = max(OUTPUTS, n_parallel * (LONGEST + 1))
            self.context = Context(
                model,
                n_ctx if n_parallel > 1 else min(n_ctx, model.n_ctx_train),
                options.context_params,
                n_outputs=outputs,
                rewinds=REWINDS,
                n_parallel=n_parallel,
            )
            self.taken = {0}
        self._opened.callback(self.context.close)
        if not self.context.sequence and not self.context.goes_back([0, 1]):
            if options.draft is not None:
                raise EngineError(
                    f"{model.path}: llama.cpp cannot rewind the cache of a {self.weights.architecture} model, which "
                    "drafting needs; run it without a drafter"
                )
            self.context.n_outputs = 1  # lookup cannot draft for it either
        self.reader = Reader(self.context)
        if options.draft is not None:
            drafting = options.of_drafter(options.draft, self.context.n_ctx)
            loaded = self.weights.draft_model
            before = None if first is None else first.drafter
            self.drafter = open_drafter(drafting, self.weights.vocabulary, self.context, loaded, before)
            self.weights.draft_model = self.drafter.reading.context.model
            self.weights.choose(self.drafter)
            self._opened.callback(self.drafter.close)
        release_threads()

    def share_weights(self) -> Engine:
        """Another conversation over the same weights; close it before this one."""
        return Engine(self.weights.options, first=self)

    def forget(self) -> None:
        """Empty the caches."""
        for context in self.contexts:
            context.rewind(0)
        self.reader.settle()
        if self.drafter is not None:
            self.drafter.settle()

    @property
    def contexts(self) -> list[Context]:
        """Those that read the text: the target's, and the drafter's if it has one of its own."""
        own = [] if self.drafter is None else [self.drafter.reading.context]
        return [self.context, *(context for context in own if isinstance(context, Context))]

    def meet(self, meeting: Meeting) -> None:
        """Compute beside other conversations, in batches with those of the same cache."""
        for context in self.contexts:
            context.meet(meeting, last=context is self.context)

    def close(self) -> None:
        self._opened.close()

    def set_cancel_check(self, go_on: Callable[[], bool]) -> None:
        """Call `go_on` before every batch of target and drafter. EngineError is raised if it returns False."""
        self.context.go_on = go_on
        if self.drafter is not None:
            self.drafter.set_cancel_check(go_on)

    @property
    def auto(self) -> AutoDrafter:
        """Drafting by cost over the engine's drafter. Its first use measures what steps cost, unless that is known."""
        if self._auto is None:
            self._auto = self.weights.auto(self.reader, self.drafter)
            release_threads()
        return self._auto

    def measure(self) -> None:
        """Find out what steps cost here, which takes seconds if this pair never drafted here before."""
        self.weights.measure(self.reader, self.drafter)
        release_threads()
        self._auto = None

    def prompt(self, messages: Sequence[dict[str, Any]], tools: Any = None, **how: Any) -> list[int]:
        """The token ids of `prompt_text`, which takes the same arguments."""
        text = self.prompt_text(messages, tools, **how)
        return self.weights.template.tokens(self.model, text, self.context.n_ctx)

    def prompt_text(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Any = None,
        *,
        variables: Mapping[str, Any] | None = None,
        continued: bool | None = None,
        answered: bool = False,
    ) -> str:
        """The text that the GGUF's own chat template makes of a conversation; see `ChatTemplate.text`.

        continued None: the answer continues the last message if that is the assistant's, as in llama-server.
        """
        if continued is None:
            continued = bool(messages) and not answered and messages[-1].get("role") == "assistant"
        return self.weights.template.text(messages, tools, answered, continued=continued, variables=variables)

    def rounds(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int,
        draft_max: int | None = None,
        seed: int | None = None,
        drafter: Drafter | None = None,
        on_logits: Callable[[np.ndarray, list[int]], object] | None = None,
    ) -> Generator[Round, None, None]:
        """Continue a prompt of token ids; see `speculative.generate`.

        draft_max: tokens drafted in a round; 0 is plain decoding; None lets measured costs decide (`auto`). `drafter`
        overrides the engine's own.
        """
        if self.drafter is not None:
            self.drafter.forget(prompt)
        if drafter is None:
            fixed = self.drafter if self.drafter is not None and draft_max else NoDrafter()
            drafter = self.auto if draft_max is None else fixed
        rounds = generate(
            self.reader,
            drafter,
            prompt,
            sampling,
            max_tokens=max_tokens,
            draft_max=LONGEST if draft_max is None else draft_max,
            is_end=self.model.is_end,
            noise=Noise(seed),
            on_logits=on_logits,
        )
        rounds = rounds if self.weights.answers is None else _added(rounds, self.weights.answers)
        if self.context.n_parallel == 1:
            return rounds
        return self.weights.company.seen(rounds, drafter, isinstance(drafter, AutoDrafter))

    def pieces(
        self, prompt: Sequence[int], sampling: Sampling, record: Record, stops: Sequence[str] = (), **settings: Any
    ) -> Generator[TextPiece, None, None]:
        """The same as text, up to a stop string. Each piece is whole in UTF-8. Fills `record` as it goes."""
        stopping = StopFilter(stops)
        try:
            with contextlib.closing(self.token_texts(prompt, sampling, record, **settings)) as texts:
                for piece in stopping.through(texts):
                    record.text += piece.text
                    yield piece
        finally:
            if stopping.stopped:
                record.finish_reason = "stop"

    def token_texts(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        record: Record,
        shown: Collection[int] = (),
        **settings: Any,
    ) -> Generator[TextPiece, None, None]:
        """The text of each token, except one that ends the answer.

        A character that is split over tokens belongs to the token that completes it; an incomplete one at the end is
        left out. shown: control tokens whose names are text here. Fills `record` except its text.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        record.prompt_tokens = len(prompt)
        rounds = self.rounds(prompt, sampling, **settings)  # may measure what steps cost first
        record.vocab = "" if self.drafter is None or settings.get("draft_max") == 0 else self.drafter.using
        started = time.perf_counter()
        with contextlib.closing(rounds):
            for round_ in rounds:
                if not record.rounds:
                    record.prompt_seconds = time.perf_counter() - started - round_.seconds
                record.add(round_)
                for i, token in enumerate(round_.tokens, 1):
                    record.tokens += 1
                    record.token_ids.append(token)
                    if i == len(round_.tokens):
                        record.finish_reason = round_.finish or record.finish_reason
                    if round_.finish != "stop" or i < len(round_.tokens):
                        piece = self.model.piece(token, special=token in shown)
                        yield TextPiece(decoder.decode(piece), i <= round_.accepted)
        if not record.rounds:  # max_tokens was 0: only the prompt was read
            record.prompt_seconds = time.perf_counter() - started


def _added(rounds: Generator[Round, None, None], answers: Answers) -> Generator[Round, None, None]:
    """The same rounds; what they emitted, to the end or to an interruption, is added to the answers."""
    tokens = list[int]()
    try:
        with contextlib.closing(rounds):
            for round_ in rounds:
                tokens += round_.tokens
                yield round_
    finally:
        if tokens:
            answers.add(tokens)
