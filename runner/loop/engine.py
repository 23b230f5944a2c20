"""A target and a drafter, opened and kept together; answers prompts round by round and adds up what they took."""

from __future__ import annotations

import codecs
import contextlib
import copy
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import TokenType

from gguf_trim.format.companion import companion_of
from gguf_trim.format.mtp import DrafterSource
from llamabase.errors import EngineError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.context import F16, Cache, Context
from llamabase.llama.ggml import release_threads
from llamabase.llama.library import Closing, key_of
from llamabase.llama.model import Model
from llamabase.llama.template import ChatTemplate
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import Sampling
from runner.draft.auto import LONGEST, AutoDrafter
from runner.draft.drafters import AUTO, Drafter, ModelDrafter, NoDrafter
from runner.draft.measured import recall_known, remember_known, step_costs
from runner.draft.opening import open_drafter
from runner.draft.reading import Reader
from runner.tools.calls import Form, control_tokens, form_of

from .speculative import Round, generate
from .stops import StopFilter

REWINDS = 7  # drafts of a round that a recurrent target can take back: each costs the memory of its whole state


@dataclass
class Record:
    """Raw counts and seconds of one answer; the rates are properties, 0 where nothing was counted.

    tokens counts what the target emitted, an end token included; the prompt is in none of the rates.
    """

    text: str = ""
    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    host_seconds: float = 0.0
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    finish_reason: str = "cancelled"
    token_ids: list[int] = field(default_factory=list, repr=False)
    accepted_by_round: list[int] = field(default_factory=list, repr=False)  # drafts accepted, by round that drafted

    def add(self, round_: Round) -> None:
        """Take a round's figures; its tokens, and whether it ends the answer, count as they are given out."""
        self.rounds += 1
        self.drafted += len(round_.drafted)
        self.accepted += round_.accepted
        self.accepted_by_round += [round_.accepted] if round_.drafted else []
        self.draft_seconds += round_.draft_seconds
        self.verify_seconds += round_.verify_seconds
        self.host_seconds += round_.host_seconds

    @property
    def seconds(self) -> float:
        """Wall time of the rounds: drafting, verifying, and Python's own share."""
        return self.draft_seconds + self.verify_seconds + self.host_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tau(self) -> float:
        """Mean accepted length: tokens per target call, the bonus token included."""
        return self.tokens / self.rounds if self.rounds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted, the bonus token excluded."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def as_json(self) -> dict[str, Any]:
        names = (
            "text", "tokens", "rounds", "drafted", "accepted", "seconds", "tokens_per_second", "tau", "acceptance_rate",
            "draft_seconds", "verify_seconds", "host_seconds", "prompt_tokens", "prompt_seconds", "finish_reason",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def line(self) -> str:
        """The closing line of an answer."""
        text = f"{self.tokens} token{'s' * (self.tokens != 1)}, {self.tokens_per_second:.1f} tok/s"
        if self.drafted:
            text += f", tau {self.tau:.2f}, acceptance {self.acceptance_rate:.0%}"
        return text


class Engine(Closing):
    """A target and, where `draft` is given, a drafter of the same vocabulary; `vocab`: see `open_drafter`.

    n_ctx: 0 takes as many tokens as the model was trained on. n_ctx_draft: tokens the drafter remembers, where that is
    fewer; n_threads_draft, n_gpu_layers_draft: the drafter's own, None for the target's; cache, cache_draft: types of
    the two KV caches.

    Raises EngineError or FileFormatError where a file does not load and VocabularyMismatch for a wrong pair.
    """

    def __init__(
        self,
        target: Path,
        draft: DrafterSource | None = None,
        *,
        n_ctx: int = 4096,
        n_threads: int | None = None,
        n_gpu_layers: int | None = None,
        vocab: str = AUTO,
        n_ctx_draft: int | None = None,
        cache: Cache = F16,
        cache_draft: Cache = F16,
        n_threads_draft: int | None = None,
        n_gpu_layers_draft: int | None = None,
    ) -> None:
        self.drafter: ModelDrafter | None = None
        self._auto: AutoDrafter | None = None
        self._first: Engine | None = None  # whose weights these are
        self._draft = draft
        self._settings = (n_ctx, n_threads, n_gpu_layers, vocab, n_ctx_draft, cache, cache_draft)
        self._own = (n_threads_draft or n_threads, n_gpu_layers if n_gpu_layers_draft is None else n_gpu_layers_draft)
        file = GGUFFile(target)
        if "gguf_trim.d2t" in file.fields:
            raise EngineError(f"{target}: is a trimmed drafter and cannot be the target; give it as the drafter")
        if "gguf_trim.companion" in file.fields:
            raise EngineError(f"{target}: is the companion of a trimmed drafter, not a model")
        self._vocabulary = Vocabulary(file)
        self._template = ChatTemplate(file, self._vocabulary)
        self.model = Model(target, n_gpu_layers)
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        """Open what holds a conversation."""
        n_ctx, n_threads, _, vocab, n_ctx_draft, cache, cache_draft = self._settings
        outputs = REWINDS + 1 if self.model.recurrent else 32  # tokens of a round
        n_ctx = min(n_ctx or self.model.n_ctx_train, self.model.n_ctx_train)
        self.context = Context(self.model, n_ctx, n_threads, n_outputs=outputs, cache=cache, rewinds=REWINDS)
        if self.model.recurrent and not self.context.rewinds:
            if self._draft is not None:
                kind = GGUFFile(self.model.path).architecture
                raise EngineError(
                    f"{self.model.path}: llama.cpp cannot rewind the cache of a {kind} model, which drafting needs; "
                    "run it without a drafter"
                )
            self.context.n_outputs = 1  # nor are guesses verified
        self.reader = Reader(self.context)
        if self._draft is not None:
            n_ctx = min(n_ctx_draft or self.context.n_ctx, self.context.n_ctx)
            limits = n_ctx, *self._own, vocab, cache_draft
            weights = None if self._first is None or self._first.drafter is None else self._first.drafter.model
            self.drafter = open_drafter(
                self._draft, self._vocabulary, *limits, target_context=self.context, model=weights
            )
        release_threads()

    def share_weights(self) -> Engine:
        """Another conversation over the same weights, which draws on what this one learns; to be closed before it."""
        other = copy.copy(self)
        other._first, other.drafter, other._auto = self, None, None
        try:
            other._begin()
        except BaseException:
            other.close()
            raise
        return other

    def close(self) -> None:
        if self._auto is not None and self._first is None:
            remember_known(self._key, self._auto.known)
        self._auto = None
        if self.drafter is not None:
            self.drafter.close()
        if hasattr(self, "context") and (self._first is None or self.context is not self._first.context):
            self.context.close()
        if self._first is None:
            self.model.close()

    def set_cancel_check(self, go_on: Callable[[], bool]) -> None:
        """Ask this before every batch of the target or the drafter; where it says no, EngineError is raised."""
        self.context.go_on = go_on
        if self.drafter is not None:
            self.drafter.set_cancel_check(go_on)

    @property
    def auto(self) -> AutoDrafter:
        """Drafting by cost over the engine's drafter; see `measure`."""
        if self._auto is None:
            self.measure()
        assert self._auto is not None
        return self._auto

    def measure(self) -> None:
        """Find out what steps cost here, which takes seconds where this pair never drafted here before.

        Drafting by cost does so at its first use.
        """
        if self._first is not None:
            self._auto = self._first.auto.share_weights(self.drafter)
            return
        draft = [self._draft, companion_of(self._draft)] if isinstance(self._draft, Path) else []
        self._key = key_of([self.model.path, *draft], (*self._settings, *self._own))
        costs = step_costs(self.reader, self.drafter, self._key)
        release_threads()
        self._auto = AutoDrafter(self.drafter, *costs, recall_known(self._key))

    def prompt(self, messages: Sequence[dict[str, Any]], tools: Any = None, **how: Any) -> list[int]:
        """Token ids of `prompt_text`, which takes the same."""
        return self._template.tokens(self.model, self.prompt_text(messages, tools, **how), self.context.n_ctx)

    def prompt_text(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Any = None,
        *,
        variables: Mapping[str, Any] | None = None,
        continued: bool | None = None,
        answered: bool = False,
    ) -> str:
        """What the GGUF's own chat template makes of a conversation; see `ChatTemplate.text`.

        continued None: the answer goes on from the last message if that is the assistant's, as llama-server has it.
        """
        if continued is None:
            continued = bool(messages) and not answered and messages[-1].get("role") == "assistant"
        return self._template.text(messages, tools, answered, continued=continued, variables=variables)

    @cached_property
    def form(self) -> Form:
        """How this model writes calls of tools."""
        return form_of(self._template)

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Ids of the control tokens that this model writes calls with, by name: they stand for no text elsewhere."""
        controls = np.flatnonzero(self._vocabulary.types == TokenType.CONTROL).tolist()
        names = {self._vocabulary.tokens[i].decode("utf-8", "replace"): i for i in controls}
        return control_tokens(self.form, names)

    def rounds(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int,
        draft_max: int | None = None,
        seed: int | None = None,
        drafter: Drafter | None = None,
        on_logits: Callable[[np.ndarray, list[int]], Any] = lambda logits, tokens: None,
    ) -> Iterator[Round]:
        """Continue a prompt of token ids; see `speculative.generate`.

        draft_max: tokens drafted a round; 0 is plain decoding; None lets measured costs decide (`auto`). `drafter`
        overrides the engine's own; `look`: see `generate`.
        """
        if drafter is None:
            fixed = self.drafter if self.drafter is not None and draft_max else NoDrafter()
            drafter = self.auto if draft_max is None else fixed
        return generate(
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

    def pieces(
        self, prompt: Sequence[int], sampling: Sampling, record: Record, stops: Sequence[str] = (), **settings: Any
    ) -> Generator[tuple[str, bool], None, None]:
        """The same as text, up to a stop string: pieces, each whole in UTF-8, and whether it was drafted and accepted.

        Fills `record` as it goes.
        """
        hold = StopFilter(stops)
        try:
            with contextlib.closing(self.token_texts(prompt, sampling, record, **settings)) as spoken:
                for text, drafted in hold.through(spoken):
                    record.text += text
                    yield text, drafted
        finally:
            if hold.stopped:
                record.finish_reason = "stop"

    def token_texts(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        record: Record,
        shown: Collection[int] = (),
        **settings: Any,
    ) -> Generator[tuple[str, bool], None, None]:
        """Token by token, but for one that ends the answer: its text, and whether it was drafted and accepted.

        A character that is split over tokens belongs to the one that completes it; one that the answer breaks off in is
        left out. shown: control tokens whose names are text here. Fills `record` but for its text.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        record.prompt_tokens = len(prompt)
        rounds: Any = self.rounds(prompt, sampling, **settings)  # which may measure what steps cost first
        started = time.perf_counter()
        with contextlib.closing(rounds):
            for round_ in rounds:
                if not record.rounds:
                    first = round_.draft_seconds + round_.verify_seconds + round_.host_seconds
                    record.prompt_seconds = time.perf_counter() - started - first
                record.add(round_)
                for i, token in enumerate(round_.tokens, 1):
                    record.tokens += 1
                    record.token_ids.append(token)
                    if i == len(round_.tokens):
                        record.finish_reason = round_.finish or record.finish_reason
                    if round_.finish != "stop" or i < len(round_.tokens):
                        piece = self.model.piece(token, special=token in shown)
                        yield decoder.decode(piece), i <= round_.accepted
        if not record.rounds:  # only the prompt was to be read
            record.prompt_seconds = time.perf_counter() - started
