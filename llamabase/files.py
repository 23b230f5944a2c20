"""Files that appear whole or not at all (temporary sibling, fsync, rename), and replace no file of another kind."""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np
import platformdirs

from .errors import FileFormatError, TrimError

if TYPE_CHECKING:  # Python 3.10 has it elsewhere
    from importlib.resources.abc import Traversable

APP = "gguf-trim"
CHUNK = 8 << 20  # bytes moved at a time: enough for full disk speed, and little memory
_HEAD = 4 * CHUNK  # bytes in which a file shows its kind: a companion's metadata holds a vocabulary
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Kind:
    """A kind of file. Under a name that a user chose, no file of another kind is ever replaced.

    `known` tells whether a file is of this kind, and `differs` what any other is: "is not a counts file".
    """

    differs: str
    known: Callable[[Path], bool]

    def require(self, path: Path | None) -> None:
        """Fail now, by writing and removing a page, if write_whole would fail later; does nothing for None."""
        if path is not None:
            with write_whole(_in_a_folder(path), self, keep=False) as file:
                file.write(bytes(4096))

    def require_own(self, path: Path) -> None:
        """Raise TrimError in one sentence if `path` exists and is not of this kind."""
        if not path.exists():
            return
        if not path.is_file():
            raise TrimError(f"{path}: is a folder or a device; name a file to write")
        if not self.known(path):
            raise TrimError(f"{path}: is there and {self.differs}; choose another name")


def marked(begins: bytes, *marks: bytes) -> Callable[[Path], bool]:
    """Know a file by its first bytes and by marks in its first 32 MB. An empty one passes: it has nothing to lose."""

    def known(path: Path) -> bool:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
        return not head or (head.startswith(begins) and all(mark in head for mark in marks))

    return known


PLOT = Kind("is not a plot", marked(b"\x89PNG", b"Matplotlib"))  # a photo is a PNG, too
CACHED = Kind("", lambda _: True)  # under our own names, in the cache or a temporary folder


def _alive(pid: int) -> bool:
    if os.name == "nt":  # os.kill would send the process a Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def remove(path: Path) -> None:
    """Remove a file, or a folder with what is in it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _in_a_folder(path: Path) -> Path:
    """The path itself, or the highest of its folders that is still to be made."""
    while not path.parent.exists():
        path = path.parent
    return path


def abandoned(path: Path) -> str | None:
    """The name of the file that this temporary sibling was to become, if the process that wrote it is gone."""
    match = re.fullmatch(r"\.(.+)\.(\d+)\.part", path.name)
    return match[1] if match and not _alive(int(match[2])) else None


@contextlib.contextmanager
def _sibling(path: Path) -> Iterator[Path]:
    """The path of a temporary sibling, which is gone in the end, as are those that killed processes have left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.iterdir():
        if abandoned(other) == path.name:
            remove(other)
    part = path.parent / f".{path.name}.{os.getpid()}.part"
    try:
        yield part
    finally:
        remove(part)


@contextlib.contextmanager
def write_whole(path: Path, kind: Kind, keep: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary sibling of `path` for writing. On success it takes the name if `keep`; else it is removed.

    Raises TrimError in one sentence if a file of another kind has the name, or its folder cannot be written or is full.
    """
    try:
        kind.require_own(path)
        with _sibling(path) as part:
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep:
                part.replace(path)
                _sync_folder(path.parent)
    except OSError as error:
        if error.errno in _FULL:
            raise TrimError(f"{path}: the disk is full; free some room or write elsewhere") from error
        raise TrimError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` for unfinished files, which is gone in the end with what is left in it.

    Raises TrimError if the folder cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            part = stack.enter_context(_sibling(path))
            part.mkdir()
        except OSError as error:
            raise TrimError(f"{path}: no folder can be made beside it: {error.strerror or error}") from error
        yield part


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, if the system can sync folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def require_regular(path: Path | Traversable) -> None:
    """Raise FileFormatError for a pipe or a device, which may never end."""
    if not path.is_file() and isinstance(path, Path) and path.exists() and not path.is_dir():
        raise FileFormatError(f"{path}: is not a regular file")


def encoding_of(begins: bytes) -> str:
    """The encoding of a text by its first bytes: UTF-16 or UTF-8. Python skips the byte order mark of either."""
    return "utf-16" if begins.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def decoded(data: bytes, errors: str = "strict") -> str:
    r"""The text of a whole file, whose lines end in \n alone. `errors`: as for bytes.decode."""
    return data.decode(encoding_of(data), errors).replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path | Traversable, kind: str = "") -> str:
    """A whole text file. Raises FileFormatError, naming the `kind` that it cannot be read as."""
    require_regular(path)
    try:
        return decoded(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileFormatError(f"{path}: cannot be read{kind and ' as '}{kind}: {reason}") from error


def require_room(path: Path, n_bytes: int) -> None:
    """Raise TrimError, before the work begins, if the disk of `path` cannot hold n_bytes more."""
    free = shutil.disk_usage(_in_a_folder(path).parent).free
    if free < n_bytes:
        raise TrimError(
            f"{path}: needs {n_bytes / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB free; "
            "free some room or write elsewhere"
        )


class Placed(Protocol):
    """A tensor in a file."""

    @property
    def offset(self) -> int:
        """Where its bytes begin."""


class Piece(Protocol):
    """A tensor of a new file: one of new `data`, or one of a source, whole or only `rows` (ascending)."""

    @property
    def tensor(self) -> Placed: ...

    @property
    def rows(self) -> np.ndarray | None: ...

    @property
    def data(self) -> bytes | None: ...

    @property
    def row_bytes(self) -> int: ...

    @property
    def n_bytes(self) -> int: ...


def append(piece: Piece, source: BinaryIO, out: BinaryIO, advance: Callable[[int], object]) -> None:
    """Append a piece, of the open `source` unless it has data, to another open file, as bytes and CHUNK at a time."""
    if piece.data is not None:
        advance(out.write(piece.data))
    elif piece.rows is not None:
        _copy_rows(source, piece.tensor.offset, piece.row_bytes, piece.rows, out, advance)
    else:
        _copy_range(source, piece.tensor.offset, piece.n_bytes, out, advance)


def _copy_range(source: BinaryIO, offset: int, count: int, out: BinaryIO, advance: Callable[[int], object]) -> None:
    """Append `count` bytes of an open file, from `offset`, to another; in the kernel if it can."""
    out.flush()
    while count:
        try:
            moved = os.copy_file_range(source.fileno(), out.fileno(), min(count, CHUNK), offset)
        except (AttributeError, OSError) as error:
            if getattr(error, "errno", None) in _FULL:
                raise
            source.seek(offset)
            moved = out.write(source.read(min(count, CHUNK)))
            out.flush()
        if moved == 0:
            raise TrimError(f"{source.name}: ended early; the file changed while it was being read")
        offset += moved
        count -= moved
        advance(moved)
    out.seek(0, 2)


def _copy_rows(
    source: BinaryIO,
    offset: int,
    row_bytes: int,
    rows: np.ndarray,
    out: BinaryIO,
    advance: Callable[[int], object],
) -> None:
    """Append the chosen rows (ascending) of a table that begins at `offset`, reading at most CHUNK bytes at a time."""
    step = max(1, CHUNK // row_bytes)
    for start in range(0, int(rows[-1]) + 1, step):
        chosen = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + step)] - start
        if not len(chosen):
            continue
        count = int(chosen[-1]) + 1
        source.seek(offset + start * row_bytes)
        data = source.read(count * row_bytes)
        if len(data) != count * row_bytes:
            raise TrimError(f"{source.name}: ended early; the file changed while it was being read")
        table = np.frombuffer(data, np.uint8).reshape(count, row_bytes)
        out.write(table[chosen].tobytes())
        advance(len(chosen) * row_bytes)


def sha256_of(path: Path, advance: Callable[[int], object] = lambda _: None) -> str:
    """SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
            advance(len(data))
    return digest.hexdigest()


def cache_folder() -> Path:
    """The folder of fetched models and trimmed drafters: GGUF_TRIM_CACHE, or one in the system's cache folder."""
    override = os.environ.get("GGUF_TRIM_CACHE")
    return expand(override) if override else platformdirs.user_cache_path(APP)


def expand(path: str) -> Path:
    """A path with its ~ expanded, except an unknown user's, for which Path.expanduser would raise."""
    return Path(os.path.expanduser(path))  # noqa: PTH111
