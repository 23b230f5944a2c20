"""Which token ids an export holds: those of a list, or those that a trim by counts would keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gguf_trim.exchange.token_ids import read_token_ids
from llamabase.errors import VocabularyMismatch
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import MOST_TOKENS, Vocabulary

from .keep import Keep, choose_rows


def chosen_ids(counts: Path, tokenizer: Path, k: int | None, has_row: np.ndarray | None = None) -> Keep:
    """The k ids that a trim by these counts keeps, of those that a head has a row for (bool by id; None: of all).

    Padding is never among them. Raises VocabularyMismatch if the head has fewer ids than the vocabulary has tokens.
    """
    vocabulary = Vocabulary(GGUFFile(tokenizer))
    if has_row is None:
        has_row = np.ones(vocabulary.n_real, bool)
    elif len(has_row) < vocabulary.n_real:
        raise VocabularyMismatch(
            f"{tokenizer}: has {vocabulary.n_real} tokens and the checkpoint's target {len(has_row)}; give a GGUF of "
            "the model that the checkpoint was made for"
        )
    return choose_rows(vocabulary, has_row & (np.arange(len(has_row)) < vocabulary.n_real), 1, k=k, counts=counts)


def listed_ids(source: Path, n_vocab: int = MOST_TOKENS) -> np.ndarray:
    """int64, the ids of a list or of a trimmed drafter, ascending and each once."""
    return np.unique(np.array(read_token_ids(source, n_vocab), np.int64))
