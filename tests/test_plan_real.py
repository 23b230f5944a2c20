"""The planner against brute force on real models: real cuts replayed position by position, and the live loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from corpus.answers import TargetAnswer
from corpus.prompts import load_prompts, split, spread
from corpus.ready import ready_counts
from gguf_trim.cut import lay_out, write
from gguf_trim.fit.calibrate import ROWS, share
from gguf_trim.format.companion import Trimmed
from gguf_trim.keep import keep_listed, keep_order
from gguf_trim.pairs.catalog import load_catalog
from gguf_trim.pairs.fetch import fetch
from gguf_trim.plan.added import AddedRows
from gguf_trim.plan.matches import tau_of
from gguf_trim.plan.planner import matches_of
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import EMBEDDING
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.context import Context
from llamabase.llama.model import Model
from llamabase.llama.quantize import quantize
from llamabase.sampling.settings import Sampling
from runner.loop.engine import Engine
from runner.loop.record import Record
from runner.loop.weights import LoadOptions

GREEDY = Sampling(temp=0)
SIZES = (2048, 8192, 32768)


def replay(drafter: Path, answers: list[TargetAnswer]) -> list[list[bool]]:
    """The argmax of a drafter file, cut or not, at every position of every answer."""
    trimmed = Trimmed.open(drafter) if "gguf_trim.d2t" in GGUFFile(drafter).fields else None
    found = []
    with Model(drafter) as model, Context(model, 1024, n_outputs=ROWS) as context:
        feed = trimmed.embeddings().rows if trimmed else list
        for answer in answers:
            context.truncate(0)
            text = [*answer.prompt, *answer.answer[:-1]]
            start = len(answer.prompt) - 1
            context.decode(feed(text[:start]), 0)
            right: list[bool] = []
            for i in range(start, len(text), ROWS):
                rows = context.decode(feed(text[i : i + ROWS]), len(text[i : i + ROWS])).argmax(axis=1)
                said = trimmed.d2t[rows] if trimmed else rows
                right += (said == answer.answer[i - start : i - start + ROWS]).tolist()
            found.append(right)
    return found


def live(target: Path, drafter: Path, prompts: list[list[dict[str, str]]], n: int, vocab: str) -> tuple[list, float]:
    """What the loop says with a drafter at draft length 3: answers, and tau."""
    answers, tokens, rounds = [], 0, 0
    with Engine(LoadOptions(target, drafter, n_ctx=1024, vocab=vocab)) as engine:
        for i, messages in enumerate(prompts):
            prompt, record = engine.prompt(messages), Record()
            for _ in engine.pieces(prompt, GREEDY, record, max_tokens=n, draft_max=3):
                pass
            answers.append(TargetAnswer(str(i), "all", prompt, record.token_ids))
            tokens, rounds = tokens + record.tokens, rounds + record.rounds
    return answers, tokens / rounds


@pytest.mark.parametrize(
    ("pair", "n_prompts", "n_tokens"),
    [
        pytest.param("smollm2-135m", 2, 16, id="smollm2"),
        pytest.param("qwen2.5-coder-1.5b", 12, 64, id="default", marks=pytest.mark.slow),
    ],
)
def test_every_k_is_a_replay_and_tau_is_the_loops(
    pair: str, n_prompts: int, n_tokens: int, smollm2, tmp_path: Path
) -> None:
    files = load_catalog().pair(pair)
    target, drafter = fetch(files.target), fetch(files.drafter)
    if target == drafter:  # a drafter that is never wrong would prove little
        drafter = tmp_path / "drafter.gguf"
        quantize(target, drafter, "Q4_0")
    vocabulary = Vocabulary(GGUFFile(drafter))
    n_rows = GGUFFile(drafter).tensors[EMBEDDING].n_rows
    counts = ready_counts(vocabulary)
    order = keep_order(vocabulary, np.ones(n_rows, bool), counts)
    cuts = {}
    for k in SIZES:
        cuts[k] = tmp_path / f"k{k}.gguf"
        write(lay_out(drafter, lambda v, has_row, _, k=k: keep_listed(v, has_row, order.tolist(), k)), cuts[k])
    prompts = [prompt.messages for prompt in spread(split(load_prompts(), "judge"), n_prompts)]
    for vocab in ("trim", "context"):
        answers, tau = live(target, cuts[8192], prompts, n_tokens, vocab)
        added = AddedRows(np.argsort(order), None)
        found = matches_of(drafter, answers, order, added=added)
        rights = found.right(8192) if vocab == "trim" else added.by_core["context", 8192].rights
        print(f"{pair} {vocab} 8192: tau live {tau:.3f}, planned {tau_of(rights, 3):.3f}")
        assert tau_of(rights, 3) == pytest.approx(tau, rel=0.02)
    assert 0.2 < share(found.right(2048)) < share(found.right(n_rows)) < 1
    for k, path in [*cuts.items(), (n_rows, drafter)]:
        replayed = replay(path, answers)
        assert [right.tolist() for right in found.right(k)] == replayed
        print(f"{pair} k = {k}: acceptance {share(found.right(k)):.4f} over {found.positions} positions, replayed")
        assert share(found.right(k)) == np.mean([right for answer in replayed for right in answer])
