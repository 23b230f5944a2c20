"""What steps of a pair cost on this machine: medians of steps timed by turns."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gguf_trim.cut import lay_out, write
from gguf_trim.format.assistant import AssistantSteps
from gguf_trim.format.companion import Trimmed
from gguf_trim.format.selection import CANDIDATES, Chooser
from gguf_trim.format.speculator import Speculator
from gguf_trim.format.state_fed import EAGLE3, Eagle3Head
from gguf_trim.keep import Keep
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import head_tensor
from llamabase.llama.context import CONTEXT_DEFAULTS, Context, ContextParams
from llamabase.llama.ggml import Backend, Product, Table, aligned
from llamabase.llama.model import Model
from llamabase.llama.states import PairContext
from llamabase.llama.timing import (
    N_CONTEXT,
    VERIFY,
    Step,
    StepCost,
    by_turns,
    decode_step,
    in_rows,
    medians,
    open_context,
    timed,
)

CUT = 512  # rows of the cut that is timed beside the whole drafter: the smallest k that a plan weighs
VERIFY_ROWS, DRAFT_REPEAT = 3, 20  # rows, and steps, of each size, of which the median counts


@dataclass(frozen=True)
class DraftCost:
    """Seconds of a draft step by rows of the head, and what rows added at every step cost besides, by vocabulary."""

    by_rows: StepCost
    added: dict[str, float]

    def of(self, vocab: str, k: int) -> float:
        return self.by_rows.of(k) + self.added.get(vocab, 0.0)


def verify_cost(target: Path, n_threads: int | None = None, title: str = "timing the target") -> StepCost:
    """Seconds of a target's step by batch size, all rows giving logits."""
    with contextlib.ExitStack() as stack:
        context = open_context(stack, target, n_threads)
        seconds, _ = in_rows({n: decode_step(context, n) for n in VERIFY}, VERIFY_ROWS, title)
        return StepCost(medians(seconds))


def draft_cost(
    drafter: Path,
    target: Path,
    order: np.ndarray,
    adding: Mapping[str, Step],
    n_threads: int | None = None,
) -> DraftCost:
    """What a draft step costs, from the whole drafter and a cut of it to the first CUT rows of a keep order.

    Between the two the cost is a line, since only the number of rows differs. `adding`: a step for every vocabulary
    that adds rows, see `adding_step`.
    """
    with tempfile.TemporaryDirectory(prefix="gguf-trim-") as folder, contextlib.ExitStack() as stack:
        files = {len(order): drafter}
        if len(order) > CUT:
            keep = Keep(np.sort(order[:CUT]).astype(np.int32), 0, 0, None)
            files[CUT] = Path(folder) / "cut.gguf"
            write(lay_out(drafter, lambda *_, **__: keep, target), files[CUT])
        steps: dict[int | str, Step] = dict(adding.items())
        if (file := GGUFFile(drafter)).architecture == EAGLE3:
            head, fed_by = Eagle3Head.of(file), open_context(stack, target, n_threads)
            steps |= {k: _state_fed_step(stack, path, head, fed_by, n_threads) for k, path in files.items()}
        else:
            trimmed = {k: Trimmed.open(path) for k, path in files.items() if path != drafter}
            steps |= {k: draft_step(stack, path, trimmed.get(k), n_threads) for k, path in files.items()}
        seconds = medians(by_turns(steps, DRAFT_REPEAT, "timing the drafter"))
    return DraftCost(StepCost({k: seconds[k] for k in files}), {vocab: seconds[vocab] for vocab in adding})


def draft_step(stack: contextlib.ExitStack, path: Path, trimmed: Trimmed | None, n_threads: int | None = None) -> Step:
    """A step of a drafter that reads one token, as an embedding from `trimmed` if it is trimmed."""
    context = open_context(stack, path, n_threads)
    if trimmed is None:
        return decode_step(context, 1)
    table = trimmed.embeddings()
    return decode_step(context, 1, lambda tokens, outputs: context.decode(table.rows(tokens), outputs))


def _state_fed_step(
    stack: contextlib.ExitStack, path: Path, head: Eagle3Head, target: Context, n_threads: int | None
) -> Step:
    context = PairContext(stack.enter_context(Model(path)), N_CONTEXT + 32, ContextParams(n_threads), target)
    stack.enter_context(context)

    def read(tokens: Sequence[int], outputs: int) -> object:
        states = np.ones((len(tokens), head.n_embd), np.float32)
        return head.hidden(context.pairs(tokens, states, outputs > 0)[1])

    return decode_step(context, 1, read)


def assistant_step(stack: contextlib.ExitStack, path: Path, trimmed: Trimmed, target: Context) -> Step:
    """A step of a trimmed assistant after N_CONTEXT tokens of its target, and what is multiplied around it."""
    steps = AssistantSteps(stack.enter_context(Model(path)), target, CONTEXT_DEFAULTS, trimmed)
    stack.enter_context(steps.context)
    state = np.ones(target.model.n_embd, np.float32)

    def step() -> float:
        if target.n_past != N_CONTEXT:
            target.truncate(0)
            target.decode([1] * N_CONTEXT, 0)
        return timed(lambda: steps.begin(0, state))()

    return step


def adding_step(file: GGUFFile, speculator: Speculator | None, n_rows: int, n_threads: int | None = None) -> Step:
    """Multiplies n_rows added rows of the head in `file` by a hidden state.

    With a speculator it also scores all rows and gathers the best; rows of the text lie there already.
    """
    head, backend = head_tensor(file), Backend(n_threads)
    rows = aligned(n_rows * head.row_bytes).reshape(n_rows, -1)
    product = Product(backend, Table(rows, head.type, head.shape[0]))
    hidden, choose = np.ones(head.shape[0], np.float32), None
    if speculator is not None:
        full = np.asarray(np.memmap(file.path, np.uint8, "r", head.offset, (head.n_rows, head.row_bytes)))
        ids = np.arange(head.n_rows, dtype=np.int32)
        choose = Chooser(backend, speculator, Table(full, head.type, head.shape[0]), ids, ids, rows[:CANDIDATES])

    def run() -> None:
        if choose is not None:
            choose(hidden)
        product(hidden)

    return timed(run)
