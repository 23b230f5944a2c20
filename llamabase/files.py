"""Files that appear whole or not at all (temporary sibling, fsync, rename), and replace none of another kind."""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import platformdirs

from .errors import FileFormatError, TrimError

if TYPE_CHECKING:  # Python 3.10 has it elsewhere
    from importlib.resources.abc import Traversable

APP = "gguf-trim"
CHUNK = 8 << 20  # bytes moved at a time: large enough for full disk speed, small enough to stay in memory
_HEAD = 4 * CHUNK  # bytes in which a file shows its kind: the metadata of a companion holds a vocabulary


@dataclass(frozen=True)
class Kind:
    """A kind of file that is written under a name the user chose: a file of any other kind is never replaced.

    `known` tells whether a file is of it, `differs` is what is said of any other: "is not a counts file".
    """

    differs: str
    known: Callable[[Path], bool]

    def require(self, path: Path | None) -> None:
        """Raise TrimError in one sentence, before the work begins, where write_whole would after it; None is no file.

        It writes a page beside `path`, and removes it.
        """
        if path is not None:
            while not path.parent.exists():  # its folder will be made
                path = path.parent
            with write_whole(path, self, keep=False) as file:
                file.write(bytes(4096))

    def require_own(self, path: Path) -> None:
        """Raise TrimError in one sentence where `path` is there and is not of this kind."""
        if not path.exists():
            return
        if not path.is_file():
            raise TrimError(f"{path}: is a folder or a device; name a file to write")
        if not self.known(path):
            raise TrimError(f"{path}: is there and {self.differs}; choose another name")


def marked(begins: bytes, *marks: bytes) -> Callable[[Path], bool]:
    """Know a file by its first bytes and by marks in its first 32 MB. An empty one passes: nothing is lost with it."""

    def known(path: Path) -> bool:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
        return not head or (head.startswith(begins) and all(mark in head for mark in marks))

    return known


PLOT = Kind("is not a plot", marked(b"\x89PNG", b"Matplotlib"))  # a photo is a PNG, too
CACHED = Kind("", lambda _: True)  # under names of our own, in the cache or a temporary folder


def _alive(pid: int) -> bool:
    if os.name == "nt":  # where os.kill would send the process a Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _sweep(path: Path) -> None:
    """Remove temporary siblings that a killed process has left."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"(\d+)\.part")
    for sibling in path.parent.iterdir():
        if (match := pattern.fullmatch(sibling.name)) and not _alive(int(match[1])):
            if sibling.is_dir():
                shutil.rmtree(sibling, ignore_errors=True)
            else:
                sibling.unlink(missing_ok=True)


@contextlib.contextmanager
def write_whole(path: Path, kind: Kind, keep: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary sibling of `path` for writing; on success it takes the name, otherwise, or unless `keep`, it is
    gone.

    Raises TrimError in one sentence where a file of another kind is there, and where the folder is missing, not
    writable or full.
    """
    part = path.parent / f".{path.name}.{os.getpid()}.part"
    try:
        kind.require_own(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        try:
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep:
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        if keep:
            _sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TrimError(f"{path}: the disk is full; free some room or write elsewhere") from error
        raise TrimError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` for files that are not yet what they should be; in the end it is gone with what is left.

    What a killed process has left of its own goes first. Raises TrimError where the folder cannot be made.
    """
    part = path.parent / f".{path.name}.{os.getpid()}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        part.mkdir()
    except OSError as error:
        raise TrimError(f"{part}: cannot be made: {error.strerror or error}") from error
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system lets folders be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def require_regular(path: Path | Traversable) -> None:
    """Raise FileFormatError for what is there and no file: a pipe or a device may never end."""
    if not path.is_file() and isinstance(path, Path) and path.exists() and not path.is_dir():
        raise FileFormatError(f"{path}: is not a regular file")


def encoding_of(begins: bytes) -> str:
    """The encoding of a text by its first bytes: UTF-16 if it has that byte order mark, else UTF-8, with a mark or not.

    Python reads over the mark in either.
    """
    return "utf-16" if begins.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def decoded(data: bytes, errors: str = "strict") -> str:
    r"""The text of a whole file, its lines ending in \n alone. `errors`: as for bytes.decode."""
    with io.TextIOWrapper(io.BytesIO(data), encoding_of(data), errors) as file:
        return file.read()


def read_text(path: Path | Traversable, kind: str = "") -> str:
    """All of a text file; raises FileFormatError, saying as what `kind` it cannot be read."""
    require_regular(path)
    try:
        return decoded(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileFormatError(f"{path}: cannot be read{kind and ' as '}{kind}: {reason}") from error


def require_room(path: Path, n_bytes: int) -> None:
    """Raise TrimError before the work begins where the disk of `path` cannot hold n_bytes more."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise TrimError(
            f"{path}: needs {n_bytes / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB free; "
            "free some room or write elsewhere"
        )


def copy_range(
    source: BinaryIO, offset: int, count: int, out: BinaryIO, advance: Callable[[int], object] = lambda _: None
) -> None:
    """Append `count` bytes of an open file, from `offset`, to another; inside the kernel where it can."""
    out.flush()
    while count:
        try:
            moved = os.copy_file_range(source.fileno(), out.fileno(), min(count, CHUNK), offset)
        except (AttributeError, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
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


def sha256_of(path: Path, advance: Callable[[int], object] = lambda _: None) -> str:
    """SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
            advance(len(data))
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where fetched models and trimmed drafters live; GGUF_TRIM_CACHE overrides the system's cache folder."""
    override = os.environ.get("GGUF_TRIM_CACHE")
    return expand(override) if override else platformdirs.user_cache_path(APP)


def expand(path: str) -> Path:
    """A path with its ~ expanded; an unknown user's stays as it is, where Path.expanduser would raise."""
    return Path(os.path.expanduser(path))  # noqa: PTH111
