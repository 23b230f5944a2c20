"""Speculative decoding on llama.cpp: a target, a drafter, and the loop that keeps the output exactly the target's.

    from runner import SpeculativeLM, TrimmedDraft

They are imported when they are first asked for, so that `import runner` loads no llama.cpp.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from llamabase.cli.interrupt import run

if TYPE_CHECKING:
    from llamabase.llama.context import Cache as Cache
    from runner.loop.record import Record as Record

    from .draft_model import TrimmedDraft as TrimmedDraft
    from .lm import SpeculativeLM as SpeculativeLM

_MODULES = {"SpeculativeLM": "lm", "Cache": "lm", "Record": "loop.record", "TrimmedDraft": "draft_model"}


def command() -> NoReturn:
    """The console script gguf-run."""
    run("runner.__main__", "gguf-run")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
