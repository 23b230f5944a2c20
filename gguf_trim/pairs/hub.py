"""Files of the Hugging Face Hub, through huggingface_hub: its cache, its resume, HF_ENDPOINT and the user's token.

A model is named as llama.cpp names it, `user/repo[:quant]`, and the same file of the repository is chosen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from gguf_trim.format.companion import companion_path
from llamabase.cli.command import more
from llamabase.cli.progress import stderr
from llamabase.errors import FetchError

DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")  # llama.cpp's, in this order; then any model of the repository
# Words in the names of files that lie beside a model and are none, or are drafters for it.
BESIDE = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")

_NAMED = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.+-]+))?")
_PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)
_QUANT = re.compile(r"[-.]([A-Za-z0-9_]+)(-\d{5}-of-\d{5})?\.gguf$", re.IGNORECASE)
T = TypeVar("T")


@dataclass(frozen=True)
class HubModel:
    """A GGUF of a repository: the one of a quant, or `file`, its path there; "" is for the default."""

    repo: str
    quant: str = ""
    file: str = ""

    @classmethod
    def of(cls, text: str) -> HubModel:
        """Raises ValueError unless the text is user/repo or user/repo:quant."""
        if (match := _NAMED.fullmatch(text)) is None:
            raise ValueError(f"{text!r} is not user/repo or user/repo:quant")
        return cls(match[1], match[2] or "")

    def fetch(self) -> Path:
        """The path of the file, all parts of it, and the companion if it is a trimmed drafter; what is here stays.

        Raises FetchError, in one sentence with the way out, if the repository or such a file does not exist, if it is
        gated, or if the Hub cannot be reached and the file is not in the cache.
        """
        files, where = _files(self.repo)
        first = self.choose(files, where)
        if part := _PART.search(first):
            names = [f"{first[: part.start()]}-{n:05d}-of-{part[2]}.gguf" for n in range(1, int(part[2]) + 1)]
        else:
            names = [first, *(name for name in files if name == companion_path(Path(first)).as_posix())]
        if lacking := set(names) - set(files):
            raise FetchError(f"{where} lacks {min(lacking)}, a part of {first}; choose another quant or file")
        paths = [download(self.repo, name) for name in names]
        return paths[0]

    def choose(self, files: list[str], where: str) -> str:
        """The file that llama.cpp would take: of this name, or the first of this quant, both in any case.

        `where` names the repository in errors. Raises FetchError if there is none.
        """
        models = sorted(
            name
            for name in files
            if name.lower().endswith(".gguf")
            and not name.endswith(".vocab.gguf")
            and ((part := _PART.search(name)) is None or int(part[1]) == 1)
        )
        if not models:
            raise FetchError(f"{where} has no GGUF file; choose a repository that has (many are called ...-GGUF)")
        if self.file:
            for name in models:
                if name.lower() == self.file.lower():
                    return name
            raise FetchError(f"{where} has no {self.file}; it has {', '.join(models)}")
        for quant in [self.quant] if self.quant else DEFAULT_QUANTS:
            named = re.compile(rf"(?<![a-z0-9]){re.escape(quant)}[.-]", re.IGNORECASE)
            for name in models:
                if named.search(name) and not _is_beside(name, quant):
                    return name
        if not self.quant:
            for name in models:
                if not _is_beside(name):
                    return name
        quants = sorted({match[1] if (match := _QUANT.search(name)) else Path(name).stem for name in models})
        what = f"file of the quant {self.quant}" if self.quant else "model"
        raise FetchError(f"{where} has no {what}; it has {', '.join(quants)}: name one of them after a colon")


def _is_beside(name: str, quant: str = "") -> bool:
    """Whether a file is no model of its own, unless the quant asks for it."""
    bare = name.rpartition("/")[2].lower()
    return any(word in bare and word not in quant.lower() for word in BESIDE)


def download(repo: str, file: str, revision: str | None = None) -> Path:
    """The path of a file in huggingface_hub's cache. Raises FetchError in one sentence."""
    import huggingface_hub

    where = f"{repo}/{file} on the Hugging Face Hub"
    stderr.print(f"fetching {where}", markup=False)
    with _one_sentence(where):
        return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))


def _files(repo: str) -> tuple[list[str], str]:
    """The paths of a repository's files, or if the Hub cannot be asked, of those in the cache; and where these are."""
    import huggingface_hub
    from huggingface_hub import errors

    where = f"{repo} on the Hugging Face Hub"
    stderr.print(f"looking into {where}", markup=False)
    with _one_sentence(where):
        try:
            return huggingface_hub.HfApi().list_repo_files(repo), where
        except (errors.RepositoryNotFoundError, errors.HFValidationError):
            raise
        except Exception:  # of the HTTP library, or the Hub is not to be asked (HF_HUB_OFFLINE)
            folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
    here = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return here, f"the cache of {repo} (the Hub cannot be reached)"


@contextmanager
def _one_sentence(where: str) -> Iterator[None]:
    """Turns the many errors of huggingface_hub into FetchError."""
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # the one sentence says why its retries failed
    try:
        yield
    except errors.GatedRepoError as error:
        raise FetchError(f"{where} needs its licence accepted there, then `hf auth login`") from error
    except errors.LocalEntryNotFoundError as error:
        raise FetchError(f"{where} cannot be reached: check the network, then run this again") from error
    except errors.RepositoryNotFoundError as error:
        raise FetchError(
            f"{where} does not exist, or is private: check the name, or log in with `hf auth login`"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FetchError(f"{where} does not exist") from error
    except Exception as error:  # of the HTTP library that this version of huggingface_hub uses
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FetchError(f"{where} could not be fetched ({reason}): run this again") from error


def local(source: HubModel | T) -> Path | T:
    """Where a file is: fetched if it is one of the Hub. Raises FetchError."""
    return source.fetch() if isinstance(source, HubModel) else source


def _named(text: str) -> HubModel:
    try:
        return HubModel.of(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def hub_options(command: Callable[..., T]) -> Callable[..., T]:
    """-hf, -hff and -hfd: the command, which has --target and --draft, may receive a HubModel in their place."""

    @click.option(
        *("-hf", "-hfr", "--hf-repo", "hf_repo"),
        type=_named,
        metavar="USER/REPO[:QUANT]",
        help="The target from the Hugging Face Hub.",
    )
    @more("-hff", "--hf-file", "hf_file", metavar="FILE", help="Its file there, instead of a quant.")
    @more(
        *("-hfd", "-hfrd", "--hf-repo-draft", "--spec-draft-hf", "hf_repo_draft"),
        type=_named,
        metavar="USER/REPO[:QUANT]",
        help="The drafter from there.",
    )
    @wraps(command)
    def with_hub(
        target: Any,
        draft: Any,
        hf_repo: HubModel | None,
        hf_file: str | None,
        hf_repo_draft: HubModel | None,
        **others: Any,
    ) -> T:
        if hf_file is not None and hf_repo is None:
            raise click.UsageError("--hf-file needs --hf-repo")
        if hf_repo is not None and target is not None:
            raise click.UsageError("give --target or --hf-repo, not both")
        if hf_repo_draft is not None and draft is not None:
            raise click.UsageError("give --draft or --hf-repo-draft, not both")
        if hf_repo is not None:
            target = replace(hf_repo, file=hf_file or "")
        return command(target=target, draft=draft or hf_repo_draft, **others)

    return with_hub
