"""Fits a speculator to a head in closed form, and writes it into a companion."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from gguf.constants import GGMLQuantizationType

from gguf_trim.format.companion import COMPANION, Trimmed
from gguf_trim.format.speculator import ACCEPTANCE, BLOCK, DOWN, UP, UP_TYPE, Speculator
from llamabase.cli.progress import progress
from llamabase.files import CHUNK, require_room, write_whole
from llamabase.gguf.reader import GGUFFile, Tensor, bytes_of
from llamabase.gguf.tensors import head_tensor
from llamabase.gguf.writer import Output, Piece, field
from llamabase.llama.ggml import dequantizer, quantize_rows

RIDGE = 1e-6  # fraction of C's mean eigenvalue that is added to each, so that nothing is divided by zero


def blocks(file: GGUFFile, tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """A table as (first row, float32 block of rows), each block of about CHUNK bytes."""
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

    `rank` (None: n_embd / 8, as in the paper) is rounded up to whole blocks. Shows a bar of the rows read.
    """
    head = head_tensor(drafter)
    n = head.shape[0]
    rank = min(-(-(rank or -(-n // 8)) // BLOCK) * BLOCK, n // BLOCK * BLOCK)
    with progress("fitting the speculator", 2 * head.n_rows, "rows") as advance:
        # A number added to every logit changes no choice: without the mean row, all of the rank goes to differences.
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
        strengths = np.maximum(strengths, 0) + ridge  # rounding makes some slightly negative
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
    """Write a speculator into the companion of a trimmed drafter, in place of an earlier one.

    The companion is written anew and replaced when the new one is whole; raises TrimError if the disk is full.
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
    fields += [field(ACCEPTANCE[vocab], float(rate)) for vocab, rate in speculator.acceptance.items()]
    output = Output(fields, pieces, file.alignment)
    require_room(file.path, output.n_bytes)
    with open(file.path, "rb") as source, write_whole(file.path, COMPANION) as out:
        output.write(source, out)
