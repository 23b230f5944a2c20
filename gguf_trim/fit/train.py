"""Trains a speculator further, by distillation from the full head as SpecVocab does (arXiv 2602.13836).

D and U start from the closed form. Needs the extra [train]; the CPU is enough. docs/dynamic.md says what it adds.
"""

from __future__ import annotations

import numpy as np

from gguf_trim.format.speculator import UP_TYPE, Speculator
from llamabase.cli.progress import progress
from llamabase.errors import TrimError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import head_tensor
from llamabase.llama.ggml import dequantizer, quantize_rows

from .closed_form import blocks

BATCH = 32  # hidden states of a step
RATE = 1e-3  # learning rate of Adam, as a fraction of the matrix's standard deviation; falls to 0 along half a cosine


def distil(start: Speculator, drafter: GGUFFile, states: np.ndarray, steps: int) -> Speculator:
    """`start` after `steps` steps of Adam on the cross entropy to softmax(W h), h from states (float32, n x n_embd).

    Shows a bar. Holds the head, U and Adam's two moments of U as float32. Raises TrimError if PyTorch is missing.
    """
    try:
        import torch
    except ImportError as error:
        raise TrimError("training needs the extra: pip install 'gguf-trim[train]'") from error
    head = head_tensor(drafter)
    full = torch.empty((head.n_rows, head.shape[0]))
    for first, block in blocks(drafter, head):
        full[first : first + len(block)] = torch.from_numpy(block)
    expanded = np.empty((head.n_rows, start.rank), np.float32)
    dequantizer(UP_TYPE)(np.ascontiguousarray(start.up), expanded)
    up = torch.nn.Parameter(torch.from_numpy(expanded))
    down = torch.nn.Parameter(torch.from_numpy(start.down.copy()))
    adam = torch.optim.Adam([{"params": [part], "lr": RATE * float(part.detach().std())} for part in (up, down)])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    rng = np.random.default_rng(0)
    with progress("training the speculator", steps, "steps") as advance:
        for _ in range(steps):
            batch = torch.from_numpy(states[rng.integers(len(states), size=BATCH)])
            with torch.no_grad():
                wanted = torch.softmax(batch @ full.T, dim=1)
            loss = torch.nn.functional.cross_entropy(batch @ down.T @ up.T, wanted)
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
            advance(1)
    return Speculator(down.detach().numpy(), quantize_rows(up.detach().numpy(), UP_TYPE), start.n_positions)
