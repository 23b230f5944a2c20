"""llama.cpp's own samplers in llama.cpp's own order: what ours are compared with."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import llama_cpp
import numpy as np

from llamabase.llama import Model
from llamabase.sampling import Sampling

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


def llama_cpp_chain(
    sampling: Sampling,
    logits: np.ndarray,
    text: Sequence[int] = (),
    answer: Sequence[int] = (),
    model: Model | None = None,
) -> dict[int, float]:
    """The law after `text`, which the grammar does not see, and `answer`, which it does."""
    n = len(logits)
    biases = (llama_cpp.llama_logit_bias * len(sampling.logit_bias))(*sampling.logit_bias.items())
    last_n = sampling.repeat_last_n if sampling.repeat_last_n >= 0 else len(text) + len(answer)
    first = [
        llama_cpp.llama_sampler_init_logit_bias(n, len(biases), biases),
        llama_cpp.llama_sampler_init_penalties(
            n, last_n, sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty
        ),
    ]
    for token in text:
        llama_cpp.llama_sampler_accept(first[1], token)
    if model is not None and sampling.grammar:
        vocab = llama_cpp.llama_model_get_vocab(model.handle)
        first.insert(0, llama_cpp.llama_sampler_init_grammar(vocab, sampling.grammar.encode(), b"root"))
    for sampler in first:
        for token in answer:
            llama_cpp.llama_sampler_accept(sampler, token)
    candidates = np.zeros(n, CANDIDATE)
    candidates["id"], candidates["logit"] = np.arange(n), logits
    masked = _apply(first, candidates)
    # Typical sampling makes NaN of a candidate without probability, so they are taken out here.
    kept = _apply(
        [
            llama_cpp.llama_sampler_init_top_k(sampling.top_k),
            llama_cpp.llama_sampler_init_typical(sampling.typical_p, 1),
            llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1),
            llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1),
            llama_cpp.llama_sampler_init_temp(sampling.temp),
        ],
        masked[masked["logit"] > -np.inf],
    )
    kept = kept[kept["logit"] > -np.inf]
    weights = np.exp(kept["logit"].astype(np.float64) - kept["logit"].max())
    return dict(zip(kept["id"].tolist(), (weights / weights.sum()).tolist(), strict=True))


def _apply(samplers: Sequence[object], candidates: np.ndarray) -> np.ndarray:
    candidates = candidates.copy()
    pointer = ctypes.POINTER(llama_cpp.llama_token_data)
    array = llama_cpp.llama_token_data_array(
        data=candidates.ctypes.data_as(pointer), size=len(candidates), selected=-1, sorted=False
    )
    for sampler in samplers:
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
        llama_cpp.llama_sampler_free(sampler)
    return candidates[: array.size]
