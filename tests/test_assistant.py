"""Gemma 4's assistants: a cut is its source bit for bit, and the text is the target's whatever one drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gguf_trim.cut import lay_out, write
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .test_mtp import some
from .test_state_fed import F32, SAMPLINGS, answers_file, fitted, text_of
from .toy_gemma import write_assistant, write_gemma4

KINDS = {"whole": "auto", "trim": "trim", "context": "context", "spec": "spec"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Targets, an assistant, a cut of it to 304 rows, and one to 16 with a speculator."""
    folder = tmp_path_factory.mktemp("gemma")
    found = {
        "target": write_gemma4(folder / "target.gguf", seed=1),
        "layered": write_gemma4(folder / "layered.gguf", seed=2, n_per_layer=32),
        "whole": write_assistant(folder / "whole.gguf"),
    }
    for name, k in (("cut", 304), ("spec", 16)):
        found[name] = folder / f"{name}.gguf"
        write(lay_out(found["whole"], some(k), found["target"]), found[name])
    fitted(found["spec"], answers_file(folder), found["target"])
    return found


@pytest.fixture(scope="module")
def engines(files: dict[str, Path]) -> Iterator[Callable[..., Engine]]:
    """By what they draft with: None, "whole", or a vocabulary of the cut with a speculator ("trim": of the other)."""
    opened: dict[tuple[str | None, str], Engine] = {}

    def get(what: str | None, target: str = "target") -> Engine:
        if (what, target) not in opened:
            draft = None if what is None else files[{"whole": "whole", "trim": "cut"}.get(what, "spec")]
            vocab = KINDS[what] if what else "auto"
            opened[what, target] = Engine(LoadOptions(files[target], draft, 256, 1, vocab=vocab, cache=F32))
        return opened[what, target]

    yield get
    for engine in opened.values():
        engine.close()


@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("what", KINDS)
def test_the_text_is_the_plain_one(engines, eager, what: str, kind: str) -> None:
    engine, sampling = engines(what), SAMPLINGS[kind]
    engine.measure()
    for seed in (3, 4):
        plain = text_of(engines(None), sampling, draft_max=0, seed=seed)
        for draft_max in (1, 3, 8, None):
            assert text_of(engine, sampling, draft_max=draft_max, seed=seed) == plain
