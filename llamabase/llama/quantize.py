"""Rewriting a GGUF to another quantisation, with llama.cpp's own quantize function."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
from gguf.constants import GGMLQuantizationType

from llamabase.errors import EngineError
from llamabase.files import CACHED, require_room, write_whole
from llamabase.gguf.reader import GGUFFile, bytes_of

from .library import interruptible, last_error, physical_cores, start

_FTYPES = {
    name.removeprefix("LLAMA_FTYPE_MOSTLY_"): value
    for name, value in vars(llama_cpp).items()
    if name.startswith("LLAMA_FTYPE_MOSTLY_")
} | {"F32": llama_cpp.LLAMA_FTYPE_ALL_F32, "Q4_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def _size_as(type_: str, file: GGUFFile) -> int:
    """Approximate bytes of a requantised file, as if all matrices got the type that a mix (Q4_K_M) is named after."""
    begins = [type_[:n] for n in range(len(type_) + 1)]
    named = max(GGMLQuantizationType, key=lambda known: sum(map(known.name.startswith, begins)))
    matrices = [tensor for tensor in file.tensors.values() if len(tensor.shape) > 1]
    return file.size + sum(bytes_of(named, tensor.n_elements) - tensor.n_bytes for tensor in matrices)


def require_type(type_: str) -> str:
    """The name itself; raises EngineError if llama.cpp has no quantisation of this name."""
    if type_ not in _FTYPES:
        raise EngineError(f"{type_}: is not a llama.cpp quantisation; choose one of {', '.join(sorted(_FTYPES))}")
    return type_


def quantize(source: Path, out: Path, type_: str, kept: Sequence[str] = ()) -> None:
    """Rewrite a GGUF to another quantisation; `out` appears whole or not at all, and replaces what was there.

    Tensors of the names in `kept` stay F32. Raises EngineError for an unknown type, or with llama.cpp's reason if it
    fails, and TrimError if the disk is full.
    """
    start()
    require_type(type_)
    original = GGUFFile(source)
    require_room(out, _size_as(type_, original))
    kept = [name for name in kept if name in original.tensors]
    if kept and type_ in ("F16", "BF16"):
        raise EngineError(f"{source}: llama.cpp would make its {kept[0]} {type_}, which must stay F32; use Q8_0")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = _FTYPES[type_]
    params.allow_requantize = True
    params.nthread = physical_cores()
    override, f32 = llama_cpp.llama_model_tensor_override, int(GGMLQuantizationType.F32)
    overrides = [override(f"^{re.escape(name)}$".encode(), f32) for name in kept]
    params.tt_overrides = (override * (len(kept) + 1))(*overrides)  # the last names nothing
    with write_whole(out, CACHED) as file:
        with interruptible():
            code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(file.name), ctypes.byref(params))
        if code:
            raise EngineError(f"{source}: llama.cpp cannot quantize it to {type_}: {last_error()}")


AS_SHIPPED = "as shipped"  # a file in the types that it has


def renamed(path: Path, type_: str) -> Path:
    """The path, beside a file, of the same in another quantisation."""
    return path if type_ in ("", AS_SHIPPED) else path.with_name(f"{path.stem}-{type_}.gguf")


def requantized(path: Path, type_: str, folder: Path, kept: Sequence[str] = ()) -> Path:
    """The path of a file rewritten to another quantisation in `folder`; or its own, if it is to stay as shipped."""
    if (out := renamed(path, type_)) == path:
        return path
    out = folder / out.name
    if not out.exists():
        quantize(path, out, type_, kept)
    return out
