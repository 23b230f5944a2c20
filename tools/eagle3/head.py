"""An EAGLE-3 head, as llama.cpp's src/models/eagle3.cpp computes it, and its file.

Conventions are llama.cpp's: the decoder's position P takes (token[P+1], g[P]) and predicts token P+2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor, nn

from gguf_trim.format.state_fed import EAGLE3
from llamabase.files import CACHED, write_whole
from llamabase.gguf import reader, writer
from llamabase.gguf.reader import GGUFFile

from .target import LLAMA, Target, turned, turns

WIDER = 2  # the head's feed-forward part, over that of the target's layers


class Head(nn.Module):
    """One decoder layer over (token, state) pairs. Matrices have the target's shapes, its heads and its RoPE."""

    def __init__(self, target: GGUFFile) -> None:
        super().__init__()
        n = self.width = target.integer(f"{LLAMA}.embedding_length")
        self.n_ff = WIDER * target.integer(f"{LLAMA}.feed_forward_length")
        self.n_head = target.integer(f"{LLAMA}.attention.head_count")  # of keys and values too: values carry the token
        self.epsilon = float(target.get(f"{LLAMA}.attention.layer_norm_rms_epsilon"))
        self.base = float(target.get(f"{LLAMA}.rope.freq_base", 10000.0))
        self.size = n // self.n_head
        shapes = {"fc": (3 * n, n), "attn_output": (n, n)} | {f"attn_{part}": (2 * n, n) for part in "qkv"}
        shapes |= {"ffn_gate": (n, self.n_ff), "ffn_up": (n, self.n_ff), "ffn_down": (self.n_ff, n)}
        for name, (columns, rows) in shapes.items():
            setattr(self, name, nn.Linear(columns, rows, bias=False))
        for name in ("attn_norm", "attn_norm_2", "ffn_norm", "output_norm"):
            setattr(self, name, nn.Parameter(torch.ones(n)))
        self.register_buffer("scale", torch.ones(3 * n))  # of the layer inputs, folded into fc in the file

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.rms_norm(x.float(), (self.width,), weight, self.epsilon)

    def encode(self, inputs: Tensor) -> Tensor:
        """g of layer inputs (... x 3 n_embd)."""
        return self.fc(inputs * self.scale).float()

    def forward(self, embeddings: Tensor, states: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The next states (before output_norm) of pairs at places s, s+1, ..., s being the number of earlier calls.

        `cache` holds keys and values of those calls, the first of which read the target's states: a pair attends to the
        first call's up to its own row, to its own row of later calls, and to itself. So row a is what drafting from
        place a on computes.
        """
        n, step = embeddings.shape[1], len(cache)
        both = torch.cat([self.norm(embeddings, self.attn_norm), self.norm(states, self.attn_norm_2)], -1)
        by = turns(step, n, self.base ** (-torch.arange(0, self.size, 2, device=both.device) / self.size))

        def heads(matrix: nn.Linear) -> Tensor:
            return matrix(both).unflatten(-1, (self.n_head, self.size)).transpose(1, 2).float()

        q, k, v = turned(heads(self.attn_q), by), turned(heads(self.attn_k), by), heads(self.attn_v)
        cache.append((k, v))
        scores = q @ cache[0][0].transpose(-1, -2)
        scores = scores.float() + torch.full((n, n), -torch.inf, device=both.device).triu(1)
        own = [(q * key).sum(-1, keepdim=True) for key, _ in cache[1:]]
        weights = (torch.cat([scores, *own], -1) / self.size**0.5).softmax(-1)
        mixed = (weights[..., :n] @ cache[0][1]).float()
        for i, (_, value) in enumerate(cache[1:]):
            mixed = mixed + weights[..., n + i, None] * value
        x = states + self.attn_output(mixed.transpose(1, 2).flatten(-2))
        y = self.norm(x, self.ffn_norm)
        return x + self.ffn_down(nn.functional.silu(self.ffn_gate(y)) * self.ffn_up(y))


def unrolled(head: Head, target: Target, tokens: Tensor, inputs: Tensor, steps: int) -> Iterator[Tensor]:
    """States after each drafted step at every place: step s at place P has read token P+1+s and predicts P+2+s.

    inputs: b x n x 3 n_embd. tokens: b x n, or more. Matrices are multiplied in the target's type.
    """
    n = inputs.shape[1]
    embeddings = target.table[nn.functional.pad(tokens, (0, steps))]
    fast = partial(torch.autocast, inputs.device.type, target.dtype, enabled=target.dtype != torch.float32)
    with fast():
        states = head.encode(inputs)
    cache: list[tuple[Tensor, Tensor]] = []
    for step in range(steps):
        with fast():
            states = head(embeddings[:, 1 + step : 1 + step + n], states, cache)
        yield states


def export(
    path: Path, head: Head, file: GGUFFile, layers: Sequence[int], type_: GGMLQuantizationType, rows: Tensor | None
) -> None:
    """An EAGLE-3 GGUF with the target's tokenizer. `rows`: those of its output head; None if it uses the target's."""
    values = {
        "context_length": file.integer(f"{LLAMA}.context_length"),
        "embedding_length": head.width,
        "block_count": 1,
        "feed_forward_length": head.n_ff,
        "attention.head_count": head.n_head,
        "attention.head_count_kv": head.n_head,
        "attention.layer_norm_rms_epsilon": head.epsilon,
        "rope.freq_base": head.base,
        "rope.dimension_count": head.size,
        "vocab_size": len(file.strings("tokenizer.ggml.tokens")),
        "target_layers": np.array(layers),
        "target_hidden_size": head.width,
        "norm_before_residual": False,
    }
    copied = [
        key for key in file.fields if key.startswith("tokenizer.") or key in ("general.license", "general.basename")
    ]
    fields = [
        writer.field("general.architecture", EAGLE3),
        writer.field("general.name", f"{file.get('general.name')} EAGLE-3"),
        *(writer.field(f"{EAGLE3}.{key}", value) for key, value in values.items()),
        *(file.raw(key) for key in copied),
    ]
    matrices = {name.removesuffix(".weight"): parameter.detach() for name, parameter in head.named_parameters()}
    matrices["fc"] = matrices["fc"] * head.scale
    if rows is not None:
        matrices["output"] = rows
    pieces = []
    for name, matrix in matrices.items():
        kind = type_ if matrix.dim() > 1 else GGMLQuantizationType.F32
        data = quantize(matrix.float().cpu().numpy(), kind).tobytes()
        prefix = "" if name in ("fc", "output", "output_norm") else "blk.0."
        tensor = reader.Tensor(f"{prefix}{name}.weight", tuple(matrix.shape[::-1]), kind, 0, len(data))
        pieces.append(writer.Piece(tensor, data=data))
    with write_whole(path, CACHED) as out:
        writer.Output(fields, pieces, reader.DEFAULT_ALIGNMENT).write(out, out)
