"""Documents from files and datasets: plain text, folders, JSON, JSON lines, Parquet, CSV, chats, `hf:` datasets.

A source yields one document after the other, so memory does not grow with the corpus; only a .json is read whole. Of a
chat only what the assistant says is a document, as the model's own template writes it (chats.py). Text is UTF-8, or
UTF-16 with a byte order mark.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import IO, Any

from llamabase.errors import FileFormatError, TrimError
from llamabase.files import encoding_of
from llamabase.llama.messages import clean
from llamabase.llama.template import ChatTemplate

from .chats import CHATS, assistant_texts

CHUNK_CHARS = 1 << 16  # characters of a piece of a text file, about
_CSV_FIELD_LIMIT = 1 << 27  # characters


@dataclass(frozen=True)
class Document:
    """A text to count. `special`: names such as <|im_end|> in it are tokens; `label`: its language, if known."""

    text: str
    special: bool = False
    label: str = ""


@dataclass
class LeftOut:
    """A line for each bad row, and for each file of a folder that is not text. rows None: a bad row is an error."""

    rows: list[str] | None = None
    files: list[str] = dataclass_field(default_factory=list)

    def add(self, other: LeftOut) -> None:
        if self.rows is not None:
            self.rows += other.rows or []
        self.files += other.files


class _NotText(Exception):
    """A file holds no text that we can read; the message is the reason."""


@dataclass
class SourceReader:
    """Reads sources. field: holds the text of a row; template: renders chats; left_out: gets what cannot be read."""

    field: str = "text"
    template: ChatTemplate | None = None
    left_out: LeftOut = dataclass_field(default_factory=LeftOut)

    def documents(self, source: str, named: bool = True) -> Iterator[Document]:
        """The documents of one file or `hf:` dataset. named: the user named this very file, so it must be text."""
        if source.startswith("hf:"):
            yield from self._dataset(source)
            return
        path = Path(source)
        try:
            yield from self._documents(path, named)
        except (_NotText, UnicodeDecodeError) as error:
            reason = str(error)
            if isinstance(error, UnicodeDecodeError):
                reason = f"is not UTF-8 text (byte {error.object[error.start]:#04x})"
            if named:
                raise FileFormatError(f"{path}: {reason}; leave it out") from error
            self.left_out.files.append(f"{path}: {reason}")
        except OSError as error:
            raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}") from error

    def _documents(self, path: Path, named: bool) -> Iterator[Document]:
        kind = path.suffix.lower()
        if not named and kind != ".parquet":  # read it once before, so that it is counted whole or not at all
            for _ in _pieces(path):
                pass
        match kind:
            case ".parquet":
                yield from self._parquet(path)
            case ".jsonl" | ".ndjson":
                yield from self._json_lines(path)
            case ".json":
                yield from self._json(path)
            case ".csv":
                yield from self._csv(path)
            case _:
                yield from _pieces(path)

    def _json_lines(self, path: Path) -> Iterator[Document]:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield from self._row(_object(line), f"{path}, line {number}")

    def _json(self, path: Path) -> Iterator[Document]:
        """A list of rows or of texts, one row, one conversation, or JSON lines. Any other JSON is text itself."""
        with _open(path) as file:
            text = file.read()
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            if _object(text.lstrip().partition("\n")[0]) is None:
                raise _NotText("is not JSON") from None
            yield from self._json_lines(path)
            return
        rows = data if isinstance(data, list) else [data]
        if rows and all(isinstance(row, dict) and ("role" in row or "from" in row) for row in rows):
            rows = [{"messages": rows}]
        elif rows and all(isinstance(row, str) for row in rows):
            rows = [{self.field: row} for row in rows]
        elif not any(isinstance(row, dict) and row.keys() & {self.field, *CHATS} for row in rows):
            yield from _pieces(path)
            return
        for number, row in enumerate(rows, 1):
            yield from self._row(row, f"{path}, item {number}")

    def _parquet(self, path: Path) -> Iterator[Document]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise TrimError(f"{path}: Parquet needs the extra: pip install 'gguf-trim[corpus]'") from error
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                self._require_field(path, file.schema_arrow.names, self.field, *CHATS)
                rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
                for number, row in enumerate(rows, 1):
                    yield from self._row(row, f"{path}, row {number}")
        except pyarrow.ArrowInvalid as error:
            raise FileFormatError(f"{path}: is not a Parquet file ({error})") from error

    def _csv(self, path: Path) -> Iterator[Document]:
        csv.field_size_limit(_CSV_FIELD_LIMIT)
        with _open(path, newline="") as file:
            rows = csv.DictReader(file)
            self._require_field(path, rows.fieldnames or [], self.field)
            try:
                for row in rows:
                    yield from self._row(row, f"{path}, line {rows.line_num}")
            except csv.Error as error:
                raise FileFormatError(f"{path}, line {rows.line_num}: is not CSV ({error})") from error

    def _require_field(self, path: Path, names: Sequence[str], *wanted: str) -> None:
        if not set(wanted) & set(names):
            has = ", ".join(names) or "none"
            raise FileFormatError(f"{path}: has no field {self.field!r}; it has {has}: choose --field")

    def _dataset(self, source: str) -> Iterator[Document]:
        """hf:DATASET[:CONFIG[:SPLIT]], streamed through `datasets`; also a local folder of data files."""
        try:
            import datasets
        except ImportError as error:
            raise TrimError(f"{source}: datasets need the extra: pip install 'gguf-trim[corpus]'") from error
        name, config, split = (*source.removeprefix("hf:").split(":", 2), "", "")[:3]
        try:
            rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
            for number, row in enumerate(rows, 1):
                yield from self._row(row, f"{source}, row {number}")
        except TrimError:
            raise
        except Exception as error:  # each back end of datasets raises errors of its own
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TrimError(f"{source}: cannot be loaded ({reason}); check its name and the network") from error

    def _row(self, row: Any, place: str) -> Iterator[Document]:
        """The documents of a row; `place` names it in messages."""
        if not isinstance(row, dict):
            self._skip(f"{place}: is not a JSON object")
            return
        label = str(row.get("language") or "")
        text = row.get(self.field)
        chat = text if isinstance(text, list) else next(filter(None, map(row.get, CHATS)), None)
        if isinstance(text, str):
            yield Document(clean(text), label=label)
        elif chat is not None:
            try:
                texts = assistant_texts(chat, row.get("tools"), self.template)
            except (FileFormatError, KeyError, TypeError, AttributeError) as error:
                self._skip(f"{place}: its messages cannot be rendered ({error})")
                return
            yield from (Document(text, special=self.template is not None, label=label) for text in texts)
        elif self.field not in row:
            self._skip(f"{place}: has no field {self.field!r} and no messages")
        elif text is not None:
            self._skip(f"{place}: its field {self.field!r} is not text")

    def _skip(self, reason: str) -> None:
        if self.left_out.rows is None:
            raise FileFormatError(f"{reason}; mend it, choose --field, or count without it (--skip-bad)")
        self.left_out.rows.append(reason)


def _open(path: Path, newline: str | None = None) -> IO[str]:
    with open(path, "rb") as file:
        begins = file.read(2)
    if 0 in begins:
        raise _NotText("is binary, or UTF-16 without a byte order mark")
    return open(path, encoding=encoding_of(begins), newline=newline)


def _pieces(path: Path) -> Iterator[Document]:
    """A text file in pieces that end at a line's end."""
    with _open(path) as file:
        while lines := file.readlines(CHUNK_CHARS):
            yield Document("".join(lines))


def _object(line: str) -> dict[str, Any] | None:
    """The JSON object in a line; None if there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def files_of(source: str) -> list[str]:
    """The files of a source: those of a folder in sorted order; any other source is its own file."""
    path = Path(source)
    if source.startswith("hf:") or path.is_file():
        return [source]
    if not path.is_dir():
        raise TrimError(f"{source}: there is no such file or folder to count")
    return [str(file) for file in sorted(path.rglob("*")) if file.is_file()]
