"""Documents from files and datasets: plain text, folders, JSON, JSON lines, Parquet, CSV, chats, `hf:` datasets.

A source yields documents one after the other, so memory does not grow with the corpus; only a .json is read whole. Of a
chat only what the assistant says is a document, as the model's own template writes it (chats.py). Text is UTF-8, or
UTF-16 with a byte order mark.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llamabase.errors import FileFormatError, TrimError
from llamabase.files import encoding_of
from llamabase.llama.messages import clean
from llamabase.llama.template import ChatTemplate

from .chats import CHATS, assistant_texts

CHUNK_CHARS = 1 << 16  # a text file is handed on in pieces of about this size
_CSV_FIELD_LIMIT = 1 << 27


@dataclass(frozen=True)
class Document:
    """A text to count. `special`: tokens such as <|im_end|> in it are tokens; `label`: a language, where known."""

    text: str
    special: bool = False
    label: str = ""


class _NotText(Exception):
    """A file that holds no text we can read, with the reason."""


@dataclass
class Reader:
    """How to read sources: the field that holds the text, what renders chats, and where to say what is left out.

    `bad` gets a line for each bad row; None raises FileFormatError at the first. `left_out` gets a line for each file
    of a folder that is not text.
    """

    field: str = "text"
    template: ChatTemplate | None = None
    bad: list[str] | None = None
    left_out: list[str] | None = None

    def _skip(self, reason: str) -> None:
        if self.bad is None:
            raise FileFormatError(f"{reason}; mend it, choose --field, or count without it (--skip-bad)")
        self.bad.append(reason)

    def documents(self, source: str, named: bool = True) -> Iterator[Document]:
        """The documents of one file or `hf:` dataset. `named`: the user named this very file, so it must be text."""
        if source.startswith("hf:"):
            yield from self._dataset(source)
            return
        path = Path(source)
        try:
            try:
                yield from self._documents(path, named)
            except UnicodeDecodeError as error:
                raise _NotText(f"is not UTF-8 text (byte {error.object[error.start]:#04x})") from error
        except _NotText as error:
            if named:
                raise FileFormatError(f"{path}: {error}; leave it out") from error
            if self.left_out is not None:
                self.left_out.append(f"{path}: {error}")
        except OSError as error:
            raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}") from error

    def _documents(self, path: Path, named: bool) -> Iterator[Document]:
        kind = path.suffix.lower()
        if kind == ".parquet":
            yield from self._parquet(path)
            return
        if not named:  # read it once before, so that it is counted whole or not at all
            for _ in _pieces(path):
                pass
        match kind:
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
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    self._skip(f"{path}, line {number}: is not a JSON object")
                    continue
                yield from self._row(row, f"{path}, line {number}")

    def _json(self, path: Path) -> Iterator[Document]:
        """A list of rows or of texts, one row, or one conversation; JSON lines, too. Any other JSON is text itself."""
        with _open(path) as file:
            text = file.read()
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            if not _is_object(text.lstrip().partition("\n")[0]):
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
                names = file.schema_arrow.names
                if not {self.field, *CHATS} & set(names):
                    raise FileFormatError(
                        f"{path}: has no field {self.field!r}; it has {', '.join(names)}: choose --field"
                    )
                rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
                for number, row in enumerate(rows, 1):
                    yield from self._row(row, f"{path}, row {number}")
        except pyarrow.ArrowInvalid as error:
            raise FileFormatError(f"{path}: is not a Parquet file ({error})") from error

    def _csv(self, path: Path) -> Iterator[Document]:
        csv.field_size_limit(_CSV_FIELD_LIMIT)
        with _open(path, newline="") as file:
            rows = csv.DictReader(file)
            if self.field not in (rows.fieldnames or []):
                names = ", ".join(rows.fieldnames or []) or "none"
                raise FileFormatError(f"{path}: has no field {self.field!r}; it has {names}: choose --field")
            try:
                for row in rows:
                    yield from self._row(row, f"{path}, line {rows.line_num}")
            except csv.Error as error:
                raise FileFormatError(f"{path}, line {rows.line_num}: is not CSV ({error})") from error

    def _dataset(self, source: str) -> Iterator[Document]:
        """hf:DATASET[:CONFIG[:SPLIT]], streamed through `datasets`; also a local folder of data files."""
        try:
            import datasets
        except ImportError as error:
            raise TrimError(f"{source}: datasets need the extra: pip install 'gguf-trim[corpus]'") from error
        name, _, rest = source.removeprefix("hf:").partition(":")
        config, _, split = rest.partition(":")
        try:
            rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
            for number, row in enumerate(rows, 1):
                yield from self._row(row, f"{source}, row {number}")
        except TrimError:
            raise
        except Exception as error:  # datasets raises whatever its many back ends raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TrimError(f"{source}: cannot be loaded ({reason}); check its name and the network") from error

    def _row(self, row: Any, where: str) -> Iterator[Document]:
        if not isinstance(row, dict):
            self._skip(f"{where}: is not a JSON object")
            return
        label = str(row.get("language") or "")
        found = row.get(self.field)
        chat = found if isinstance(found, list) else next(filter(None, map(row.get, CHATS)), None)
        if isinstance(found, str):
            yield Document(clean(found), label=label)
        elif chat is not None:
            try:
                texts = assistant_texts(chat, row.get("tools"), self.template)
            except (FileFormatError, KeyError, TypeError, AttributeError) as error:
                self._skip(f"{where}: its messages cannot be rendered ({error})")
                return
            yield from (Document(text, special=self.template is not None, label=label) for text in texts)
        elif self.field not in row:
            self._skip(f"{where}: has no field {self.field!r} and no messages")
        elif found is not None:
            self._skip(f"{where}: its field {self.field!r} is not text")


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


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def files_of(sources: list[str]) -> list[tuple[str, bool]]:
    """Every source, folders opened to the files below them in sorted order; whether it was named itself."""
    found: list[tuple[str, bool]] = []
    for source in sources:
        path = Path(source)
        if source.startswith("hf:"):
            found.append((source, True))
        elif path.is_dir():
            found += [(str(file), False) for file in sorted(path.rglob("*")) if file.is_file()]
        elif path.is_file():
            found.append((source, True))
        else:
            raise TrimError(f"{source}: there is no such file or folder to count")
    return found
