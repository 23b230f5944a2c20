"""llama.cpp's names of a model's tensors, and what they tell about the model."""

from __future__ import annotations

from .reader import GGUFFile, Tensor

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
HEAD_BIAS = "output.bias"


def head_tensor(file: GGUFFile) -> Tensor:
    """The tensor that hidden states are multiplied by to get logits: the head, or a tied model's embedding table."""
    return file.tensors.get(HEAD) or file.tensors[EMBEDDING]


def has_mrope(file: GGUFFile) -> bool:
    """Whether a file has M-RoPE, as files for images do, if its architecture (GLM-4) can be with or without."""
    sections = file.integers(f"{file.architecture}.rope.dimension_sections")
    return sections is not None and len(sections) > 1 and bool(min(sections[:2]) > 0)
