"""llama.cpp's names of a model's tensors, and what they tell about the model."""

from __future__ import annotations

from .reader import GGUFFile, Tensor

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
HEAD_BIAS = "output.bias"
ASSISTANT = "gemma4-assistant"  # the architecture of a drafter for Gemma 4, all of whose layers draft


def head_tensor(file: GGUFFile) -> Tensor:
    """The tensor that hidden states are multiplied by to get logits: the head, or a tied model's embedding table."""
    return file.tensors.get(HEAD) or file.tensors[EMBEDDING]


def is_block_alone(file: GGUFFile) -> bool:
    """Whether a file holds a block for multi-token prediction without its model's layers, as files beside a target do.

    llama.cpp loads it, and ends the process if the layers are computed.
    """
    arch = file.architecture
    n_blocks, n_layers = (file.integer(f"{arch}.{key}", 0) for key in ("nextn_predict_layers", "block_count"))
    if arch == ASSISTANT or n_blocks < 1 or file.integer("split.count", 1) > 1:  # the layers may be in another part
        return False
    return n_blocks == n_layers or not any(name.startswith("blk.0.") for name in file.tensors)


def has_mrope(file: GGUFFile) -> bool:
    """Whether a file has M-RoPE, as files for images do, if its architecture (GLM-4) can be with or without."""
    sections = file.integers(f"{file.architecture}.rope.dimension_sections")
    return sections is not None and len(sections) > 1 and bool(min(sections[:2]) > 0)
