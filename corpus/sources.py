"""Documents from files and datasets: plain text, folders, JSON lines, Parquet, CSV, chats, `hf:` datasets.

A source yields documents one after the other, so memory does not grow with the corpus. Of a chat only what the
assistant says is a document, as the model's own template writes it, its end-of-turn token included: that is what a
target emits.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamabase.errors import FileFormatError, TrimError
from llamabase.template import ChatTemplate

CHUNK_CHARS = 1 << 16  # a text file is handed on in pieces of about this size
_CSV_FIELD_LIMIT = 1 << 27


@dataclass(frozen=True)
class Document:
    """A text to count. `special`: tokens such as <|im_end|> in it are tokens; `label`: a language, where known."""

    text: str
    special: bool = False
    label: str = ""


@dataclass
class Reader:
    """How to read sources: the field that holds the text, what renders chats, and where to say what is bad.

    None raises FileFormatError at the first bad line.
    """

    field: str = "text"
    template: ChatTemplate | None = None
    bad: list[str] | None = None

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
            match path.suffix:
                case ".jsonl" | ".ndjson":
                    yield from self._json_lines(path)
                case ".parquet":
                    yield from self._parquet(path)
                case ".csv":
                    yield from self._csv(path)
                case _:
                    yield from _pieces(path)
        except UnicodeDecodeError as error:
            if named:
                raise FileFormatError(f"{path}: is not UTF-8 text (byte {error.start}); leave it out") from error
        except OSError as error:
            raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}") from error

    def _json_lines(self, path: Path) -> Iterator[Document]:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    self._skip(f"{path}, line {number}: is not a JSON object")
                    continue
                yield from self._row(row, f"{path}, line {number}")

    def _parquet(self, path: Path) -> Iterator[Document]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise TrimError(f"{path}: Parquet needs the extra: pip install 'gguf-trim[corpus]'") from error
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                if self.field not in names and "messages" not in names:
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
        with open(path, encoding="utf-8", newline="") as file:
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
        if self.field in row:
            if isinstance(row[self.field], str):
                # JSON can hold half of a surrogate pair, UTF-8 cannot.
                text = row[self.field].encode("utf-8", "replace").decode("utf-8")
                yield Document(text, label=label)
        elif "messages" in row:
            try:
                yield from self._chat(row["messages"], row.get("tools"), label)
            except (FileFormatError, KeyError, TypeError, AttributeError) as error:
                self._skip(f"{where}: its messages cannot be rendered ({error})")
        else:
            self._skip(f"{where}: has no field {self.field!r} and no messages")

    def _chat(self, messages: list[dict[str, Any]], tools: Any, label: str) -> Iterator[Document]:
        """What the assistant says in a conversation, cut out of the rendered text."""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if self.template is None:
                yield Document(str(message["content"]), label=label)
                continue
            before = self.template.text(messages[:i], tools)
            said = self.template.text(messages[: i + 1], tools, answered=True).removeprefix(before)
            yield Document(said.rstrip("\n"), special=True, label=label)


def _pieces(path: Path) -> Iterator[Document]:
    """A text file in pieces that end at a line's end."""
    with open(path, encoding="utf-8") as file:
        while lines := file.readlines(CHUNK_CHARS):
            yield Document("".join(lines))


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
