"""A llama-type target in PyTorch, with the weights of its GGUF: the states that an EAGLE-3 head reads, and its logits.

It computes what llama.cpp does for the architecture `llama`, in bfloat16 on a GPU and in float32 on a CPU. Residuals,
norms and logits are float32 on both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from gguf_trim.format.state_fed import NORM
from llamabase.errors import FileFormatError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import EMBEDDING, HEAD

LLAMA = "llama"
ROPE_FREQS = "rope_freqs.weight"  # what the frequencies of a Llama 3.1 are divided by
PARTS = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


def weights_of(file: GGUFFile, name: str) -> Tensor:
    """A tensor of any type as float32, in PyTorch's order of dimensions."""
    tensor = file.tensors[name]
    rows = np.memmap(file.path, np.uint8, "r", tensor.offset, (tensor.n_rows, tensor.row_bytes))
    return torch.from_numpy(dequantize(np.asarray(rows), tensor.type).astype(np.float32)).reshape(tensor.shape[::-1])


def turns(first: int, n: int, frequencies: Tensor) -> Tensor:
    """Complex numbers (n x len(frequencies)) by which RoPE turns pairs at places first, first + 1, ..."""
    angles = torch.arange(first, first + n, device=frequencies.device)[:, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def turned(x: Tensor, by: Tensor) -> Tensor:
    """Neighbouring pairs, llama.cpp's NORM type, of (batch, heads, places, size), turned."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * by).flatten(-2)


class Target:
    """`table` and `head`: float32 (n_vocab x n_embd), of embeddings and for logits. `norm`: its last one.

    Raises FileFormatError for a file with anything that is not computed here.
    """

    def __init__(self, file: GGUFFile, device: torch.device) -> None:
        def refuse(reason: str) -> FileFormatError:
            return FileFormatError(f"{file.path}: {reason}; choose a plain file of the architecture llama")

        if file.architecture != LLAMA:
            raise refuse(f"its architecture is {file.architecture}")
        self.device, self.dtype = device, torch.bfloat16 if device.type == "cuda" else torch.float32
        self.n_layer, self.width = (file.integer(f"{LLAMA}.{key}") for key in ("block_count", "embedding_length"))
        self.n_head = file.integer(f"{LLAMA}.attention.head_count")
        self.n_head_kv = file.integer(f"{LLAMA}.attention.head_count_kv", self.n_head)
        self.size = file.integer(f"{LLAMA}.attention.key_length", self.width // self.n_head)
        self.epsilon = float(file.get(f"{LLAMA}.attention.layer_norm_rms_epsilon"))
        names = [[f"blk.{i}.{part}.weight" for part in PARTS] for i in range(self.n_layer)]
        needed = {EMBEDDING, NORM, *(name for layer in names for name in layer)}
        if odd := (needed - file.tensors.keys()) | (file.tensors.keys() - needed - {HEAD, ROPE_FREQS}):
            raise refuse(f"it has {'no' if odd & needed else 'a'} tensor {min(odd)}")
        if file.integer(f"{LLAMA}.rope.dimension_count", self.size) != self.size:
            raise refuse("it turns only a part of each head")
        if (scaling := file.get(f"{LLAMA}.rope.scaling.type", "none")) != "none":
            raise refuse(f"its RoPE is scaled ({scaling})")
        self.frequencies = float(file.get(f"{LLAMA}.rope.freq_base", 10000.0)) ** (
            -torch.arange(0, self.size, 2, device=device) / self.size
        )
        if ROPE_FREQS in file.tensors:
            self.frequencies /= weights_of(file, ROPE_FREQS).to(device)
        self.table, self.norm = (weights_of(file, name).to(device) for name in (EMBEDDING, NORM))
        self.head = weights_of(file, HEAD).to(device) if HEAD in file.tensors else self.table
        self._layers = []
        for layer in names:
            attn_norm, q, k, v, output, ffn_norm, gate, up, down = (weights_of(file, name).to(device) for name in layer)
            matrices = (torch.cat([q, k, v]), output, torch.cat([gate, up]), down)
            self._layers.append((attn_norm, ffn_norm, *(matrix.to(self.dtype) for matrix in matrices)))

    def logits(self, final: Tensor) -> Tensor:
        """float32 (... x n_vocab) of final states."""
        return final @ self.head.T

    def cache(self, n_rows: int, n_places: int) -> Tensor:
        """Room for the keys and values of n_rows texts."""
        shape = (self.n_layer, 2, n_rows, self.n_head_kv, n_places, self.size)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def states(self, tokens: Tensor, layers: Sequence[int] = (), cache: Tensor | None = None, first: int = 0) -> Tensor:
        """The inputs of `layers` side by side, and the final state (float32, b x n x (len(layers) + 1) n_embd).

        The tokens (b x n) are at places `first` and on. After place 0 they are read one at a time, over what the cache
        holds of the places before.
        """
        x = self.table[tokens]
        by, inputs = turns(first, tokens.shape[1], self.frequencies), dict[int, Tensor]()
        for i, (attn_norm, ffn_norm, qkv, output, gate_up, down) in enumerate(self._layers):
            if i in layers:
                inputs[i] = x
            heads = self._times(rms_norm(x, (self.width,), attn_norm, self.epsilon), qkv)
            heads = heads.unflatten(-1, (-1, self.size)).transpose(1, 2)
            qk, v = heads.split([self.n_head + self.n_head_kv, self.n_head_kv], 1)
            q, k = turned(qk, by).to(self.dtype).split([self.n_head, self.n_head_kv], 1)
            if cache is not None:
                cache[i, 0, :, :, first : first + k.shape[2]] = k
                cache[i, 1, :, :, first : first + k.shape[2]] = v
            if first and cache is not None:
                # The heads that share keys are the rows of one product: no copy of the keys, and no mask.
                k, v = cache[i, :, :, :, : first + 1]
                mixed = scaled_dot_product_attention(q.reshape(len(q), self.n_head_kv, -1, self.size), k, v)
                mixed = mixed.reshape(q.shape)
            else:
                mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + self._times(mixed.transpose(1, 2).flatten(-2), output)
            gate, up = self._times(rms_norm(x, (self.width,), ffn_norm, self.epsilon), gate_up).chunk(2, -1)
            x = x + self._times(silu(gate) * up, down)
        return torch.cat([*(inputs[i] for i in layers), rms_norm(x, (self.width,), self.norm, self.epsilon)], -1)

    def _times(self, x: Tensor, matrix: Tensor) -> Tensor:
        return x.to(self.dtype) @ matrix.T
