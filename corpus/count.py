"""Counting: documents in, how often each token of a vocabulary occurs out, by source and by language."""

from __future__ import annotations

import hashlib
import time
import unicodedata
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from llamabase.cli.progress import Advance
from llamabase.errors import TrimError
from llamabase.gguf.reader import GGUFFile
from llamabase.llama.template import ChatTemplate

from .counts import Counts, Part
from .sources import Document, Reader, files_of
from .tokenizer import Counter

BATCH_CHARS = 1 << 20  # tokenized at a time: enough for every core, and all the memory the corpus takes
HELD_OUT = 50  # one document in so many is never counted, to judge the counts by
_SCRIPTS = {
    *("LATIN", "CYRILLIC", "GREEK", "CJK", "HIRAGANA", "HANGUL"),
    *("ARABIC", "HEBREW", "DEVANAGARI", "BENGALI", "TAMIL", "THAI"),
}


def script_of(text: str) -> str:
    """The script most letters of a text's beginning are in, by Unicode name: "latin", "cjk", ...; "other" for none."""
    found: Tally[str] = Tally()
    for char in text[:400]:
        if char.isalpha():
            name = unicodedata.name(char, "").split(" ")[0]
            found["HIRAGANA" if name == "KATAKANA" else name] += 1
    # Japanese is written with kana among more numerous ideographs.
    if found["HIRAGANA"] * 5 > found["CJK"]:
        found["HIRAGANA"] += found.pop("CJK", 0)
    best = found.most_common(1)
    return best[0][0].lower() if best and best[0][0] in _SCRIPTS else "other"


def held_out(text: str) -> bool:
    """Whether a document is kept out of the counts: decided by its text alone, so on every machine alike."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT == 0


class NothingToCount(TrimError):
    """Sources without any text."""


def count(
    sources: Sequence[str | Path],
    tokenizer: Path,
    field: str = "text",
    *,
    name: str | None = None,
    max_tokens: int | None = None,
    bad: list[str] | None = None,
    left_out: list[str] | None = None,
    advance: Advance = lambda amount, note="": None,
) -> Counts:
    """Count the documents of the sources in the vocabulary of `tokenizer` (a GGUF).

    Special tokens that stand in a plain text are read as text. Tables group by source, or by `name`: that of the
    folder a file was found in. About max_tokens of each source are read. What is said of bad rows is added to `bad`;
    None refuses them. What is said of files of a folder that are not text is added to `left_out`. `advance` is told the
    characters of every batch. A corpus so small that all of it is held out gives counts with a total of 0; see
    `Counts.with_held_out`. Raises NothingToCount where there was no text.
    """
    dense: dict[tuple[str, str, bool], np.ndarray] = {}
    total, started = 0, time.perf_counter()
    with Counter(tokenizer) as counter:
        reader = Reader(field, ChatTemplate(GGUFFile(tokenizer), counter.vocabulary), bad, left_out)
        for source in map(str, sources):
            begun = total
            named = name in (None, name_of(source))
            files = files_of([source])
            documents = (found for file, itself in files for found in reader.documents(file, itself and named))
            for (label, held, _), characters, counted in _counted(counter, _batches(documents)):
                key = (name_of(source) if name is None else name, label, held)
                dense[key] = dense[key] + counted if key in dense else counted
                total += int(counted.sum())
                advance(characters, f"{total / (time.perf_counter() - started):,.0f} tok/s")
                if max_tokens is not None and total - begun >= max_tokens:
                    break
        parts = [Part.of(*key, counts) for key, counts in sorted(dense.items()) if counts.any()]
        if not parts:
            raise NothingToCount(f"{', '.join(map(str, sources))}: no text to count")
        return Counts.of_parts(parts, counter.vocabulary, ", ".join(sorted(map(str, sources))))


def name_of(source: str) -> str:
    """What a source is called in tables."""
    return source if source.startswith("hf:") else Path(source).name or source


def _counted(
    counter: Counter, batches: Iterable[tuple[tuple[str, bool, bool], list[str]]]
) -> Iterator[tuple[tuple[str, bool, bool], int, np.ndarray]]:
    """Kind, characters and counts (int64, n_vocab) of each batch; counted while the next one is tokenized."""
    with ThreadPoolExecutor(1) as pool:
        before = None
        for kind, texts in batches:
            found = counter.encode(texts, special=kind[2])
            if before is not None:
                yield *before[:2], before[2].result()
            before = kind, sum(map(len, texts)), pool.submit(counter.bincount, found)
        if before is not None:
            yield *before[:2], before[2].result()


def _batches(documents: Iterator[Document]) -> Iterator[tuple[tuple[str, bool, bool], list[str]]]:
    """Documents of one kind (label, held out, special) at a time, in batches of about BATCH_CHARS in all."""
    waiting: dict[tuple[str, bool, bool], list[str]] = {}
    size = 0
    for document in documents:
        key = (document.label or script_of(document.text), held_out(document.text), document.special)
        waiting.setdefault(key, []).append(document.text)
        size += len(document.text)
        if size >= BATCH_CHARS:
            yield from waiting.items()
            waiting, size = {}, 0
    yield from waiting.items()
