"""Tokenizing at scale: Hugging Face's `tokenizers`, built from the GGUF itself, on all cores.

transformers builds the same from a GGUF (`AutoTokenizer.from_pretrained(gguf_file=...)`), but needs PyTorch and ten
seconds, where this takes one. A sample is compared with llama.cpp's own tokenizer of the same file; if they differ, or
if the vocabulary is not byte-level BPE, llama.cpp tokenizes, on as many threads.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.library import Closing
from llamabase.llama.model import Model

# The expressions by which llama.cpp splits text before merging, one after the other, by `tokenizer.ggml.pre`.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPLITS = {
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "qwen2": [rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"],
    "llama-bpe": [rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"],
}

SAMPLE = (
    "It's 12345 o'clock; THEY'RE here.\n\n  def f(x_1):\n\treturn {'a': [1.5e-3, x**2]}  # naïve café\r\n"
    "Größe Straße — «Ответ» 这是一个测试。日本語のテキスト、한국어 문장입니다. العربية हिन्दी ไทย\n"
    "🐈\u200d⬛🎉 e\u0301\u00a0\u3000!?…\n"
    '<p class="x">&amp;</p>   \n\n\n$\\frac{a}{b}$ http://example.org/?q=1&r=2 \u200b\t\t<|im_end|></s>[INST]'
)


def _fast(file: GGUFFile, vocabulary: Vocabulary) -> Any:
    """A `tokenizers.Tokenizer` of a byte-level BPE, or None if it cannot be built."""
    splits = _SPLITS.get(file.get("tokenizer.ggml.pre", ""))
    if vocabulary.model != "gpt2" or splits is None or "tokenizer.ggml.merges" not in file.fields:
        return None
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    except ImportError:
        return None
    ids = {text.decode("utf-8"): i for i, text in enumerate(vocabulary.tokens)}
    pairs = (merge.decode("utf-8").partition(" ") for merge in file.strings("tokenizer.ggml.merges"))
    merges = [(left, right) for left, _, right in pairs]
    try:
        tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=file.get("tokenizer.ggml.pre") == "llama-bpe"))
    except Exception:  # of the library's own, for inconsistent merges, which llama.cpp takes
        return None
    cut = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, bytes_])
    return tokenizer


class Counter(Closing):
    """Counts the tokens of many texts in the vocabulary of a GGUF, on all cores; several threads may use it."""

    def __init__(self, path: Path) -> None:
        file = GGUFFile(path)
        self.vocabulary = Vocabulary(file)
        self._model = Model(path, vocab_only=True)
        self.fast = _fast(file, self.vocabulary)
        if self.fast is not None and self.fast.encode(SAMPLE).ids != self._slow(SAMPLE, False):
            self.fast = None
        self._pool = ThreadPoolExecutor(os.cpu_count())

    def count(self, texts: Sequence[str], special: bool) -> np.ndarray:
        """int64 (n_vocab): how often each token occurs. special: names of control tokens are tokens, not text."""
        if self.fast is not None and not special:
            encoded = self.fast.encode_batch_fast(texts, add_special_tokens=False)
            parts = [np.array(each.ids, np.int64) for each in encoded]
        else:  # llama.cpp releases Python's lock
            tokens = self._pool.map(self._slow, texts, itertools.repeat(special))
            parts = [np.array(ids, np.int64) for ids in tokens]
        return np.bincount(np.concatenate(parts), minlength=len(self.vocabulary))

    def _slow(self, text: str, special: bool) -> list[int]:
        return self._model.tokenize(text, special=special, add_bos=False)

    def close(self) -> None:
        self._pool.shutdown()
        self._model.close()
