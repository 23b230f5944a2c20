"""Counting: documents in, how often each token of a vocabulary occurs out, by source and by language."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llamabase.errors import TrimError
from llamabase.gguf_file import GGUFFile
from llamabase.template import ChatTemplate

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


@dataclass
class _Bins:
    """Dense counts of each group, filled in the background while the next batch is tokenized."""

    counter: Counter
    dense: dict[tuple[str, str, bool], np.ndarray] = field(default_factory=dict)
    tokens: int = 0
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _pending: Future[int] | None = None

    def add(self, key: tuple[str, str, bool], texts: list[str], special: bool) -> None:
        found = self.counter.encode(texts, special)
        self.settle()
        self._pending = self._pool.submit(self._count, key, found)

    def _count(self, key: tuple[str, str, bool], found: Any) -> int:
        counted = self.counter.bincount(found)
        self.dense[key] = self.dense[key] + counted if key in self.dense else counted
        return int(counted.sum())

    def settle(self) -> None:
        if self._pending is not None:
            self.tokens += self._pending.result()
            self._pending = None

    def close(self) -> None:
        self._pool.shutdown()


def count(
    sources: Sequence[str | Path],
    tokenizer: Path,
    field: str = "text",
    *,
    name: str | None = None,
    max_tokens: int | None = None,
    skip_bad: Callable[[str], None] | None = None,
    advance: Callable[[int, int], object] = lambda characters, tokens: None,
) -> Counts:
    """Count the documents of the sources in the vocabulary of `tokenizer` (a GGUF).

    Special tokens that stand in a plain text are read as text. Tables group by source, or by `name`: that of the
    folder a file was found in. About max_tokens of each source are read. advance(characters, tokens) is told of every
    batch. A corpus so small that all of it is held out gives counts with a total of 0; see `Counts.with_held_out`.
    Raises TrimError where there was no text.
    """
    with closing(Counter(tokenizer)) as counter:
        template = ChatTemplate(GGUFFile(tokenizer), counter.vocabulary)
        reader = Reader(field, template, skip_bad)
        with closing(_Bins(counter)) as bins:
            for source in map(str, sources):
                _count_source(source, name, reader, bins, max_tokens, advance)
        parts = [Part.of(*key, dense) for key, dense in sorted(bins.dense.items()) if dense.any()]
        made_from = ", ".join(sorted(map(str, sources)))
        counts = Counts.of_parts(parts, counter.vocabulary, made_from)
    if not counts.parts:
        raise TrimError(f"{', '.join(map(str, sources))}: no text to count")
    return counts


def name_of(source: str) -> str:
    """What a source is called in tables."""
    return source if source.startswith("hf:") else Path(source).name or source


def _count_source(
    source: str,
    name: str | None,
    reader: Reader,
    bins: _Bins,
    max_tokens: int | None,
    advance: Callable[[int, int], object],
) -> None:
    begun = bins.tokens
    for (label, held, special), texts in _batches(_documents(source, reader, named=name in (None, name_of(source)))):
        before = bins.tokens
        bins.add((name_of(source) if name is None else name, label, held), texts, special)
        advance(sum(map(len, texts)), bins.tokens - before)
        if max_tokens is not None and bins.tokens - begun >= max_tokens:
            break
    bins.settle()


def _documents(source: str, reader: Reader, named: bool) -> Iterator[Document]:
    for file, itself in files_of([source]):
        yield from reader.documents(file, itself and named)


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
