"""From a pair's name, or two paths, to files ready to run: fetched, trimmed, proven, quick here, with a speculator."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from gguf_trim.cut import Cut, lay_out, move, remove, write
from gguf_trim.format.companion import Trimmed
from gguf_trim.format.mtp import MTP, DrafterSource, OwnBlock
from gguf_trim.format.speculator import Speculator
from gguf_trim.format.state_fed import DFLASH, STATE_FED
from gguf_trim.keep import DEFAULT_K, ChooseRows, choose_rows
from gguf_trim.plan.quickest import TYPES, choose_type
from gguf_trim.plan.uncut import uncut_pays
from gguf_trim.prove import prove
from llamabase.cli.progress import progress, stderr
from llamabase.errors import FileFormatError, TrimError
from llamabase.files import cache_folder, work_folder
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import ASSISTANT
from llamabase.gguf.vocabulary import Vocabulary, require_same
from llamabase.llama.library import key_of
from llamabase.llama.quantize import AS_SHIPPED, renamed
from llamabase.store import recall, remember

from .catalog import load_catalog
from .fetch import fetch

DEFAULT_MODEL = "qwen2.5-coder-1.5b"
NONE = "none"  # no requantising


@dataclass(frozen=True)
class Prepared:
    """The files of a pair: `drafter` as published. `uncut`: whether it is quicker here than `trimmed`."""

    target: Path
    drafter: DrafterSource
    trimmed: Path
    uncut: bool = False

    @property
    def quickest(self) -> DrafterSource:
        """What to draft with if nothing else is asked for."""
        return self.drafter if self.uncut else self.trimmed


def files_of(model: str | None, target: Path | None, drafter: DrafterSource | None) -> tuple[Path, DrafterSource]:
    """Target and drafter: those given by path, the others from a pair of the catalog, fetched if they are missing."""
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
    """Fetch what is missing, trim the drafter if this very cut is not there yet, and prove a fresh cut.

    The trimmed drafter is requantised to the type that is quickest with this target here, which is measured once and
    remembered, and so is whether it is quicker uncut; `requant` decides by hand: a type of llama.cpp's, or "none" for
    as shipped. Trimmed drafters go to the cache folder, where a speculator that is missing or does not fit is made. For
    the target's own MTP block, rows are chosen. Raises FetchError, VocabularyMismatch, FileFormatError or, for an
    unknown type, EngineError.
    """
    target, drafter = files_of(model, target, drafter)
    arch = MTP if isinstance(drafter, OwnBlock) else GGUFFile(drafter).architecture
    if arch == DFLASH:
        raise FileFormatError(f"{drafter}: is a DFlash drafter, which is cut but not run here; use `trim`")
    if arch == MTP and requant not in (None, NONE):
        raise TrimError(f"{target}: rows for its MTP block stay in its type; leave --requant (make's REQUANT=) out")
    state_fed = arch in (*STATE_FED, MTP, ASSISTANT)
    if state_fed and arch != ASSISTANT:
        requant = requant or NONE  # one layer: another type can save little
    elif not state_fed and not isinstance(drafter, OwnBlock):
        require_same(Vocabulary(GGUFFile(target)), Vocabulary(GGUFFile(drafter)))
    cut = lay_out(drafter, choose, target if state_fed else None)
    name = f"{target.stem}-{drafter}" if isinstance(drafter, OwnBlock) else drafter.stem
    shipped = cache_folder() / "trimmed" / f"{name}-{cut.identity[:8]}-trim{cut.keep.k}.gguf"
    key = key_of([target, cut.source.path], [hashlib.sha256(cut.trimmed.header).hexdigest(), *TYPES])
    facts = recall("types", key)
    known, uncut = facts.get("type"), facts.get("uncut")
    type_ = AS_SHIPPED if requant == NONE else requant.upper() if requant else known
    if requant is None and type_ not in (AS_SHIPPED, *TYPES):  # nothing is remembered, or it is damaged
        type_ = None
    if type_ is None or not _is_ready(renamed(shipped, type_), cut):
        with work_folder(shipped) as folder:
            fresh = not is_this_cut(shipped, cut)
            if fresh:
                _cut_and_prove(cut, shipped, folder, target)
            if type_ is None:
                stderr.print("Trying which type is the quickest here takes some minutes, once for a pair.")
            type_ = choose_type(target, shipped, folder, type_)
        if fresh and type_ != AS_SHIPPED:
            remove(shipped)
    if requant is not None:
        return Prepared(target, drafter, renamed(shipped, type_))
    if type_ != known or not isinstance(uncut, bool):
        reads_text = isinstance(drafter, Path) and not state_fed
        uncut = reads_text and uncut_pays(target, cut.source.path, renamed(shipped, type_))
        remember("types", key, {"type": type_, "uncut": uncut})
        if uncut:
            stderr.print(f"{drafter}: is quickest uncut here, and --vocab auto drafts from that", markup=False)
    return Prepared(target, drafter, renamed(shipped, type_), uncut)


def cut_to_each(target: Path, drafter: DrafterSource, ks: Sequence[int], folder: Path) -> list[Path]:
    """A drafter cut to each k (none: to DEFAULT_K), as shipped.

    Cuts of a drafter are prepared in the cache folder; rows of the target's own block go to `folder`, without a
    speculator.
    """
    cuts = []
    for k in ks or (DEFAULT_K,):
        choose = partial(choose_rows, k=k)
        if isinstance(drafter, OwnBlock):
            cuts.append(folder / f"{drafter}-{k}.gguf")
            write(lay_out(drafter, choose, target), cuts[-1])
        else:
            cuts.append(prepare(target=target, drafter=drafter, choose=choose, requant=NONE).trimmed)
    return cuts


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
    return trimmed is not None and cut.trimmed.header.startswith(trimmed.file.header)


def _is_ready(path: Path, cut: Cut) -> bool:
    """Whether a file is this cut, as shipped or requantised, with a speculator that fits."""
    try:
        trimmed = _cut_of(cut, path)
        return trimmed is not None and Speculator.of(trimmed) is not None
    except FileFormatError:
        stderr.print(f"{path.name}: its speculator does not fit its head and is made again", markup=False)
        return False


def _cut_and_prove(cut: Cut, out: Path, folder: Path, target: Path) -> None:
    """Write a cut into `folder` and move it to `out` once it is proven."""
    unproven = folder / out.name
    with progress(f"trimming to {cut.keep.k}", cut.n_bytes, "B") as advance:
        write(cut, unproven, advance)
    proof = prove(unproven, cut.source.path, target)
    if not proof.ok:
        raise TrimError(f"the cut is not exact and was thrown away: {proof.differences[0]}")
    move(unproven, out)
    stderr.print(
        f"{out.name}: {proof.kept} rows, greatest logit difference {proof.max_logit_difference:g}", markup=False
    )
