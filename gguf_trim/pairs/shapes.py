"""GGUFs of the exact shape of known models, with random weights: for step times of pairs whose files are not here.

What a step costs depends on the shape and the types of the tensors, not on the numbers in them. Which type each tensor
gets in a mix such as Q4_K_M is llama.cpp's own choice: its quantize function is run on a miniature of the model.

    write_shape(SHAPES["llama-3.2-1b"], Path("1b.gguf"), "Q4_K_M")
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf.constants import GGMLQuantizationType

from gguf_trim.cut import lay_out, write
from gguf_trim.fit.closed_form import attach
from gguf_trim.format.companion import Trimmed
from gguf_trim.format.mtp import MTP, OWN_BLOCK, DrafterSource
from gguf_trim.format.speculator import BLOCK, UP_TYPE, Speculator
from gguf_trim.keep import first_rows
from llamabase.cli.progress import progress
from llamabase.errors import FileFormatError
from llamabase.files import CACHED, require_room, write_whole
from llamabase.gguf.reader import DEFAULT_ALIGNMENT, GGUFFile, Tensor, bytes_of
from llamabase.gguf.tensors import EMBEDDING, HEAD, head_tensor
from llamabase.gguf.writer import Output, Piece, field
from llamabase.llama.ggml import quantize_rows
from llamabase.llama.quantize import quantize

DEVIATION = 0.02  # standard deviation of weights: Llama, Qwen and Gemma are initialised with it (initializer_range)
TILE = 1 << 20  # random numbers made for each type and row length, then repeated
LINEAR = {"conv_kernel": 4, "state_size": 128, "group_count": 16}  # sizes of linear attention in Qwen3.5, up to 27B
FULL_ATTENTION = 4  # every fourth layer of Qwen3.5 has full attention


@dataclass(frozen=True)
class Shape:
    """The sizes that a dense decoder's published config.json gives."""

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
    n_head_v: int = 0  # heads of qwen35's linear attention, which three layers in four have; its other sizes are LINEAR

    @property
    def n_blocks(self) -> int:
        """Layers of the file: those of the model, and an MTP block if it has one."""
        return self.n_layer + (self.architecture == "qwen35")

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes in ggml's order, (columns, rows), as llama.cpp's converter writes them."""
        n, q, kv = self.n_embd, self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        ffn: dict[str, tuple[int, ...]] = {
            "ffn_gate.weight": (n, self.n_ff),
            "ffn_up.weight": (n, self.n_ff),
            "ffn_down.weight": (self.n_ff, n),
        }
        layer = ffn | {
            "attn_norm.weight": (n,),
            "attn_q.weight": (n, q),
            "attn_k.weight": (n, kv),
            "attn_v.weight": (n, kv),
            "attn_output.weight": (q, n),
            "ffn_norm.weight": (n,),
        }
        if self.architecture == "qwen2":
            layer |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        if self.architecture in ("qwen3", "qwen35", "gemma3"):
            layer |= {"attn_q_norm.weight": (self.head_dim,), "attn_k_norm.weight": (self.head_dim,)}
        if self.architecture == "gemma3":
            layer |= {"post_attention_norm.weight": (n,), "post_ffw_norm.weight": (n,)}
        if self.architecture == "qwen35":
            layer |= {"attn_q.weight": (n, 2 * q), "post_attention_norm.weight": (n,)}  # queries with their gate
            del layer["ffn_norm.weight"]
        out: dict[str, tuple[int, ...]] = {EMBEDDING: (n, self.n_vocab)}
        if self.architecture == "llama":
            out["rope_freqs.weight"] = (self.head_dim // 2,)
        for i in range(self.n_blocks):
            linear = self.architecture == "qwen35" and i < self.n_layer and (i + 1) % FULL_ATTENTION
            out |= {f"blk.{i}.{name}": shape for name, shape in (ffn | self._linear if linear else layer).items()}
            if i == self.n_layer:
                out |= {f"blk.{i}.nextn.eh_proj.weight": (2 * n, n)}
                out |= {f"blk.{i}.nextn.{norm}.weight": (n,) for norm in ("enorm", "hnorm", "shared_head_norm")}
        out["output_norm.weight"] = (n,)
        return out if self.tied else out | {HEAD: (n, self.n_vocab)}

    @property
    def _linear(self) -> dict[str, tuple[int, ...]]:
        """Linear attention of qwen35."""
        n, dim, n_groups, n_kernel = self.n_embd, LINEAR["state_size"], LINEAR["group_count"], LINEAR["conv_kernel"]
        inner = self.n_head_v * dim
        channels = inner + 2 * dim * n_groups
        return {
            "attn_norm.weight": (n,),
            "post_attention_norm.weight": (n,),
            "attn_qkv.weight": (n, channels),
            "attn_gate.weight": (n, inner),
            "ssm_conv1d.weight": (n_kernel, channels),
            "ssm_dt.bias": (self.n_head_v,),
            "ssm_a": (self.n_head_v,),
            "ssm_beta.weight": (n, self.n_head_v),
            "ssm_alpha.weight": (n, self.n_head_v),
            "ssm_norm.weight": (dim,),
            "ssm_out.weight": (inner, n),
        }


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
        Shape("qwen3.5-2b", "qwen35", 248320, 2048, 24, 8, 2, 256, 6144, True, 16),
        Shape("qwen3.5-4b", "qwen35", 248320, 2560, 32, 16, 4, 256, 9216, True, 32),
        Shape("qwen3.5-9b", "qwen35", 248320, 4096, 32, 16, 4, 256, 12288, False, 32),
        Shape("qwen3.5-27b", "qwen35", 248320, 5120, 64, 24, 4, 256, 17408, False, 48),  # also 3.6-27B, 3.8-27B
        Shape("gemma-3-270m", "gemma3", 262144, 640, 18, 4, 1, 256, 2048, True),
        Shape("gemma-3-1b", "gemma3", 262144, 1152, 26, 4, 1, 256, 6912, True),
        Shape("gemma-3-4b", "gemma3", 262208, 2560, 34, 8, 4, 256, 10240, True),
        Shape("gemma-3-12b", "gemma3", 262208, 3840, 48, 16, 8, 256, 15360, True),
    )
}


@dataclass(frozen=True)
class ShapedPair:
    """Files of random weights: a target, its drafter, and cuts of the drafter."""

    target: Path
    drafter: DrafterSource
    cuts: list[Path]


def write_pair(pair: str, quant: str, ks: Sequence[int], folder: Path) -> ShapedPair:
    """Write the shapes of a pair ("target+drafter", or "target+mtp") and the drafter's cuts to every k.

    Raises FileFormatError for unknown shapes, and what `write_shape` raises.
    """
    names = pair.split("+")
    own = names[1:] == [MTP]
    names = names[:1] if own else names
    if len(names) + own != 2 or not SHAPES.keys() >= set(names):
        raise FileFormatError(f"{pair}: is not a target+drafter of known shapes; choose from {', '.join(SHAPES)}")
    files = [folder / f"{name}-{quant}.gguf" for name in names]
    for name, file in zip(names, files, strict=True):
        if not file.exists():
            write_shape(SHAPES[name], file, quant)
    target, drafter = files[0], files[-1]
    cuts = [drafter.with_name(f"{drafter.stem}-trim{k}.gguf") for k in ks]
    for k, cut in zip(ks, cuts, strict=True):
        write(lay_out(OWN_BLOCK if own else drafter, partial(first_rows, k=k), target), cut)
        attach(trimmed := Trimmed.open(cut), _random_speculator(head_tensor(trimmed.companion)))
    return ShapedPair(target, OWN_BLOCK if own else drafter, cuts)


def _random_speculator(head: Tensor) -> Speculator:
    rng, rank = np.random.default_rng(2), -(-head.shape[0] // 8 // BLOCK) * BLOCK
    down, up = (rng.standard_normal(shape, np.float32) for shape in ((rank, head.shape[0]), (head.n_rows, rank)))
    return Speculator(down, quantize_rows(up, UP_TYPE), 0)


def write_shape(shape: Shape, path: Path, quant: str) -> None:
    """Write a GGUF that stock llama.cpp loads, quantised as its quantize function would; whole or not at all.

    Its tokens are made up and the same in all shapes, so that two of one vocabulary size make a pair. Rows repeat after
    TILE numbers, so tokens tie; memory stays small. Raises EngineError for a `quant` that llama.cpp does not know or
    that needs an importance matrix, TrimError if the disk lacks the room.
    """
    _write(outline(shape, quant), path, f"writing {shape.name} {quant}")


def with_random_weights(
    fields: list[bytes], shapes: Mapping[str, tuple[int, ...]], path: Path, quant: str, title: str
) -> None:
    """Write a GGUF of this metadata and these shapes by name, as `write_shape` does one of a known shape."""
    types = _chosen(fields, shapes, quant)
    pieces = [_piece(name, size, types[name]) for name, size in shapes.items()]
    _write(Output(fields, pieces, DEFAULT_ALIGNMENT), path, title)


def _write(output: Output, path: Path, title: str) -> None:
    require_room(path, output.n_bytes)
    tile = lru_cache(_tile)  # for this file only: a dozen MB
    most = min(TILE, max(piece.tensor.n_elements for piece in output.pieces))
    with progress(title, output.n_bytes, "B") as advance, write_whole(path, CACHED) as file:
        advance(file.write(output.header))
        for tensor in (piece.tensor for piece in output.pieces):
            _fill(file, tensor, tile(tensor.type, tensor.shape[0], _is_factor(tensor), most), advance)
            advance(file.write(bytes(-tensor.n_bytes % output.alignment)))


def outline(shape: Shape, quant: str) -> Output:
    """The head of a shape's file, and its tensors without their numbers."""
    types = types_of(shape, quant)
    pieces = [_piece(name, size, types[name]) for name, size in shape.tensors.items()]
    return Output([*_hyperparameters(shape), *_tokenizer(shape.n_vocab)], pieces, DEFAULT_ALIGNMENT)


@lru_cache
def types_of(shape: Shape, quant: str) -> dict[str, GGMLQuantizationType]:
    """The type llama.cpp gives each tensor in a mix, by name."""
    return _chosen(_hyperparameters(shape), shape.tensors, quant)


def _chosen(fields: list[bytes], shapes: Mapping[str, tuple[int, ...]], quant: str) -> dict[str, GGMLQuantizationType]:
    """The same for any metadata.

    Its choice looks at hyperparameters, names, and whether a row is a whole number of blocks of 256. So the miniature
    has the model's metadata and names, and two rows (one would count as a vector) of 256 or 32 columns in each matrix.
    """
    small = {
        name: size if len(size) == 1 else (32 if size[0] % 256 else 256, 2, *size[2:]) for name, size in shapes.items()
    }
    pieces = [_piece(name, size, GGMLQuantizationType.F32) for name, size in small.items()]
    output = Output(fields, pieces, DEFAULT_ALIGNMENT)
    with tempfile.TemporaryDirectory(prefix="gguf-trim-") as folder:
        source, out = Path(folder) / "in.gguf", Path(folder) / "out.gguf"
        source.write_bytes(output.header.ljust(output.n_bytes, b"\0"))
        quantize(source, out, quant)
        return {name: tensor.type for name, tensor in GGUFFile(out).tensors.items()}


def _piece(name: str, shape: tuple[int, ...], type_: GGMLQuantizationType) -> Piece:
    return Piece(Tensor(name, shape, type_, 0, bytes_of(type_, math.prod(shape))))


def _hyperparameters(shape: Shape) -> list[bytes]:
    """Sizes are the model's own; the rest, such as the window of Gemma 3, does not matter to a short text."""
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


def _tile(type_: GGMLQuantizationType, n_columns: int, ones: bool, most: int) -> np.ndarray:
    """Rows of valid blocks, uint8 (rows x bytes of a row): at `most` that many numbers, or one row."""
    if ones:
        return quantize_rows(np.ones((1, n_columns)), type_)
    values = np.random.default_rng(0).standard_normal((max(1, most // n_columns), n_columns), np.float32)
    return quantize_rows(values * np.float32(DEVIATION), type_)


def _fill(file: BinaryIO, tensor: Tensor, tile: np.ndarray, advance: Callable[[float], object]) -> None:
    for row in range(0, tensor.n_rows, len(tile)):
        advance(file.write(tile[: tensor.n_rows - row].data))
