"""How often a trimmed drafter is right with each vocabulary, on answers that its speculator was not fitted to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from corpus.answers import TargetAnswer
from gguf_trim.format.companion import Trimmed
from gguf_trim.format.selection import CANDIDATES, CONTEXT_ROWS, Recent, chosen, scorer
from gguf_trim.format.speculator import Speculator
from llamabase.cli.progress import progress
from llamabase.gguf.tensors import HEAD_BIAS, head_tensor
from llamabase.llama.ggml import Backend

from .closed_form import blocks

# A position of an answer (its number, and the token's within it) with what the kept rows draft there: id and logit.
DRAFTED = np.dtype([("answer", np.int32), ("token", np.int32), ("id", np.int32), ("logit", np.float32)])


def acceptances(
    trimmed: Trimmed,
    speculator: Speculator,
    answers: Sequence[TargetAnswer],
    wanted: np.ndarray,
    drafted: np.ndarray,
    states: np.ndarray,
) -> dict[str, float]:
    """Share of the wanted tokens that are drafted from the kept rows ("trim"), with those of the text ("context"),
    with the speculator's candidates too ("spec"), and from the whole head ("full").

    `wanted` (the target's ids), `drafted` (DRAFTED) and `states` (float32, n x n_embd) are by position, all of them
    within an answer. All four are counted at the same positions, so their differences say more than each of them. They
    are rates of first drafts, greedy, on short answers, which another target may have given: a longer text brings more
    rows of its own, another language more tokens that were cut, and a draft after other drafts is right a little less
    often.
    """
    row_of = trimmed.row_of
    at, ids, of_text = _added(trimmed, row_of, speculator, answers, drafted, states)
    whole, logits = _whole_head(trimmed, row_of, states, at, ids)
    found = {
        "trim": drafted["id"],
        "context": _best(drafted, at[of_text], ids[of_text], logits[of_text]),
        "spec": _best(drafted, at, ids, logits),
        "full": whole,
    }
    return {vocab: float((drafts == wanted).mean()) for vocab, drafts in found.items()}


def _added(
    trimmed: Trimmed,
    row_of: np.ndarray,
    speculator: Speculator,
    answers: Sequence[TargetAnswer],
    drafted: np.ndarray,
    states: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(place in `drafted`, id, whether the text brings it) of every row that is added anywhere."""
    outside = row_of >= 0
    outside[trimmed.d2t] = False
    others = np.flatnonzero(outside)
    score = scorer(Backend(), speculator) if len(others) else None
    rows, count = row_of[others], min(CANDIDATES, len(others))
    recent, parts = Recent(outside, CONTEXT_ROWS), list[np.ndarray]()
    for i in np.lexsort((drafted["token"], drafted["answer"])):
        answer = answers[drafted["answer"][i]]
        recent.follow([*answer.prompt, *answer.answer[: drafted["token"][i]]])
        parts.append(_triples(i, np.array(list(recent.slots), np.int64), True))
        if score is not None:
            parts.append(_triples(i, others[chosen(score(states[i])[rows], count)], False))
    at, ids, of_text = np.concatenate(parts).T
    return at, ids, of_text.astype(bool)


def _triples(place: int, ids: np.ndarray, of_text: bool) -> np.ndarray:
    return np.stack([np.full_like(ids, place), ids, np.full_like(ids, of_text)], axis=1)


def _whole_head(
    trimmed: Trimmed, row_of: np.ndarray, states: np.ndarray, at: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the whole head drafts at each state (ids), and its logit of each of `ids` at the states `at`."""
    file, n = trimmed.companion, len(states)
    head, bias = head_tensor(file), file.tensors.get(HEAD_BIAS)
    bias_of = np.zeros(head.n_rows, np.float32) if bias is None else np.frombuffer(file.read(bias), "<f4")
    id_of = np.empty(head.n_rows, np.int64)
    id_of[row_of[row_of >= 0]] = np.flatnonzero(row_of >= 0)
    best, found, logits = np.full(n, -np.inf, np.float32), np.zeros(n, np.int64), np.empty(len(ids), np.float32)
    rows = row_of[ids]
    order = np.argsort(rows, kind="stable")
    in_order = rows[order]
    with progress("measuring its acceptance", head.n_rows, "rows") as advance:
        for start, block in blocks(file, head):
            values = states @ block.T + bias_of[start : start + len(block)]
            row = values.argmax(axis=1)
            most = values[np.arange(n), row]
            better = most > best
            best[better], found[better] = most[better], id_of[start + row[better]]
            here = order[slice(*np.searchsorted(in_order, (start, start + len(block))))]
            logits[here] = values[at[here], rows[here] - start]
            advance(len(block))
    return found, logits


def _best(drafted: np.ndarray, at: np.ndarray, ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """What is drafted at each position from its kept rows and the added ones: the lowest id of the greatest logit."""
    most = drafted["logit"].copy()
    np.maximum.at(most, at, logits)
    best = np.where(drafted["logit"] == most, drafted["id"].astype(np.int64), np.iinfo(np.int64).max)
    greatest = logits == most[at]
    np.minimum.at(best, at[greatest], ids[greatest])
    return best
