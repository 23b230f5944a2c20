"""Texts from files: plain text, folders of it, and one field of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from .errors import FileFormatError, TrimError

CHUNK_CHARS = 1 << 16  # a text is handed on in pieces of about this size, so memory does not grow with the file


def files_of(sources: list[Path]) -> list[Path]:
    """Every file named, and every file below every folder named, in sorted order."""
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            found += sorted(path for path in source.rglob("*") if path.is_file())
        elif source.is_file():
            found.append(source)
        else:
            raise TrimError(f"{source}: there is no such file or folder to count")
    return found


def texts_of(path: Path, field: str = "text", binary_is_error: bool = True) -> Iterator[str]:
    """The texts of one file. A binary file is an error where it was named itself, and skipped within a folder."""
    try:
        if path.suffix == ".jsonl":
            yield from _json_lines(path, field)
        else:
            yield from _pieces(path)
    except UnicodeDecodeError as error:
        if binary_is_error:
            raise FileFormatError(f"{path}: is not UTF-8 text (byte {error.start}); leave it out") from error
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}") from error


def _pieces(path: Path) -> Iterator[str]:
    """A text file in pieces that end at a line's end."""
    with open(path, encoding="utf-8") as file:
        while lines := file.readlines(CHUNK_CHARS):
            yield "".join(lines)


def _json_lines(path: Path, field: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)[field]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                reason = f"has no field {field!r}" if isinstance(error, KeyError) else "is not a JSON object"
                raise FileFormatError(f"{path}, line {number}: {reason}; mend the line or choose --field") from error
            if isinstance(value, str):  # JSON can hold half of a surrogate pair, UTF-8 cannot
                yield value.encode("utf-8", "replace").decode("utf-8")
