"""GGUFs of the exact shape of known models, with random weights: step times of pairs whose files cannot be had.

What a step costs depends on the shape and the types of the tensors, not on the numbers in them. Which type each tensor
gets in a mix such as Q4_K_M is llama.cpp's own choice: its quantize function is run on a miniature of the model.

    write_shape(SHAPES["llama-3.2-1b"], Path("1b.gguf"), "Q4_K_M")
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf.constants import GGMLQuantizationType

from llamabase.cli.progress import progress
from llamabase.files import CACHED, require_room, write_whole
from llamabase.gguf.reader import DEFAULT_ALIGNMENT, GGUFFile, Tensor, bytes_of
from llamabase.gguf.tensors import EMBEDDING, HEAD
from llamabase.gguf.writer import Output, Piece, field
from llamabase.llama.ggml import quantize_rows
from llamabase.llama.quantize import quantize

DEVIATION = 0.02  # of the weights: what Llama, Qwen and Gemma are initialised with (initializer_range)
TILE = 1 << 20  # random numbers made for each type and row length, then repeated
ROPE_FACTORS = "rope_freqs.weight"
LINEAR = {"conv_kernel": 4, "state_size": 128, "group_count": 16}  # of Qwen3.5, up to 27B
FULL_ATTENTION = 4  # every so many layers


@dataclass(frozen=True)
class Shape:
    """What the published config.json of a dense decoder says of the sizes of its tensors."""

    name: str
    architecture: str  # llama (3.x), qwen2, qwen3, qwen35 or gemma3, as llama.cpp names them
    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    tied: bool
    n_head_v: int = 0  # of qwen35's linear attention, which three layers in four have; the other sizes are LINEAR's

    @property
    def n_blocks(self) -> int:
        """Layers of the file: those of the model, and its MTP block."""
        return self.n_layer + (self.architecture == "qwen35")

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes in ggml's order, (columns, rows), as llama.cpp's converter writes them."""
        n, q, kv = self.n_embd, self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (n,),
            "attn_q.weight": (n, q),
            "attn_k.weight": (n, kv),
            "attn_v.weight": (n, kv),
            "attn_output.weight": (q, n),
            "ffn_norm.weight": (n,),
            "ffn_gate.weight": (n, self.n_ff),
            "ffn_up.weight": (n, self.n_ff),
            "ffn_down.weight": (self.n_ff, n),
        }
        if self.architecture == "qwen2":
            layer |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        if self.architecture in ("qwen3", "gemma3"):
            layer |= {"attn_q_norm.weight": (self.head_dim,), "attn_k_norm.weight": (self.head_dim,)}
        if self.architecture == "qwen35":
            layer["attn_q.weight"] = (n, 2 * q)  # with its gate
            layer |= {f"attn_{x}_norm.weight": (self.head_dim,) for x in "qk"} | {"post_attention_norm.weight": (n,)}
            del layer["ffn_norm.weight"]
        if self.architecture == "gemma3":
            layer |= {"post_attention_norm.weight": (n,), "post_ffw_norm.weight": (n,)}
        out: dict[str, tuple[int, ...]] = {EMBEDDING: (n, self.n_vocab)}
        if self.architecture == "llama":
            out[ROPE_FACTORS] = (self.head_dim // 2,)
        for i in range(self.n_blocks):
            linear = self.architecture == "qwen35" and i < self.n_layer and (i + 1) % FULL_ATTENTION
            out |= {f"blk.{i}.{name}": shape for name, shape in (self._linear(layer) if linear else layer).items()}
            if i == self.n_layer:
                out |= {f"blk.{i}.nextn.eh_proj.weight": (2 * n, n)}
                out |= {f"blk.{i}.nextn.{norm}.weight": (n,) for norm in ("enorm", "hnorm")}
        out["output_norm.weight"] = (n,)
        return out if self.tied else out | {HEAD: (n, self.n_vocab)}

    def _linear(self, layer: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """A layer of qwen35 with linear attention instead."""
        n, inner, dim = self.n_embd, self.n_head_v * LINEAR["state_size"], LINEAR["state_size"]
        channels = inner + 2 * dim * LINEAR["group_count"]
        kept = {name: shape for name, shape in layer.items() if name.startswith("ffn") or "norm.weight" in name}
        for of_attention in ("attn_q_norm.weight", "attn_k_norm.weight"):
            del kept[of_attention]
        return kept | {
            "attn_qkv.weight": (n, channels),
            "attn_gate.weight": (n, inner),
            "ssm_conv1d.weight": (LINEAR["conv_kernel"], channels),
            "ssm_dt.bias": (self.n_head_v,),
            "ssm_a": (self.n_head_v,),
            "ssm_beta.weight": (n, self.n_head_v),
            "ssm_alpha.weight": (n, self.n_head_v),
            "ssm_norm.weight": (dim,),
            "ssm_out.weight": (inner, n),
        }

    @property
    def n_params(self) -> int:
        """Parameters as model cards count them: a tied head once, RoPE factors not at all."""
        return sum(math.prod(shape) for name, shape in self.tensors.items() if name != ROPE_FACTORS)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3.2-1b", "llama", 128256, 2048, 16, 32, 8, 64, 8192, True),
        Shape("llama-3.2-3b", "llama", 128256, 3072, 28, 24, 8, 128, 8192, True),
        Shape("llama-3.1-8b", "llama", 128256, 4096, 32, 32, 8, 128, 14336, False),
        Shape("qwen2.5-0.5b", "qwen2", 151936, 896, 24, 14, 2, 64, 4864, True),
        Shape("qwen2.5-1.5b", "qwen2", 151936, 1536, 28, 12, 2, 128, 8960, True),
        Shape("qwen2.5-7b", "qwen2", 152064, 3584, 28, 28, 4, 128, 18944, False),
        Shape("qwen3-0.6b", "qwen3", 151936, 1024, 28, 16, 8, 128, 3072, True),
        Shape("qwen3-4b", "qwen3", 151936, 2560, 36, 32, 8, 128, 9728, True),
        Shape("qwen3-8b", "qwen3", 151936, 4096, 36, 32, 8, 128, 12288, False),
        Shape("qwen3.5-0.8b", "qwen35", 248320, 1024, 24, 8, 2, 256, 3584, True, 16),
        Shape("qwen3.5-4b", "qwen35", 248320, 2560, 32, 16, 4, 256, 9216, True, 32),
        Shape("gemma-3-270m", "gemma3", 262144, 640, 18, 4, 1, 256, 2048, True),
        Shape("gemma-3-1b", "gemma3", 262144, 1152, 26, 4, 1, 256, 6912, True),
        Shape("gemma-3-4b", "gemma3", 262208, 2560, 34, 8, 4, 256, 10240, True),
        Shape("gemma-3-12b", "gemma3", 262208, 3840, 48, 16, 8, 256, 15360, True),
    )
}


def write_shape(shape: Shape, path: Path, quant: str) -> None:
    """Write a GGUF that stock llama.cpp loads, quantised as its quantize function would; whole or not at all.

    Its tokens are made up and the same in all shapes, so that two of one vocabulary size make a pair. Rows repeat after
    TILE numbers, so tokens tie; memory stays small. Raises EngineError for a `quant` that llama.cpp does not know or
    that needs an importance matrix, TrimError where the disk lacks the room.
    """
    head, tensors = outline(shape, quant)
    total = len(head) + sum(_padded(tensor.n_bytes) for tensor in tensors)
    require_room(path, total)
    tile = lru_cache(_tile)  # for this file only: a dozen MB
    with progress(f"writing {shape.name} {quant}", total, "B") as advance, write_whole(path, CACHED) as file:
        advance(file.write(head))
        for tensor in tensors:
            _fill(file, tensor, tile(tensor.type, tensor.shape[0], _is_factor(tensor)), advance)
            advance(file.write(b"\0" * (_padded(tensor.n_bytes) - tensor.n_bytes)))


def outline(shape: Shape, quant: str) -> tuple[bytes, list[Tensor]]:
    """Everything before the first tensor byte, and the tensors that follow in this order, each padded."""
    types = types_of(shape, quant)
    tensors = [_tensor(name, size, types[name]) for name, size in shape.tensors.items()]
    fields = [*_hyperparameters(shape), *_tokenizer(shape.n_vocab)]
    return Output(fields, [Piece(tensor) for tensor in tensors], DEFAULT_ALIGNMENT).head, tensors


@lru_cache
def types_of(shape: Shape, quant: str) -> dict[str, GGMLQuantizationType]:
    """The type llama.cpp gives each tensor in a mix, by name.

    Its choice looks at hyperparameters, names, and whether a row is a whole number of blocks of 256. So the miniature
    has the model's metadata and names, and two rows (one would count as a vector) of 256 or 32 columns in each matrix.
    """
    tensors = []
    for name, size in shape.tensors.items():
        small = size if len(size) == 1 else (32 if size[0] % 256 else 256, 2)
        tensors.append(_tensor(name, small, GGMLQuantizationType.F32))
    head = Output(_hyperparameters(shape), [Piece(tensor) for tensor in tensors], DEFAULT_ALIGNMENT).head
    with tempfile.TemporaryDirectory(prefix="gguf-trim-") as folder:
        source, out = Path(folder) / f"{shape.name}.gguf", Path(folder) / "out.gguf"
        source.write_bytes(head + b"\0" * sum(_padded(tensor.n_bytes) for tensor in tensors))
        quantize(source, out, quant)
        return {name: tensor.type for name, tensor in GGUFFile(out).tensors.items()}


def _tensor(name: str, shape: tuple[int, ...], type_: GGMLQuantizationType) -> Tensor:
    return Tensor(name, shape, type_, 0, bytes_of(type_, math.prod(shape)))  # Output gives each its place


def _padded(n_bytes: int) -> int:
    return n_bytes + -n_bytes % DEFAULT_ALIGNMENT


def _hyperparameters(shape: Shape) -> list[bytes]:
    """What decides on sizes is the model's own; the rest, such as the window of Gemma 3, costs a short text nothing."""
    values: dict[str, int | float] = {
        "vocab_size": shape.n_vocab,
        "context_length": 32768,
        "embedding_length": shape.n_embd,
        "block_count": shape.n_blocks,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head,
        "attention.head_count_kv": shape.n_head_kv,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    if shape.architecture == "gemma3":
        values["attention.sliding_window"] = 512
    arrays: dict[str, np.ndarray] = {}
    if shape.architecture == "qwen35":
        values |= {f"ssm.{key}": value for key, value in LINEAR.items()} | {"ssm.time_step_rank": shape.n_head_v}
        values |= {"ssm.inner_size": shape.n_head_v * LINEAR["state_size"], "full_attention_interval": FULL_ATTENTION}
        values |= {"rope.dimension_count": 64, "nextn_predict_layers": 1}
        arrays["rope.dimension_sections"] = np.array([11, 11, 10, 0])
    return [
        field("general.architecture", shape.architecture),
        field("general.name", f"{shape.name} with random weights"),
        *(field(f"{shape.architecture}.{key}", value) for key, value in (values | arrays).items()),
    ]


def _tokenizer(n_vocab: int) -> list[bytes]:
    """A byte-level BPE without merges: the 256 bytes, and made-up pieces."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    tokens = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    tokens += [f"piece{i}" for i in range(len(tokens), n_vocab)]
    return [
        field("tokenizer.ggml.model", "gpt2"),
        field("tokenizer.ggml.pre", "gpt-2"),
        field("tokenizer.ggml.tokens", tokens),
        field("tokenizer.ggml.merges", []),
    ]


def _is_factor(tensor: Tensor) -> bool:
    """Norms and RoPE factors multiply, so they are ones; biases add."""
    return len(tensor.shape) == 1 and tensor.name.endswith(".weight")


def _tile(type_: GGMLQuantizationType, n_columns: int, ones: bool) -> np.ndarray:
    """Rows of valid blocks, uint8 (rows x bytes of a row)."""
    if ones:
        return quantize_rows(np.ones((1, n_columns)), type_)
    values = np.random.default_rng(0).standard_normal((max(1, TILE // n_columns), n_columns), np.float32)
    return quantize_rows(values * np.float32(DEVIATION), type_)


def _fill(file: BinaryIO, tensor: Tensor, tile: np.ndarray, advance: Callable[[float], object]) -> None:
    for row in range(0, tensor.n_rows, len(tile)):
        advance(file.write(tile[: tensor.n_rows - row].data))
