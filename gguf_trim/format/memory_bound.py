"""What a step reads: bytes and parameters of a model's weights, and the speed-up that they bound."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import ASSISTANT, EMBEDDING, HEAD, head_tensor, is_block_alone

from .assistant import POST, PRE
from .companion import Trimmed
from .mtp import MTP, DrafterSource, MtpBlock, OwnBlock
from .state_fed import LOOKED_UP, STATE_FED


def unread(file: GGUFFile) -> set[str]:
    """Tensors that a step does not read: a model's MTP block, and tables of which it reads single rows."""
    arch = file.architecture
    n_layer, n_blocks = (file.integer(f"{arch}.{key}", 0) for key in ("block_count", "nextn_predict_layers"))
    blocks = () if arch == ASSISTANT or is_block_alone(file) else range(n_layer - n_blocks, n_layer)
    block = {name for name in file.tensors if name.startswith(tuple(f"blk.{i}." for i in blocks))}
    return {*LOOKED_UP, *([EMBEDDING] if HEAD in file.tensors else []), *block}


def step_bytes(file: GGUFFile) -> int:
    """Weight bytes that one draft step reads."""
    skipped = unread(file)
    return sum(tensor.n_bytes for tensor in file.tensors.values() if tensor.name not in skipped)


@dataclass(frozen=True)
class StepWeights:
    """Bytes and parameters that a step reads: fixed, and for each of the `n_rows` rows of the head."""

    n_rows: int
    fixed_bytes: int
    row_bytes: float
    fixed_params: int
    row_params: int

    @classmethod
    def of(cls, file: GGUFFile, target: GGUFFile | None = None) -> StepWeights:
        """`target`: has the head of a drafter that has none of its own."""
        head = head_tensor(target if target is not None and HEAD not in file.tensors else file)
        skipped = {head.name, EMBEDDING} | unread(file)
        params = sum(tensor.n_elements for tensor in file.tensors.values() if tensor.name not in skipped)
        fixed = step_bytes(file) - (head.n_bytes if head.name in file.tensors else 0)
        return cls(head.n_rows, fixed, head.n_bytes / head.n_rows, params, head.shape[0])

    def bytes_at(self, k: float) -> float:
        return self.fixed_bytes + self.row_bytes * k

    def params_at(self, k: float) -> float:
        return self.fixed_params + self.row_params * k


def draft_weights(drafter: DrafterSource, target: Path) -> StepWeights:
    """What a draft step reads: of a model file its own weights, of an MTP block or rows for one those of the block."""
    file = GGUFFile(target if isinstance(drafter, OwnBlock) else drafter)
    rows = file if file.architecture == MTP else None
    if not (isinstance(drafter, OwnBlock) or rows or is_block_alone(file)):
        weights = StepWeights.of(file, GGUFFile(target) if file.architecture in STATE_FED else None)
        if file.architecture != ASSISTANT or "gguf_trim.k" not in file.fields:
            return weights
        # The projections are read beside the matrices, as large, that stand in for them.
        tensors = Trimmed.open(file.path).companion.tensors
        return replace(weights, fixed_bytes=weights.fixed_bytes + sum(tensors[name].n_bytes for name in (PRE, POST)))
    block = MtpBlock.of(GGUFFile(target) if rows else file)
    n_rows = head_tensor(rows).n_rows if rows else block.n_vocab
    n_bytes, params = (sum(getattr(t, what) for t in block.tensors) for what in ("n_bytes", "n_elements"))
    return StepWeights(n_rows, n_bytes, block.head.n_bytes / block.n_vocab, params, block.n_embd)


def mbsu(tau: float, c: float, draft_max: int) -> float:
    """Memory-bound speed-up: tau / (c * gamma + 1), c the cost of a draft step in target steps."""
    return tau / (c * draft_max + 1)
