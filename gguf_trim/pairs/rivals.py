"""What anyone has without the cut or without the counts: the uncut drafter requantised, and the first rows kept."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from gguf_trim.cut import lay_out, source_identity, write
from gguf_trim.format.companion import Trimmed
from gguf_trim.format.state_fed import STATE_FED
from gguf_trim.keep import first_rows
from gguf_trim.plan.quickest import TYPES, quickest_uncut
from llamabase.cli.progress import step
from llamabase.files import cache_folder, work_folder
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import ASSISTANT, is_block_alone
from llamabase.llama.library import key_of
from llamabase.llama.quantize import AS_SHIPPED, quantize, renamed, requantized, tensor_types
from llamabase.store import recall, remember


def reads_text(drafter: Path) -> bool:
    """Whether a drafter reads the text itself, and not its target's states."""
    file = GGUFFile(drafter)
    return file.architecture not in (*STATE_FED, ASSISTANT) and not is_block_alone(file)


def best_uncut(target: Path, drafter: Path) -> Path:
    """The path of an uncut drafter in the type that is quickest with this target here: what requantising alone brings.

    The type is measured once and remembered. The file is kept in the cache folder; it is the drafter itself, if as
    shipped it is the quickest.
    """
    key = key_of([target, drafter], ["uncut", *TYPES])
    kind = recall("types", key).get("type")
    uncut = cache_folder() / "requantised" / f"{drafter.stem}-{source_identity(GGUFFile(drafter))[:8]}.gguf"
    if kind == AS_SHIPPED or (kind in TYPES and renamed(uncut, kind).is_file()):
        return drafter if kind == AS_SHIPPED else renamed(uncut, kind)
    with work_folder(uncut) as folder:
        if kind not in TYPES:
            kind = quickest_uncut(target, drafter, folder)
            remember("types", key, {"type": kind})
        with step(f"requantising to {kind}"):
            made = requantized(drafter, kind, folder)
        return drafter if made == drafter else made.replace(renamed(uncut, kind))


def cut_to_first(drafter: Path, like: Path, folder: Path) -> Path:
    """A drafter cut to its first ids, without any counts: as many as a trimmed one has, and in its types."""
    cut = lay_out(drafter, partial(first_rows, k=len(Trimmed.open(like).d2t)), multiple=1)
    out = folder / f"{drafter.stem}-first{cut.keep.k}.gguf"
    write(cut, out)
    if tensor_types(out) != (types := tensor_types(like)):
        with step(f"requantising {out.name}"):
            quantize(out, out, "Q8_0", types)
    return out
