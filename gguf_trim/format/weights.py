"""What a step reads: bytes and parameters of a model's weights, and the speed-up that they bound."""

from __future__ import annotations

from dataclasses import dataclass

from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import EMBEDDING, HEAD, head_tensor

from .mtp import MtpBlock


def step_bytes(file: GGUFFile) -> int:
    """Weight bytes one draft step reads: every tensor, except an embedding table that is not also the head."""
    skipped = {EMBEDDING} if HEAD in file.tensors else set()
    return sum(tensor.n_bytes for tensor in file.tensors.values() if tensor.name not in skipped)


@dataclass(frozen=True)
class Weights:
    """Bytes and parameters a step reads: fixed, and per row of the head."""

    fixed_bytes: int
    row_bytes: float
    fixed_params: int
    row_params: int

    @classmethod
    def of(cls, file: GGUFFile) -> Weights:
        head = head_tensor(file)
        skipped = {head.name, EMBEDDING}
        params = sum(tensor.n_elements for tensor in file.tensors.values() if tensor.name not in skipped)
        return cls(step_bytes(file) - head.n_bytes, head.n_bytes / head.n_rows, params, head.shape[0])

    @classmethod
    def of_block(cls, block: MtpBlock) -> Weights:
        n_bytes, params = (sum(getattr(t, what) for t in block.tensors) for what in ("n_bytes", "n_elements"))
        return cls(n_bytes, block.head.n_bytes / block.n_vocab, params, block.n_embd)

    def bytes_at(self, k: float) -> float:
        return self.fixed_bytes + self.row_bytes * k

    def params_at(self, k: float) -> float:
        return self.fixed_params + self.row_params * k


def mbsu(tau: float, c: float, draft_max: int) -> float:
    """Memory-bound speed-up: tau / (c * gamma + 1), c the cost of a draft step in target steps."""
    return tau / (c * draft_max + 1)
