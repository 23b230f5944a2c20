"""Bundled counts, so that a trim needs no calibration run; docs/counts.md says how they were made.

`ready/<name>.npz` are counts of known vocabularies, by fingerprint. `ready/pieces.json.gz` holds the same text as
frequent pieces with their counts, `[[text, count], ...]`, to be tokenized by any other vocabulary.
"""

from __future__ import annotations

import gzip
import importlib.resources
import json
from pathlib import Path

import numpy as np

from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.model import Model

from .counts import Counts

_FOLDER = importlib.resources.files("corpus") / "ready"


def ready_counts(vocabulary: Vocabulary) -> Counts:
    """The bundled counts in this vocabulary: exact ones if its fingerprint is known, else made from the pieces."""
    index: dict[str, str] = json.loads((_FOLDER / "index.json").read_text("utf-8"))
    if (name := index.get(vocabulary.fingerprint)) is not None:
        with importlib.resources.as_file(_FOLDER / name) as path:
            return Counts.load(path)
    pieces: list[tuple[str, int]] = json.loads(gzip.decompress((_FOLDER / "pieces.json.gz").read_bytes()))
    dense = np.zeros(len(vocabulary), np.int64)
    with Model(vocabulary.path, vocab_only=True) as model:
        for text, count in pieces:
            for token in model.tokenize(text, special=False, add_bos=False):
                dense[token] += count
    return Counts.of(dense, vocabulary, "the shipped pieces, tokenized by this vocabulary")


def ranking_counts(vocabulary: Vocabulary, path: Path | None) -> Counts:
    """The counts that rank rows: those of a file, or the bundled ones for None."""
    return Counts.load(path) if path is not None else ready_counts(vocabulary)
