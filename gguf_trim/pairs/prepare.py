"""From a pair's name, or two paths, to files ready to run: fetched, trimmed, proven, quick here, with a speculator."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gguf_trim.cut import Cut, lay_out, move, remove, write
from gguf_trim.format.companion import Trimmed
from gguf_trim.format.mtp import DrafterSource, OwnBlock
from gguf_trim.format.speculator import Speculator
from gguf_trim.format.state_fed import STATE_FED
from gguf_trim.keep import ChooseRows, choose_rows
from gguf_trim.prove import prove
from llamabase.cli.progress import progress, stderr
from llamabase.errors import FileFormatError, TrimError
from llamabase.files import cache_folder, work_folder
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary, require_same
from llamabase.llama.quantize import AS_SHIPPED, renamed
from llamabase.store import key_of, recall, remember

from .catalog import load_catalog
from .fetch import fetch
from .quickest import TYPES, choose_type

DEFAULT_MODEL = "qwen2.5-coder-1.5b"
NONE = "none"  # no requantising
DAY = 86_400.0


@dataclass(frozen=True)
class Prepared:
    target: Path
    drafter: DrafterSource  # as published
    trimmed: Path


def files_of(model: str | None, target: Path | None, drafter: DrafterSource | None) -> tuple[Path, DrafterSource]:
    """Target and drafter: those of a pair of the catalog, fetched where they are missing, unless given by path."""
    if model is not None:
        pair = load_catalog().pair(model)
        target = target or fetch(pair.target)
        drafter = drafter or fetch(pair.drafter)
    if target is None or drafter is None:
        raise TrimError("name a model pair, or give both a target and a drafter")
    return target, drafter


def prepare(
    model: str | None = None,
    target: Path | None = None,
    drafter: DrafterSource | None = None,
    choose: ChooseRows = choose_rows,
    requant: str | None = None,
) -> Prepared:
    """Fetch what is missing, trim the drafter where this very cut is not there yet, and prove a fresh cut.

    The trimmed drafter is then requantised to the type that is quickest with this target here, which is measured once
    and remembered; `requant` decides by hand: a type of llama.cpp's, or "none" for as shipped. Trimmed drafters go to
    the cache folder, where a speculator that is missing or does not fit is made. For the target's own MTP block, rows
    are chosen. Raises FetchError, VocabularyMismatch, FileFormatError or, for an unknown type, EngineError.
    """
    target, drafter = files_of(model, target, drafter)
    files = [target] if isinstance(drafter, OwnBlock) else [target, drafter]
    hangs = isinstance(drafter, OwnBlock) or GGUFFile(drafter).architecture in STATE_FED
    if hangs:
        requant = requant or NONE  # one layer: there is little to win by another type
    elif not isinstance(drafter, OwnBlock):
        require_same(Vocabulary(GGUFFile(target)), Vocabulary(GGUFFile(drafter)))
    cut = lay_out(drafter, choose, target if hangs else None)
    name = f"{target.stem}-{drafter}" if isinstance(drafter, OwnBlock) else drafter.stem
    shipped = cache_folder() / "trimmed" / f"{name}-{cut.identity[:8]}-trim{cut.keep.k}.gguf"
    key = key_of(files, ["type", hashlib.sha256(cut.trimmed.head).hexdigest()])
    memory = recall(key)
    type_ = AS_SHIPPED if requant == NONE else requant.upper() if requant else memory.get("type")
    if requant is None and type_ not in (AS_SHIPPED, *TYPES):  # nothing is remembered, or it is damaged
        type_ = None
    if type_ is None or not _is_ready(renamed(shipped, type_), cut):
        with work_folder(shipped) as folder:
            fresh = not is_this_cut(shipped, cut)
            if fresh:
                _cut_and_prove(cut, shipped, folder, target)
            type_ = choose_type(target, shipped, folder, type_)
        if fresh and type_ != AS_SHIPPED:
            remove(shipped)
    if requant is None and (memory.get("type") != type_ or time.time() - memory["measured"] > DAY):
        remember(key, {"type": type_})  # and anew after a day: what is used is not forgotten
    return Prepared(target, drafter, renamed(shipped, type_))


def _cut_of(cut: Cut, path: Path) -> Trimmed | None:
    """A trimmed drafter that is there whole, with this cut's rows of this drafter: as shipped or requantised."""
    try:
        trimmed = Trimmed.open(path)
    except FileFormatError:
        return None
    same = trimmed.file.get("gguf_trim.source_id") == cut.identity and np.array_equal(trimmed.d2t, cut.keep.ids)
    full = {piece.tensor.name: piece.shape for piece in cut.companion.pieces}
    there = {name: tensor.shape for name, tensor in trimmed.companion.tensors.items()}
    return trimmed if same and full.items() <= there.items() else None


def is_this_cut(path: Path, cut: Cut) -> bool:
    """Whether a file and its companion hold what this cut would write; a speculator may be there too."""
    trimmed = _cut_of(cut, path)
    return trimmed is not None and cut.trimmed.head.startswith(trimmed.file.head)


def _is_ready(path: Path, cut: Cut) -> bool:
    """Whether a file is this cut, as shipped or requantised, with a speculator that fits."""
    try:
        trimmed = _cut_of(cut, path)
        return trimmed is not None and Speculator.of(trimmed) is not None
    except FileFormatError:
        stderr.print(f"{path.name}: its speculator does not fit its head and is made again", markup=False)
        return False


def _cut_and_prove(cut: Cut, out: Path, folder: Path, target: Path) -> None:
    """In `folder` until it is proven, so that a cut found under its own name always is."""
    unproven = folder / out.name
    with progress(f"trimming to {cut.keep.k}", cut.n_bytes, "B") as advance:
        write(cut, unproven, advance)
    result = prove(unproven, cut.source.path, target)
    if not result.ok:
        raise TrimError(f"the cut is not exact and was thrown away: {result.differences[0]}")
    move(unproven, out)
    stderr.print(
        f"{out.name}: {result.kept} rows, greatest logit difference {result.max_logit_difference:g}", markup=False
    )
