"""The speculative loop: draft, verify in one batch, accept, rewind. A generator of small records.

Adding up and printing a whole answer are outer layers; see `engine`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from functools import partial

import numpy as np

from llamabase.errors import EngineError
from llamabase.llama.ggml import release_threads
from llamabase.llama.library import interruptible
from llamabase.sampling.chain import Chain
from llamabase.sampling.noise import Distribution, Noise
from llamabase.sampling.settings import Sampling
from runner.draft.contracts import Drafter, Round
from runner.draft.reading import Reader

from .acceptance import accept


def generate(
    target: Reader,
    drafter: Drafter,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    max_tokens: int,
    draft_max: int,
    is_end: Callable[[int], bool],
    noise: Noise,
    on_logits: Callable[[np.ndarray, list[int]], object] | None = None,
) -> Generator[Round, None, None]:
    """Continue `prompt` (target ids, at least one), round by round, exactly as the target alone would.

    With the same noise the text is the same for any drafter and draft length, apart from near-ties of a quantised
    target, where the shape of a batch changes the last bits of a logit.

    Emits at most max_tokens tokens and never more than the context holds. The target may already hold a beginning of
    the prompt: only the rest is read. Closing the generator leaves target and drafter usable. `on_logits` gets the
    target's logits (float32, a row for each emitted token, a view) before samplers change them, and the tokens.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token (BOS, if the vocabulary has one)")
    text = list(prompt)
    n_ctx = target.context.n_ctx
    if len(text) > n_ctx:
        raise EngineError(
            f"a conversation of {len(text)} tokens does not fit a context of {n_ctx}: raise --ctx-size (n_ctx; this "
            f"model was trained on {target.context.model.n_ctx_train}), shorten it, or /reset"
        )
    left = min(max_tokens, n_ctx - len(text) + 1)
    chain = Chain(sampling, text, target.context.model, noise)
    # An interruption may have cut the settling of the last answer short.
    target.settle()
    drafter.settle()
    try:
        target.read_prompt(text)
        if draft_max > 0:
            drafter.prepare(text, left)
        while left > 0:
            started, before = time.perf_counter(), (drafter.seconds, target.context.seconds)
            # A round of n drafts can emit n + 1 tokens, and feeds n + 1 to the target.
            n = min(draft_max, left - 1, n_ctx - len(text), target.context.n_outputs - 1, target.context.undoable)
            with interruptible():  # around all calls of the round
                drafts = drafter.draft(text, n, sampling, noise)
                n_made = len(drafts)
                del drafts[chain.fitting(drafts) :]  # a draft that a schema forbids falls, with those after it
                n_read = len(text) - len(target.held) + len(drafts)
                logits = target.verify(text, drafts)
            accepted, following = accept(partial(_p_at, logits, chain, drafts), drafts, noise, len(text))
            chain.accept(following)
            tokens = [*drafts[:accepted], following]
            end = next((i for i, token in enumerate(tokens) if is_end(token)), None)
            if end is not None:
                del tokens[end + 1 :]
            if on_logits is not None:
                on_logits(logits[: len(tokens)], tokens)
            text += tokens
            left -= len(tokens)
            # The last token that was emitted has not been read yet.
            target.keep(text, len(text) - 1)
            after = (drafter.seconds, target.context.seconds)
            draft_seconds, verify_seconds = after[0] - before[0], after[1] - before[1]
            accepted = min(accepted, len(tokens))
            seconds = time.perf_counter() - started
            round_ = Round(
                tokens,
                drafts,
                accepted,
                draft_seconds,
                verify_seconds,
                seconds - draft_seconds - verify_seconds,
                "stop" if end is not None else "length" if left <= 0 else None,
            )
            drafter.learn(round_, n_made, n_read, target.context.last_batch)
            yield round_
            if end is not None:
                return
    finally:
        target.settle()
        drafter.settle()
        release_threads()


def _p_at(logits: np.ndarray, chain: Chain, drafts: Sequence[int], i: int) -> Distribution:
    """The target's distribution in row i. `accept` asks for it once, after the draft before it was accepted."""
    if i:
        chain.accept(drafts[i - 1])
    return chain.distribution(logits[i])
