"""How fast counting and answering are, against the same work done plainly, in turns in one run."""

from __future__ import annotations

import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from corpus.count import BATCH_CHARS, _batches, count
from corpus.generate import generate
from corpus.prompts import load_prompts, spread
from corpus.sources import Document
from corpus.tokenizer import Counter
from gguf_trim.pairs.catalog import load_catalog
from gguf_trim.pairs.fetch import fetch
from llamabase.llama.context import Context
from llamabase.llama.model import Model
from llamabase.sampling.settings import Sampling

pytestmark = pytest.mark.slow


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def test_counting_keeps_up_with_bare_tokenizing(tmp_path: Path) -> None:
    """`count` of a file takes at most 1/0.9 of the time that `encode_batch` alone needs for the same texts."""
    tokenizer = fetch(load_catalog().models["qwen2.5-coder-0.5b-instruct"])
    texts = [path.read_text("utf-8", "replace") for path in Path(sysconfig.get_path("stdlib")).glob("*.py")] * 4
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, "utf-8")
    counter = Counter(tokenizer)
    assert counter.fast is not None
    documents = [Document(text) for text in texts]

    def bare() -> None:
        for batch in _batches(documents):
            counter.fast.encode_batch(batch.texts, add_special_tokens=False)

    assert sum(map(len, texts)) > 8 * BATCH_CHARS
    opening = statistics.median(seconds(lambda: Counter(tokenizer).close()) for _ in range(3))
    ratios = []
    for turn in range(6):
        plain = seconds(bare)
        ours = seconds(lambda: count([tmp_path], tokenizer)) - opening
        if turn:
            ratios.append(plain / ours)
    counter.close()
    print(f"count / encode_batch: {statistics.median(ratios):.3f} of {sorted(ratios)}")
    assert statistics.median(ratios) >= 0.9


def test_sixteen_answers_at_a_time_bring_what_batches_of_sixteen_do(tmp_path: Path) -> None:
    """At least half of it: prompts are read in both, which takes as long for each answer either way."""
    target = fetch(load_catalog().models["qwen2.5-coder-1.5b-instruct"])
    with Model(target) as model:
        with Context(model, 256) as context:

            def step(n: int) -> float:
                context.truncate(0)
                return seconds(lambda: context.decode(list(range(n)), n))

            steps = {n: min(step(n) for _ in range(5)) for n in (1, 16)}
        prompts = spread(load_prompts(), 48)
        rates: dict[int, list[float]] = {1: [], 16: []}
        for turn, (at_once, chosen) in enumerate(((1, prompts[::16]), (16, prompts), (1, prompts[8::16]))):
            out = tmp_path / f"{turn}.jsonl"
            started = time.perf_counter()
            tokens = generate(chosen, model, out, n_parallel=at_once, max_tokens=192, sampling=Sampling(temp=0))
            rates[at_once].append(tokens / (time.perf_counter() - started))
    ratio, most = rates[16][0] / statistics.mean(rates[1]), 16 * steps[1] / steps[16]
    print(f"16 at a time / one: {ratio:.2f}; the batch alone {most:.2f}; tok/s {rates}")
    assert ratio >= 0.5 * most
    assert ratio > 1.2
