"""What the commands keep in the cache folder, and its removal. What was not made here stays."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from gguf_trim.model_card import CARD
from llamabase import store
from llamabase.cli.command import OneCommand
from llamabase.cli.progress import stderr
from llamabase.files import abandoned, cache_folder, remove

from .catalog import load_catalog

KINDS = ("models", "trimmed", "requantised", "unfinished", "measured")
FOLDERS = {  # and what the names of our files there match, beside those of the catalog's models
    "trimmed": r".+-[0-9a-f]{8}-trim\d+.*\.(gguf|md)",
    "requantised": r".+-[0-9a-f]{8}-.+\.gguf",
}


def cached() -> dict[str, list[Path]]:
    """Files in the cache folder by kind; of "unfinished", some are folders.

    Ours is what has a name that we give, in the folder in which we give it, unless it is a card that was edited. Files
    that a running process is writing are left out.
    """
    models = load_catalog().models.values()
    names = {"models": "|".join(re.escape(entry.file) for entry in models), **FOLDERS}
    found: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    for folder, name in names.items():
        for path in _within(cache_folder() / folder):
            if re.fullmatch(name, path.name) and path.is_file() and (path.suffix != ".md" or CARD.known(path)):
                found[folder].append(path)
            elif re.fullmatch(name, abandoned(path) or ""):
                found["unfinished"].append(path)
    for entry in models:
        found["unfinished"] += [path for path in _within(_downloads() / entry.name) if path.suffix == ".whl"]
    memory = store.memory_file()
    found["measured"] = [path for path in (memory, memory.with_name(f"{memory.name}-journal")) if path.is_file()]
    return found


def _downloads() -> Path:
    return cache_folder() / "downloads"


def _within(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def n_bytes(paths: Iterable[Path]) -> int:
    """Bytes on the disk, of folders with all that is in them; a link counts as itself."""
    return sum(path.lstat().st_size + n_bytes(_inside(path)) for path in paths)


def _inside(path: Path) -> Iterator[Path]:
    return path.iterdir() if path.is_dir() and not path.is_symlink() else iter(())


def prune(paths: Iterable[Path]) -> None:
    """Remove what `cached` found, and the folders that are empty then. Raises OSError at the first that stays."""
    for path in paths:
        remove(path)
    for folder in (*_within(_downloads()), _downloads(), *(cache_folder() / kind for kind in ("models", *FOLDERS))):
        with contextlib.suppress(OSError):  # it is not there, or something is in it
            folder.rmdir()


def _size(paths: Iterable[Path]) -> str:
    return f"{n_bytes(paths) / 1e6:.1f} MB"


@click.command("cache", cls=OneCommand)
@click.argument("kinds", metavar="[KIND]...", type=click.Choice(KINDS), nargs=-1)
@click.option("--prune", "pruning", is_flag=True, help="Remove them, after a question.")
@click.option("-y", "--yes", is_flag=True, help="With --prune: do not ask.")
def cache_command(kinds: tuple[str, ...], pruning: bool, yes: bool) -> None:
    """List what the commands keep on this machine, by KIND, and remove it with --prune.

    \b
    models       fetched from PyPI
    trimmed      drafters cut by `prepare`, with their companions
    requantised  uncut drafters in the type that is quickest here
    unfinished   what interrupted downloads and cuts have left
    measured     costs, types and hashes, found out on this machine

    All of it is made again when it is needed. Files that were not made here stay, as do models from the Hugging Face
    Hub, which are in the Hub's own cache (`hf cache`).
    """
    found = {kind: paths for kind, paths in cached().items() if kind in (kinds or KINDS)}
    every = [path for paths in found.values() for path in paths]
    for kind, paths in (found | {"all": every}).items():
        click.echo(f"{kind:11s} {_size(paths):>12s} {len(paths):4d} file{'s' * (len(paths) != 1)}")
    stderr.print(f"folder: {cache_folder()}", markup=False)
    if pruning and every:
        if not yes:
            click.confirm("Remove them?", abort=True, err=True)
        prune(every)
        stderr.print("removed")
