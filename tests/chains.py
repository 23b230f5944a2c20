"""llama.cpp's own samplers in llama.cpp's own order: the reference for ours."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import llama_cpp
import numpy as np

from llamabase.llama.model import Model
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import Sampling

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


def llama_cpp_chain(
    sampling: Sampling,
    logits: np.ndarray,
    text: Sequence[int] = (),
    answer: Sequence[int] = (),
    model: Model | None = None,
    noise: Noise | None = None,
) -> dict[int, float]:
    """The distribution after `text`, which the grammar ignores, and `answer`; every sampler gets every token."""
    vocab = None if model is None else llama_cpp.llama_model_get_vocab(model.handle)
    n = len(logits)
    biases = (llama_cpp.llama_logit_bias * len(sampling.logit_bias))(*sampling.logit_bias.items())
    candidates = np.zeros(n, CANDIDATE)
    candidates["id"], candidates["logit"] = np.arange(n), logits
    candidates = _apply(llama_cpp.llama_sampler_init_logit_bias(n, len(biases), biases), candidates)
    if model is not None and sampling.grammar:
        grammar = llama_cpp.llama_sampler_init_grammar(vocab, sampling.grammar.encode(), b"root")
        for token in answer:
            llama_cpp.llama_sampler_accept(grammar, token)
        candidates = _apply(grammar, candidates)
    for name in sampling.samplers:
        if name == "xtc" and noise is not None:  # a coin of our own decides whether it acts at this position
            coin = noise.exponentials(len(text) + len(answer), np.array([-1]))[0]
            if np.exp(-coin) >= sampling.xtc_probability:
                continue
        if name == "typ_p" and sampling.typical_p < 1:  # it makes NaN of a candidate of probability 0
            candidates = candidates[candidates["logit"] > candidates["logit"].max() - 87]
        sampler = _made(name, sampling, n, vocab, len(text) + len(answer))
        for token in (*text, *answer):
            llama_cpp.llama_sampler_accept(sampler, token)
        candidates = _apply(sampler, candidates)
    kept = candidates[candidates["logit"] > -np.inf]
    weights = np.exp(kept["logit"].astype(np.float64) - kept["logit"].max())
    return dict(zip(kept["id"].tolist(), (weights / weights.sum()).tolist(), strict=True))


def _made(name: str, s: Sampling, n: int, vocab: object, length: int) -> object:
    breakers = [text.encode() for text in s.dry_sequence_breakers] if vocab is not None else []
    array = (ctypes.c_char_p * len(breakers))(*breakers)
    last = s.repeat_last_n if s.repeat_last_n >= 0 else length
    return {
        "penalties": lambda: llama_cpp.llama_sampler_init_penalties(
            n, last, s.repeat_penalty, s.frequency_penalty, s.presence_penalty
        ),
        "dry": lambda: llama_cpp.llama_sampler_init_dry(
            vocab, s.dry_multiplier, s.dry_base, s.dry_allowed_length, s.dry_penalty_last_n, array, len(breakers)
        ),
        "top_n_sigma": lambda: llama_cpp.llama_sampler_init_top_n_sigma(s.top_n_sigma),
        "top_k": lambda: llama_cpp.llama_sampler_init_top_k(s.top_k),
        "typ_p": lambda: llama_cpp.llama_sampler_init_typical(s.typical_p, s.min_keep),
        "top_p": lambda: llama_cpp.llama_sampler_init_top_p(s.top_p, s.min_keep),
        "min_p": lambda: llama_cpp.llama_sampler_init_min_p(s.min_p, s.min_keep),
        "xtc": lambda: llama_cpp.llama_sampler_init_xtc(float(s.xtc_probability > 0), s.xtc_threshold, s.min_keep, 1),
        "temperature": lambda: llama_cpp.llama_sampler_init_temp_ext(s.temp, s.dynatemp_range, s.dynatemp_exponent),
        "infill": lambda: llama_cpp.llama_sampler_init_infill(vocab),
    }[name]()


def _apply(sampler: object, candidates: np.ndarray) -> np.ndarray:
    candidates = candidates.copy()
    pointer = ctypes.POINTER(llama_cpp.llama_token_data)
    array = llama_cpp.llama_token_data_array(
        data=candidates.ctypes.data_as(pointer), size=len(candidates), selected=-1, sorted=False
    )
    llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
    llama_cpp.llama_sampler_free(sampler)
    first = (ctypes.addressof(array.data.contents) - candidates.ctypes.data) // CANDIDATE.itemsize
    return candidates[first : first + array.size]
