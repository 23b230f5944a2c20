"""A low-rank copy of a head that says which rows are worth computing, prepared without training.

SpecVocab (arXiv 2602.13836) scores the whole vocabulary by U (D h), D: r x n_embd, U: V x r, and computes exact logits
for the best candidates only. Both come from the head W in closed form here: with C the second moment of the drafter's
final hidden states h over calibration text, and B the r leading eigenvectors of C^(1/2) W^T W C^(1/2),

    U = W C^(1/2) B,    D = B^T C^(-1/2).

Of all matrices of rank r, U D is then the nearest to W in the mean square of the logits over that text. W is read in
blocks: memory is a few n_embd x n_embd matrices (8 bytes a number), U, and a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llamabase.errors import FileFormatError
from llamabase.gguf.tensors import head_tensor

from .companion import Trimmed

DOWN, UP = "gguf_trim.spec_down", "gguf_trim.spec_up"
UP_TYPE = GGMLQuantizationType.Q4_0  # its error may change the candidates, never their logits
BLOCK, _BLOCK_BYTES = GGML_QUANT_SIZES[UP_TYPE]  # numbers of a block, of which a rank is a multiple, and its bytes
# The keys (float32) under which a companion holds how often the drafter was right with each vocabulary. Files of before
# there were four have the first one alone.
ACCEPTANCE = {
    "trim": "gguf_trim.spec_acceptance",
    "context": "gguf_trim.spec_acceptance_context",
    "spec": "gguf_trim.spec_acceptance_spec",
    "full": "gguf_trim.spec_acceptance_full",
}


@dataclass(frozen=True)
class Speculator:
    """down: float32 (r x n_embd); up: uint8 rows of UP_TYPE (V x bytes of r numbers). `acceptance`: the drafter's rate
    with each vocabulary, as far as it is known; see `gguf_trim.fit.acceptance`.
    """

    down: np.ndarray
    up: np.ndarray
    n_positions: int
    acceptance: Mapping[str, float] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return len(self.down)

    def step(self, k: int) -> tuple[float, float]:
        """(parameters, bytes) that are read to score all rows but k."""
        scored = 1 - k / len(self.up)
        return self.down.size + scored * self.rank * len(self.up), self.down.nbytes + scored * self.up.nbytes

    @classmethod
    def of(cls, trimmed: Trimmed) -> Speculator | None:
        """The speculator of a companion, memory-mapped; None if it has none."""
        file = trimmed.companion
        if not {DOWN, UP} <= file.tensors.keys():
            return None
        down, up, head = file.tensors[DOWN], file.tensors[UP], head_tensor(file)
        shapes = (down.shape, up.shape) == ((head.shape[0], up.shape[0]), (down.n_rows, head.n_rows))
        if not shapes or (down.type, up.type) != (GGMLQuantizationType.F32, UP_TYPE):
            raise FileFormatError(f"{file.path}: its speculator does not fit its head; make it again with `speculator`")
        table = np.memmap(file.path, np.uint8, "r", up.offset, (up.n_rows, up.row_bytes))
        rows = np.memmap(file.path, np.float32, "r", down.offset, (down.n_rows, down.shape[0]))
        scales = table.reshape(-1, _BLOCK_BYTES)[:, :2].copy().view("<f2")  # the first two bytes of a block
        if not np.isfinite(rows).all() or not np.isfinite(scales).all():
            raise FileFormatError(
                f"{file.path}: its speculator holds what is not a number; make it again with `speculator`"
            )
        rates = {vocab: file.get(key) for vocab, key in ACCEPTANCE.items()}
        known = {vocab: rate for vocab, rate in rates.items() if isinstance(rate, float) and 0 <= rate <= 1}
        return cls(np.array(rows), table, file.integer("gguf_trim.spec_positions", 0), known)
