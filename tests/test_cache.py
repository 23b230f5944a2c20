"""Smaller and quantised KV caches of the drafter: drafts go on, and the text stays the target's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamabase.llama.context import F32, Cache, Context, ContextParams
from llamabase.llama.model import Model
from llamabase.sampling.settings import GREEDY
from runner.draft.reading import AHEAD
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions


def tokens_and_drafts(engine: Engine, draft_max: int) -> tuple[list[int], list[int]]:
    rounds = list(engine.rounds(engine.model.tokenize("the sea and"), GREEDY, max_tokens=220, draft_max=draft_max))
    return [token for r in rounds for token in r.tokens], [len(r.drafted) for r in rounds]


@pytest.mark.parametrize("name", ["target", "good-trimmed", "spec-trimmed"])
@pytest.mark.parametrize("n_ctx", [64, 96])
def test_a_drafter_with_a_small_context_drafts_to_the_end(toys: dict[str, Path], name: str, n_ctx: int) -> None:
    with Engine(LoadOptions(toys["target"], toys[name], n_ctx=256, n_ctx_draft=n_ctx)) as engine:
        plain, _ = tokens_and_drafts(engine, 0)
        text, drafted = tokens_and_drafts(engine, 3)
        assert text == plain
        assert min(drafted[:-3]) == 3  # also where the text is much longer than its context
        assert engine.drafter is not None
        assert engine.drafter.n_ctx == n_ctx


def test_the_part_it_reads_moves_by_halves(toys: dict[str, Path]) -> None:
    """Most rounds read a token or two; the whole part is read anew once every half of the context."""
    with Engine(LoadOptions(toys["target"], toys["target"], n_ctx=256, n_ctx_draft=64)) as engine:
        drafter = engine.drafter
        assert drafter is not None
        text = list(range(20, 240))
        starts = []
        for n in range(1, len(text)):
            seen = drafter.reading._window(text[:n])
            assert len(seen) + AHEAD <= 64
            assert list(seen[-3:]) == text[:n][-3:]
            assert list(seen[:3]) == text[: min(3, n)]
            starts.append(n - len(seen))
        assert sorted(set(starts)) == [0, 32, 64, 96, 128, 160, 192]


@pytest.mark.parametrize("types", [("q8_0", "q8_0"), ("f32", "f32"), ("q8_0", "f16")])
def test_cache_types(toys: dict[str, Path], types: tuple[str, str]) -> None:
    cache = Cache(*types)
    with Engine(LoadOptions(toys["target"], toys["good-trimmed"], n_ctx=256, cache_draft=cache)) as engine:
        plain, _ = tokens_and_drafts(engine, 0)
        text, drafted = tokens_and_drafts(engine, 3)
        assert text == plain
        assert sum(drafted) > 100
    with Engine(LoadOptions(toys["target"], None, n_ctx=256, cache=cache)) as engine:
        assert len(tokens_and_drafts(engine, 0)[0]) == 220


def test_a_cache_in_f32_is_read_in_f32(toys: dict[str, Path]) -> None:
    """So one token at a time has the logits of many at once, on any processor, and no text parts at a near-tie."""
    ids = list(range(20, 60))
    with Model(toys["target"]) as model:
        with Context(model, 64, ContextParams(cache=F32), n_outputs=40) as context:
            together = context.decode(ids, 40).copy()
        with Context(model, 64, ContextParams(cache=F32)) as context:
            alone = np.concatenate([context.decode([token]).copy() for token in ids])
    assert np.abs(together - alone).max() < 1e-5 * np.ptp(together)
