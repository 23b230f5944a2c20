"""A low-rank copy of a head that says which rows are worth computing, prepared without training.

SpecVocab (arXiv 2602.13836) scores the whole vocabulary by U (D h), D: r x n_embd, U: V x r, and computes exact logits
for the best candidates only. Both come from the head W in closed form here: with C the second moment of the drafter's
final hidden states h over calibration text, and B the r leading eigenvectors of C^(1/2) W^T W C^(1/2),

    U = W C^(1/2) B,    D = B^T C^(-1/2).

Of all matrices of rank r, U D is then the nearest to W in the mean square of the logits over that text. W is read in
blocks: memory is a few n_embd x n_embd matrices (8 bytes a number), U, and a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType

from llamabase.errors import FileFormatError
from llamabase.files import CHUNK, require_room, write_whole
from llamabase.ggml import dequantizer, quantize_rows
from llamabase.gguf_file import GGUFFile, Tensor, bytes_of
from llamabase.progress import progress

from ..companion import Trimmed
from ..cut import COMPANION, write_output
from ..layout import Output, Piece, field, head_tensor

DOWN, UP = "gguf_trim.spec_down", "gguf_trim.spec_up"
UP_TYPE = GGMLQuantizationType.Q4_0  # what little it loses is in the candidates, never in their logits
_UP_BLOCK = 18  # bytes of a block of UP_TYPE, of which the first two are its scale
BLOCK = 32  # a rank is a whole number of UP_TYPE's blocks
RIDGE = 1e-6  # of C's mean eigenvalue: directions that no calibration text went are not divided by nothing


@dataclass(frozen=True)
class Speculator:
    """down: float32 (r x n_embd); up: uint8 rows of UP_TYPE (V x bytes of r numbers)."""

    down: np.ndarray
    up: np.ndarray
    n_positions: int
    acceptance: float = 0.0  # of the drafter on the answers it was fitted on, from the rows it has; 0: not known

    @property
    def rank(self) -> int:
        return len(self.down)

    def step(self, k: int) -> tuple[float, float]:
        """(parameters, bytes) that scoring all rows but k reads."""
        scored = 1 - k / len(self.up)
        return (
            self.down.size + scored * self.rank * len(self.up),
            self.down.nbytes + scored * self.up.nbytes,
        )

    @classmethod
    def of(cls, trimmed: Trimmed) -> Speculator | None:
        """The speculator a companion carries, memory-mapped; None where it has none."""
        file = trimmed.companion
        if not {DOWN, UP} <= file.tensors.keys():
            return None
        down, up, head = file.tensors[DOWN], file.tensors[UP], head_tensor(file)
        shapes = (down.shape, up.shape) == ((head.shape[0], up.shape[0]), (down.n_rows, head.n_rows))
        if not shapes or (down.type, up.type) != (GGMLQuantizationType.F32, UP_TYPE):
            raise FileFormatError(f"{file.path}: its speculator does not fit its head; make it again with `speculator`")
        table = np.memmap(file.path, np.uint8, "r", up.offset, (up.n_rows, up.row_bytes))
        rows = np.memmap(file.path, np.float32, "r", down.offset, (down.n_rows, down.shape[0]))
        scales = np.ndarray((up.n_rows, up.row_bytes // _UP_BLOCK), "<f2", table, strides=(up.row_bytes, _UP_BLOCK))
        if not np.isfinite(rows).all() or not np.isfinite(scales).all():
            raise FileFormatError(
                f"{file.path}: its speculator holds what is no number; make it again with `speculator`"
            )
        acceptance = file.get("gguf_trim.spec_acceptance")
        known = isinstance(acceptance, float) and 0 <= acceptance <= 1
        return cls(np.array(rows), table, file.integer("gguf_trim.spec_positions", 0), acceptance if known else 0.0)


def blocks(file: GGUFFile, tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """A table as float32 blocks (first row, rows x columns) of about CHUNK bytes."""
    expand = dequantizer(tensor.type)
    table = np.memmap(file.path, np.uint8, "r", tensor.offset, (tensor.n_rows, tensor.row_bytes))
    step = max(1, CHUNK // (4 * tensor.shape[0]))
    for start in range(0, tensor.n_rows, step):
        rows = np.ascontiguousarray(table[start : start + step])
        out = np.empty((len(rows), tensor.shape[0]), np.float32)
        expand(rows, out)
        yield start, out


def fit(drafter: GGUFFile, states: np.ndarray, rank: int | None = None) -> Speculator:
    """The closed form for a drafter (uncut, or a companion) and its hidden states (float32, positions x n_embd).

    `rank` is rounded up to whole blocks; n_embd / 8, as the paper has it, for None. Shows a bar of the rows read.
    """
    head = head_tensor(drafter)
    n = head.shape[0]
    rank = min(-(-(rank or -(-n // 8)) // BLOCK) * BLOCK, n // BLOCK * BLOCK)
    with progress("fitting the speculator", 2 * head.n_rows, "rows") as advance:
        # A number added to every logit changes no choice: without the mean row the rank is spent on differences.
        gram, total = np.zeros((n, n)), np.zeros(n)
        for _, block in blocks(drafter, head):
            gram += block.T @ block
            total += block.sum(axis=0, dtype=np.float64)
            advance(len(block))
        mean = total / head.n_rows
        gram -= head.n_rows * np.outer(mean, mean)
        moment = (states.T @ states).astype(np.float64) / len(states)
        ridge = RIDGE * np.trace(moment) / n
        strengths, directions = np.linalg.eigh(moment)
        strengths = np.maximum(strengths, 0) + ridge  # rounding makes some a little less than nothing
        root = (directions * strengths**0.5) @ directions.T
        inverse_root = (directions * strengths**-0.5) @ directions.T
        values, vectors = np.linalg.eigh(root @ gram @ root)
        basis = vectors[:, np.argsort(values)[::-1][:rank]]
        lift = (root @ basis).astype(np.float32)
        down = (basis.T @ inverse_root).astype(np.float32)
        up = np.empty((head.n_rows, bytes_of(UP_TYPE, rank)), np.uint8)
        for start, block in blocks(drafter, head):
            up[start : start + len(block)] = quantize_rows((block - mean.astype(np.float32)) @ lift, UP_TYPE)
            advance(len(block))
    return Speculator(down, up, len(states))


def attach(trimmed: Trimmed, speculator: Speculator) -> None:
    """Write a speculator into the companion of a trimmed drafter, in place of one that is there.

    The companion is written anew beside itself and takes its name when whole; raises TrimError where the disk is full.
    """
    file = trimmed.companion
    n_embd, n_rows = speculator.down.shape[1], len(speculator.up)
    down, up = speculator.down.astype("<f4").tobytes(), speculator.up.tobytes()
    pieces = [
        *(Piece(tensor) for name, tensor in file.tensors.items() if name not in (DOWN, UP)),
        Piece(Tensor(DOWN, (n_embd, speculator.rank), GGMLQuantizationType.F32, 0, len(down)), data=down),
        Piece(Tensor(UP, (speculator.rank, n_rows), UP_TYPE, 0, len(up)), data=up),
    ]
    fields = [file.raw(key) for key in file.fields if not key.startswith("gguf_trim.spec_")]
    fields.append(field("gguf_trim.spec_positions", speculator.n_positions))
    fields.append(field("gguf_trim.spec_acceptance", float(speculator.acceptance)))
    output = Output.of(fields, pieces, file.alignment)
    require_room(file.path, output.n_bytes)
    with open(file.path, "rb") as source, write_whole(file.path, COMPANION) as out:
        write_output(output, source, out)
