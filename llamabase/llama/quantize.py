"""Rewriting a GGUF to another quantisation, with llama.cpp's own quantize function."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from pathlib import Path

import llama_cpp
from gguf.constants import GGMLQuantizationType

from llamabase.errors import EngineError
from llamabase.files import CACHED, require_room, write_whole
from llamabase.gguf.reader import GGUFFile, bytes_of
from llamabase.gguf.tensors import EMBEDDING, HEAD, head_tensor
from llamabase.gguf.writer import Output, Piece

from .library import interruptible, last_error, physical_cores, start

_FTYPES = {
    name.removeprefix("LLAMA_FTYPE_MOSTLY_"): value
    for name, value in vars(llama_cpp).items()
    if name.startswith("LLAMA_FTYPE_MOSTLY_")
} | {"F32": llama_cpp.LLAMA_FTYPE_ALL_F32, "Q4_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}
WITH_HEAD = "+HEAD"  # ends a type whose head has the type, too; without it llama.cpp makes most heads Q8_0 or Q6_K


def _named_after(type_: str) -> GGMLQuantizationType:
    """The tensors' type that a quantisation is named after: Q4_K for Q4_K_M."""
    begins = [type_[:n] for n in range(len(type_) + 1)]
    return max(GGMLQuantizationType, key=lambda known: sum(map(known.name.startswith, begins)))


def _size_as(type_: str, file: GGUFFile) -> int:
    """Approximate bytes of a requantised file, as if all matrices got the type that a mix (Q4_K_M) is named after."""
    named = _named_after(type_)
    matrices = [tensor for tensor in file.tensors.values() if len(tensor.shape) > 1]
    return file.size + sum(bytes_of(named, tensor.n_elements) - tensor.n_bytes for tensor in matrices)


def require_type(type_: str) -> str:
    """The name itself; raises EngineError if llama.cpp has no quantisation of this name."""
    if type_.removesuffix(WITH_HEAD) not in _FTYPES:
        raise EngineError(f"{type_}: is not a llama.cpp quantisation; choose one of {', '.join(sorted(_FTYPES))}")
    return type_


def tensor_types(path: Path) -> dict[str, GGMLQuantizationType]:
    """The type of every tensor of a file, by name."""
    return {name: tensor.type for name, tensor in GGUFFile(path).tensors.items()}


def quantize(source: Path, out: Path, type_: str, types: Mapping[str, GGMLQuantizationType] | None = None) -> None:
    """Rewrite a GGUF to another quantisation; `out` appears whole or not at all, and replaces what was there.

    The tensors named in `types` get those types instead. If the quantisation ends in WITH_HEAD, the head gets it, too.
    Raises EngineError for an unknown type, or with llama.cpp's reason if it fails, and TrimError if the disk is full.
    """
    start()
    base = require_type(type_).removesuffix(WITH_HEAD)
    original = GGUFFile(source)
    require_room(out, _size_as(base, original))
    given = {name: kind for name, kind in (types or {}).items() if name in original.tensors}
    if given and base in ("F16", "BF16"):
        name, kind = next(iter(given.items()))
        raise EngineError(f"{source}: llama.cpp would make its {name} {base}, which must stay {kind.name}; use Q8_0")
    if base != type_:
        given |= {(HEAD if HEAD in original.tensors else EMBEDDING): _named_after(base)}
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = _FTYPES[base]
    params.allow_requantize = True
    params.nthread = physical_cores()
    override = llama_cpp.llama_model_tensor_override
    overrides = [override(f"^{re.escape(name)}$".encode(), int(kind)) for name, kind in given.items()]
    params.tt_overrides = (override * (len(given) + 1))(*overrides)  # the last names nothing
    with write_whole(out, CACHED) as file:
        with interruptible():
            code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(file.name), ctypes.byref(params))
        if code:
            raise EngineError(f"{source}: llama.cpp cannot quantize it to {type_}: {last_error()}")


def joined(layers: Path, head: Path, out: Path) -> Path:
    """Write a file of all that one has, but with the head of another of the same model."""
    file, other = GGUFFile(layers), GGUFFile(head)
    name = head_tensor(file).name
    pieces = [
        Piece(other.tensors[name], file=head) if name == tensor.name else Piece(tensor)
        for tensor in file.tensors.values()
    ]
    output = Output([file.raw(key) for key in file.fields], pieces, file.alignment)
    require_room(out, output.n_bytes)
    with open(layers, "rb") as source, write_whole(out, CACHED) as made:
        output.write(source, made)
    return out


AS_SHIPPED = "as shipped"  # a file in the types that it has


def renamed(path: Path, type_: str) -> Path:
    """The path, beside a file, of the same in another quantisation."""
    return path if type_ in ("", AS_SHIPPED) else path.with_name(f"{path.stem}-{type_}.gguf")


def requantized(path: Path, type_: str, folder: Path, types: Mapping[str, GGMLQuantizationType] | None = None) -> Path:
    """The path of a file rewritten to another quantisation in `folder`; or its own, if it is to stay as shipped.

    `types`: see `quantize`.
    """
    if (out := renamed(path, type_)) == path:
        return path
    out = folder / out.name
    if not out.exists():
        quantize(path, out, type_, types)
    return out
