"""Counting: texts in, how often each token of a vocabulary occurs out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .counts import Counts
from .errors import TrimError
from .gguf_file import GGUFFile
from .llama import Model
from .sources import files_of, texts_of
from .vocabulary import Vocabulary


def count(
    sources: list[Path], tokenizer: Path, field: str = "text", advance: Callable[[int], object] = lambda _: None
) -> Counts:
    """Count every token of the sources as llama.cpp tokenizes them for `tokenizer` (a GGUF).

    Special tokens that stand in a text are read as text. Raises TrimError where nothing was counted.
    """
    vocabulary = Vocabulary(GGUFFile(tokenizer))
    dense = np.zeros(len(vocabulary), np.int64)
    named = set(sources)
    with Model(tokenizer, vocab_only=True) as model:
        for path in files_of(sources):
            for text in texts_of(path, field, binary_is_error=path in named):
                ids = model.tokenize(text, special=False, add_bos=False)
                dense += np.bincount(np.array(ids, np.int64), minlength=len(dense))
            advance(path.stat().st_size)
    if not dense.any():
        raise TrimError(f"{', '.join(map(str, sources))}: no text to count")
    return Counts.of(dense, vocabulary, ", ".join(sorted(str(source) for source in sources)))
