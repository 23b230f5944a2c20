"""Counting: how often each token of a vocabulary occurs in documents, by source and by language."""

from __future__ import annotations

import hashlib
import time
import unicodedata
from collections import Counter as Tally
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path

import numpy as np

from llamabase.cli.progress import Advance
from llamabase.errors import TrimError
from llamabase.gguf.reader import GGUFFile
from llamabase.llama.template import ChatTemplate

from .counts import Counts, Group, Part, sparse
from .sources import Document, LeftOut, SourceReader, files_of
from .tokenizer import Counter

BATCH_CHARS = 1 << 20  # characters tokenized at a time: enough for every core, and all the memory the corpus takes
HELD_OUT = 50  # documents of which one is never counted, to judge the counts by
_SCRIPTS = {
    *("LATIN", "CYRILLIC", "GREEK", "CJK", "HIRAGANA", "HANGUL"),
    *("ARABIC", "HEBREW", "DEVANAGARI", "BENGALI", "TAMIL", "THAI"),
}


def script_of(text: str) -> str:
    """The script of most letters at a text's beginning, by Unicode name: "latin", "cjk", ...; "other" if none is."""
    letters: Tally[str] = Tally()
    for char in text[:400]:
        if char.isalpha():
            name = unicodedata.name(char, "").split(" ")[0]
            letters["HIRAGANA" if name == "KATAKANA" else name] += 1
    # Japanese is written with kana among more numerous ideographs.
    if letters["HIRAGANA"] * 5 > letters["CJK"]:
        letters["HIRAGANA"] += letters.pop("CJK", 0)
    best = letters.most_common(1)
    return best[0][0].lower() if best and best[0][0] in _SCRIPTS else "other"


def held_out(text: str) -> bool:
    """Whether a document is kept out of the counts: by its text alone, so the same on every machine."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT == 0


class NothingToCount(TrimError):
    """Sources without any text."""


def count(
    sources: Sequence[str | Path],
    tokenizer: Path,
    field: str = "text",
    *,
    folder: str = "",
    max_tokens: int | None = None,
    left_out: LeftOut | None = None,
    advance: Advance = lambda amount, note="": None,
) -> Counts:
    """Count the documents of the sources in the vocabulary of `tokenizer` (a GGUF).

    Names of special tokens in a plain text are read as text. folder: the sources are files of this source, whose name
    they get in tables. About max_tokens of each source are read. `left_out` gets what cannot be read; None refuses bad
    rows. `advance` gets the characters of every batch. A corpus so small that all of it is held out gives counts with a
    total of 0; see `Counts.with_held_out`. Raises NothingToCount if there is no text.
    """
    dense: dict[Group, np.ndarray] = {}
    total, started = 0, time.perf_counter()
    with Counter(tokenizer) as counter:
        reader = SourceReader(field, ChatTemplate(GGUFFile(tokenizer), counter.vocabulary), left_out or LeftOut())
        for source in map(str, sources):
            begun, files = total, files_of(source)
            documents = (each for file in files for each in reader.documents(file, file == source and not folder))
            for batch, counted in _counted(counter, _batches(documents)):
                group = Group(folder or name_of(source), batch.label, batch.held_out)
                dense[group] = dense[group] + counted if group in dense else counted
                total += int(counted.sum())
                advance(sum(map(len, batch.texts)), f"{total / (time.perf_counter() - started):,.0f} tok/s")
                if max_tokens is not None and total - begun >= max_tokens:
                    break
        parts = [Part(*sparse(counts), group) for group, counts in sorted(dense.items()) if counts.any()]
        made_from = ", ".join(sorted(map(str, sources)))
        if not parts:
            raise NothingToCount(f"{made_from}: no text to count")
        return Counts.of_parts(parts, counter.vocabulary, made_from)


def name_of(source: str) -> str:
    """The name of a source in tables."""
    return source if source.startswith("hf:") else Path(source).name or source


@dataclass
class Batch:
    """Texts to tokenize together: of one label, all held out or none, all with special tokens or none."""

    label: str
    held_out: bool
    special: bool
    texts: list[str] = dataclass_field(default_factory=list)


def _counted(counter: Counter, batches: Iterable[Batch]) -> Iterator[tuple[Batch, np.ndarray]]:
    """Each batch with its counts (int64, n_vocab); the next batch is tokenized while one is added up."""
    with ThreadPoolExecutor(2) as pool:
        running: deque[tuple[Batch, Future[np.ndarray]]] = deque()

        def finished(most: int) -> Iterator[tuple[Batch, np.ndarray]]:
            while len(running) > most:
                batch, counts = running.popleft()
                yield batch, counts.result()

        for batch in batches:
            running.append((batch, pool.submit(counter.count, batch.texts, batch.special)))
            yield from finished(1)
        yield from finished(0)


def _batches(documents: Iterable[Document]) -> Iterator[Batch]:
    """Documents in batches of one kind each, about BATCH_CHARS at a time in all."""
    waiting: dict[tuple[str, bool, bool], Batch] = {}
    size = 0
    for document in documents:
        key = (document.label or script_of(document.text), held_out(document.text), document.special)
        waiting.setdefault(key, Batch(*key)).texts.append(document.text)
        size += len(document.text)
        if size >= BATCH_CHARS:
            yield from waiting.values()
            waiting, size = {}, 0
    yield from waiting.values()
