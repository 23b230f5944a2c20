"""Names that llama.cpp gives to tensors of a model, and what follows from which are there."""

from __future__ import annotations

from .reader import GGUFFile, Tensor

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
HEAD_BIAS = "output.bias"


def head_tensor(file: GGUFFile) -> Tensor:
    """The tensor that makes the logits: the head, or the embedding table of a tied model."""
    return file.tensors.get(HEAD) or file.tensors[EMBEDDING]


def has_mrope(file: GGUFFile) -> bool:
    """Whether a file whose architecture knows both, such as GLM-4, has M-RoPE; files for images have."""
    sections = file.integers(f"{file.architecture}.rope.dimension_sections")
    return sections is not None and len(sections) > 1 and bool(min(sections[:2]) > 0)
