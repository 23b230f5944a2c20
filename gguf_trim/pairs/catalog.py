"""Names for models and for target/drafter pairs, and the files on this machine that they stand for."""

from __future__ import annotations

import importlib.resources
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

from llamabase.errors import FileFormatError, TrimError
from llamabase.files import APP, read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

USER_CATALOG = platformdirs.user_config_path(APP) / "catalog.toml"


@dataclass(frozen=True)
class Entry:
    """One model of the catalog; `sources` are tried in order."""

    name: str
    file: str
    sources: list[dict[str, Any]]
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Pair:
    name: str
    target: Entry
    drafter: Entry


@dataclass
class Catalog:
    models: dict[str, Entry] = field(default_factory=dict)
    pairs: dict[str, Pair] = field(default_factory=dict)

    def pair(self, name: str) -> Pair:
        """The pair of this name; raises TrimError listing the names there are."""
        if name not in self.pairs:
            raise TrimError(
                f"there is no model pair called {name!r}; there are {', '.join(sorted(self.pairs))}; "
                "for other files give their paths (--target and --draft, or make's TARGET= and DRAFTER=)"
            )
        return self.pairs[name]

    def add(self, text: str, origin: str) -> None:
        try:
            data = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, too
            raise FileFormatError(f"{origin}: is not valid TOML: {error}") from error
        try:
            for name, fields in data.get("models", {}).items():
                self.models[name] = _entry(name, fields)
            for name, fields in data.get("pairs", {}).items():
                self.pairs[name] = Pair(name, self.models[fields["target"]], self.models[fields["drafter"]])
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise FileFormatError(f"{origin}: an entry is incomplete ({error}); compare the shipped one") from error


MOST_PARTS = 1000  # wheels of a model
# What a source of each kind must name.
_NEEDED = {"hub": ("repo", "file"), "pypi": ("package", "version")}


def _entry(name: str, fields: dict[str, Any]) -> Entry:
    """A model as the catalog has it, called as its first file unless it says otherwise.

    Raises KeyError, TypeError, AttributeError, ValueError or IndexError for what fetch could not use.
    """
    sources, files = fields["sources"], [fields["file"]] if fields.get("file") else []
    for source in sources:
        for kind, value in source.items():
            named = [value[key] for key in _NEEDED[kind]] if kind in _NEEDED else [value]
            if not all(isinstance(part, str) for part in named):
                raise TypeError(f"{kind} = {value!r}")
            if kind == "pypi":
                parts = value.get("parts", 1)
                if not isinstance(parts, int) or not 1 <= parts <= MOST_PARTS:
                    raise ValueError(f"parts = {parts!r}")
                value["package"].format(parts)
            if kind in ("hub", "path"):
                files.append(Path(named[-1]).name)
    if not sources or not files or not isinstance(files[0], str):
        raise TypeError(f"{name} names no source or no file")
    for bare in (name, files[0]):  # both become names in the cache folder
        if Path(bare).name != bare:
            raise ValueError(f"{bare!r} is no bare name")
    size, sha256 = fields.get("size"), fields.get("sha256")
    if not isinstance(size, int | None) or not isinstance(sha256, str | None):
        raise TypeError(f"{name}: size = {size!r}, sha256 = {sha256!r}")
    return Entry(name, files[0], sources, size, sha256)


def load_catalog(user: Path | None = None) -> Catalog:
    """The shipped catalog with the user's own entries on top."""
    catalog = Catalog()
    shipped = importlib.resources.files("gguf_trim.pairs") / "catalog.toml"
    catalog.add(shipped.read_text("utf-8"), str(shipped))
    user = user or USER_CATALOG
    if user.is_file():
        catalog.add(read_text(user), str(user))
    return catalog
