"""From a pair's name, or two paths, to files ready to run: fetched, trimmed, proven, quick here, with a speculator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamabase.errors import FileFormatError, TrimError
from llamabase.files import cache_folder
from llamabase.gguf_file import GGUFFile
from llamabase.progress import progress, stderr
from llamabase.remembered import key_of, recall, remember
from llamabase.vocabulary import Vocabulary, require_same

from ..companion import Trimmed
from ..cut import companion_path, plan, write
from ..dynamic.speculator import Speculator
from ..keep import Keep, choose_rows
from ..layout import Cut
from ..planning.costs import AS_SHIPPED
from ..verify import verify
from .catalog import load_catalog
from .fetch import fetch
from .quickest import TYPES, choose_type

DEFAULT_MODEL = "qwen2.5-coder-1.5b"
NONE = "none"  # no requantising


@dataclass(frozen=True)
class Prepared:
    target: Path
    drafter: Path  # as published
    trimmed: Path


def prepare(
    model: str | None = None,
    target: Path | None = None,
    drafter: Path | None = None,
    choose: Callable[[Vocabulary, int], Keep] | None = None,
    requant: str | None = None,
) -> Prepared:
    """Fetch what is missing, trim the drafter where this very cut is not there yet, and prove a fresh cut.

    The trimmed drafter is then requantised to the type that is quickest with this target here, which is measured once
    and remembered; `requant` decides by hand: a type of llama.cpp's, or "none" for as shipped. Trimmed drafters go to
    the cache folder, where a speculator that is missing or does not fit is made. Raises FetchError, VocabularyMismatch,
    FileFormatError or, for an unknown type, EngineError.
    """
    if model is not None:
        pair = load_catalog().pair(model)
        target = target or fetch(pair.target)
        drafter = drafter or fetch(pair.drafter)
    if target is None or drafter is None:
        raise TrimError("name a model pair, or give both a target and a drafter")
    require_same(Vocabulary(GGUFFile(target)), Vocabulary(GGUFFile(drafter)))
    cut = plan(drafter, choose or choose_rows)
    shipped = cache_folder() / "trimmed" / f"{drafter.stem}-{cut.identity[:8]}-trim{cut.keep.k}.gguf"

    def out(type_: str) -> Path:
        return shipped if type_ == AS_SHIPPED else shipped.with_name(f"{shipped.stem}-{type_}.gguf")

    key = key_of([target, drafter], ["type", hashlib.sha256(cut.trimmed).hexdigest()])
    type_ = AS_SHIPPED if requant == NONE else requant.upper() if requant else recall(key).get("type")
    if requant is None and type_ not in (AS_SHIPPED, *TYPES):  # nothing is remembered, or it is damaged
        type_ = None
    if type_ is None or not _is_ready(out(type_), cut):
        fresh = not is_this_cut(shipped, cut)
        if fresh:
            _cut_and_prove(cut, shipped)
        type_ = choose_type(target, shipped, out, type_)
        if fresh and type_ != AS_SHIPPED:
            shipped.unlink()
            companion_path(shipped).unlink()
    if requant is None:
        remember(key, {"type": type_})  # anew at every use: what is used is not forgotten
    return Prepared(target, drafter, out(type_))


def _is_ready(path: Path, cut: Cut) -> bool:
    """Whether a file is this cut, as shipped or requantised, with a speculator that fits."""
    try:
        trimmed = Trimmed.open(path)
    except FileFormatError:
        return False
    same = trimmed.file.get("gguf_trim.source_id") == cut.identity and np.array_equal(trimmed.d2t, cut.keep.ids)
    if not same or not _holds_full_tables(trimmed, cut):
        return False
    try:
        return Speculator.of(trimmed) is not None
    except FileFormatError:
        stderr.print(f"{path.name}: its speculator does not fit its head and is made again", markup=False)
        return False


def _cut_and_prove(cut: Cut, out: Path) -> None:
    # Under another name until it is proven, so that a cut found under its own name always is.
    unproven = out.with_name(f"{out.stem}.unproven.gguf")
    try:
        with progress(f"trimming to {cut.keep.k}", cut.total_bytes, "B") as advance:
            write(cut, unproven, advance)
        with progress("verifying", sum(t.n_bytes for t in cut.source.tensors.values()), "B") as advance:
            result = verify(unproven, cut.source.path, advance)
        if not result.ok:
            raise TrimError(f"the cut is not exact and was thrown away: {result.differences[0]}")
        companion_path(unproven).replace(companion_path(out))
        unproven.replace(out)
    finally:
        companion_path(unproven).unlink(missing_ok=True)
        unproven.unlink(missing_ok=True)
    stderr.print(
        f"{out.name}: {result.kept} rows, greatest logit difference {result.max_logit_difference:g}", markup=False
    )


def is_this_cut(output: Path, cut: Cut) -> bool:
    """Whether output and companion are there, whole, with what this cut would write; a speculator may be there too."""
    try:
        trimmed = Trimmed.open(output)
    except FileFormatError:
        return False
    return cut.trimmed.startswith(trimmed.file.head) and _holds_full_tables(trimmed, cut)


def _holds_full_tables(trimmed: Trimmed, cut: Cut) -> bool:
    full = {piece.tensor.name: piece.shape for piece in cut.companion_pieces}
    there = {name: tensor.shape for name, tensor in trimmed.companion.tensors.items()}
    return full.items() <= there.items()
