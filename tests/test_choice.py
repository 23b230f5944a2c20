"""From which vocabulary to draft: the fit counts how often each is right, and measured steps decide between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from corpus.answers import TargetAnswer
from gguf_trim.cut import lay_out, write
from gguf_trim.fit.calibrate import HELD_OUT, JUDGED, TeacherForced, held_out
from gguf_trim.fit.closed_form import attach
from gguf_trim.format.companion import Trimmed
from gguf_trim.format.speculator import ACCEPTANCE, Speculator
from gguf_trim.pairs.prepare import prepare
from gguf_trim.plan import uncut
from llamabase import store
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.context import Context
from llamabase.llama.model import Model
from llamabase.llama.rounds import NOISE, quickest
from llamabase.llama.timing import StepCost
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import GREEDY
from runner.draft import measured
from runner.draft.measured import measured_vocabs
from runner.draft.opening import DraftOptions, open_drafter
from runner.loop.engine import Engine
from runner.loop.record import Record
from runner.loop.weights import LoadOptions

from .conftest import copy_trimmed, keep_first, with_speculator
from .test_measured import write_facts
from .toy import write_model

VERIFY = StepCost({1: 1.0, 2: 1.1, 4: 1.3, 8: 2.0})
EQUAL = dict.fromkeys(ACCEPTANCE, 0.8)


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache" / "remembered.sqlite"
    monkeypatch.setattr(store, "memory_file", lambda: path)
    return path


@pytest.fixture
def spec(toys: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """The toy drafter with a speculator, of which these acceptance rates are said."""

    def made(**rates: float) -> Path:
        path = copy_trimmed(toys["spec-trimmed"], tmp_path / "spec.gguf")
        speculator = Speculator.of(trimmed := Trimmed.open(path))
        assert speculator is not None
        attach(trimmed, replace(speculator, acceptance=rates))
        return path

    return made


def half_right(target: Path, n: int) -> list[TargetAnswer]:
    """Answers in which about half of the tokens are what a model says, and many others are repeated."""
    rng, answers = np.random.default_rng(7), []
    with Model(target) as model, Context(model, 128) as context:
        for i in range(n):
            text: list[int] = rng.integers(3, 500, 6).tolist()
            while len(text) < 30:
                said = int(context.decode(text[context.n_past :], 1)[0].argmax())
                text.append(said if rng.random() < 0.5 else int(rng.choice(text)))
            context.truncate(0)
            answers.append(TargetAnswer(str(i), "all", text[:6], text[6:]))
    return answers


@pytest.mark.parametrize("n", [2 * HELD_OUT, 2])
def test_the_fit_counts_what_the_drafter_drafts(toys, tmp_path: Path, monkeypatch, n: int) -> None:
    """With every vocabulary, token by token, on the answers that the speculator was not fitted to; of two on both."""
    for module in ("gguf_trim.fit.acceptance", "runner.draft.rows"):
        monkeypatch.setattr(f"{module}.CANDIDATES", 100)
        monkeypatch.setattr(f"{module}.CONTEXT_ROWS", 4)
    path, answers = copy_trimmed(toys["tiny-trimmed"], tmp_path / "cut.gguf"), held_out(half_right(toys["target"], n))
    trimmed = Trimmed.open(path)
    attach(trimmed, TeacherForced.of(path, answers, trimmed, n_threads=1).fitted(trimmed.companion, 32))
    found = Speculator.of(Trimmed.open(path))
    assert found is not None
    judged = [answer for answer in answers if answer.label == JUDGED] or answers
    assert len(judged) == 2
    assert found.n_positions == sum(len(a.prompt) + len(a.answer) for a in answers if a not in judged or n == 2)
    rates = {}
    for name, file in {"trim": path, "context": path, "spec": path, "full": toys["target"]}.items():
        drafter = open_drafter(DraftOptions(file, 128, 1), Vocabulary(GGUFFile(toys["target"])))
        drafter.vocab = name
        assert drafter.using == name
        right = [
            drafter.draft([*answer.prompt, *answer.answer[:i]], 1, GREEDY, Noise(0)) == [token]
            for answer in judged
            for i, token in enumerate(answer.answer)
        ]
        drafter.close()
        rates[name] = np.mean(right)
    assert found.acceptance == pytest.approx(rates)
    assert n == 2 or rates["trim"] < rates["context"] < rates["spec"] < rates["full"]


@pytest.mark.parametrize(
    ("rates", "steps", "wanted"),
    [
        ({"trim": 0.7, "context": 0.8, "spec": 0.85}, {"trim": 0.2, "context": 0.21, "spec": 0.22}, "spec"),
        ({"trim": 0.7, "context": 0.8, "spec": 0.85}, {"trim": 0.2, "context": 0.21, "spec": 0.5}, "context"),
        ({"trim": 0.84, "context": 0.85, "spec": 0.85}, {"trim": 0.2, "context": 0.4, "spec": 0.5}, "trim"),
        ({"trim": 0.7, "spec": 0.7, "full": 0.9}, {"trim": 0.2, "spec": 0.2, "full": 0.2}, "full"),
        # As quick as makes no difference: the likeliest draft, and of equal ones the first.
        ({"trim": 0.800, "context": 0.801}, {"trim": 0.2, "context": 0.206}, "context"),
        ({"trim": 0.8, "context": 0.8}, {"trim": 0.2, "context": 0.194}, "trim"),
    ],
)
def test_the_quickest_is_chosen(rates: Mapping[str, float], steps: Mapping[str, float], wanted: str) -> None:
    assert quickest(rates, steps, VERIFY) == wanted


def test_no_choice_is_slower_than_another_by_more_than_the_noise() -> None:
    """By trial: at the best fixed draft length, whatever rates and steps are."""

    def speed(rate: float, step: float) -> float:
        return max(sum(rate**i for i in range(m + 1)) / (VERIFY.of(m + 1) + m * step) for m in range(1, 17))

    for spec, a, b in itertools.product((0.5, 0.8, 0.95), (0.7, 0.9, 1.0), (0.3, 0.8, 1.3)):
        rates, steps = {"spec": spec, "trim": a * spec}, {"spec": 0.4, "trim": 0.4 * b}
        speeds = {vocab: speed(rates[vocab], steps[vocab]) for vocab in rates}
        assert speeds[quickest(rates, steps, VERIFY)] >= (1 - NOISE) * max(speeds.values())


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """Says how many plain steps a draft step takes by vocabulary, and counts the measurements under "n"."""
    said = {"trim": 0.5, "context": 0.5, "spec": 0.5, "n": 0}

    def measured_vocabs(drafter, target) -> dict[str, float]:
        said["n"] += 1
        plain = measured.measured_verify(target)[0][1]
        return {vocab: said[vocab] * plain for vocab in drafter.candidates}

    monkeypatch.setattr(measured, "measured_vocabs", measured_vocabs)
    yield said


def test_the_choice_follows_steps_and_rates(toys, spec, seconds, memory: Path) -> None:
    options = LoadOptions(toys["target"], spec(trim=0.7, context=0.75, spec=0.8, full=0.8), n_ctx=128)
    with Engine(options) as engine:
        assert engine.drafter.using == "spec"  # nothing is known yet
        assert engine.auto and engine.drafter.using == "spec"
        assert engine.drafter.acceptance == pytest.approx(0.8)
        seconds["spec"] = 2.0
        memory.unlink()
        engine.measure()
        assert engine.drafter.using == "context"
        assert engine.drafter.acceptance == pytest.approx(0.75)
        with engine.share_weights() as other:
            assert other.drafter.using == "context"
    spec(trim=0.9, context=0.75, spec=0.8, full=0.8)  # another fit
    with Engine(options) as engine:
        assert engine.auto and engine.drafter.using == "trim"
        engine.drafter.vocab = "spec"  # as a request may ask
        assert engine.drafter.using == "spec"
        assert engine.drafter.acceptance == pytest.approx(0.8)


def test_the_choice_is_remembered(toys, spec, seconds, memory: Path) -> None:
    """Also for rounds of a fixed number of drafts, which measure nothing themselves."""
    options = LoadOptions(toys["target"], spec(**EQUAL), n_ctx=128)

    def used() -> str:
        record = Record()
        with Engine(options) as engine:
            list(engine.pieces([65, 66], GREEDY, record, max_tokens=4, draft_max=2))
        return record.vocab

    assert (used(), seconds["n"]) == ("spec", 0)
    with Engine(options) as engine:
        engine.measure()
        assert (engine.drafter.using, seconds["n"]) == ("trim", 1)
    assert used() == "trim"
    with Engine(options) as engine:
        engine.measure()
        assert (engine.drafter.using, seconds["n"]) == ("trim", 1)


@pytest.mark.parametrize("damage", [None, "nonsense", "auto", "full", 5, ["trim"], {}])
def test_a_damaged_choice_is_made_again(toys, spec, seconds, memory: Path, damage: object) -> None:
    options = LoadOptions(toys["target"], spec(**EQUAL), n_ctx=128)
    with Engine(options) as engine:
        engine.measure()
    write_facts(memory, "costs", {"verify": {1: 1.0, 2: 1.0}, "draft": {1: 0.1}, "vocab": damage})
    with Engine(options) as engine:
        assert engine.drafter.using == "spec"
        engine.measure()
        assert (engine.drafter.using, seconds["n"]) == ("trim", 2)


@pytest.mark.parametrize("vocab", ["trim", "context", "spec"])
def test_what_is_given_by_hand_is_obeyed(toys, spec, seconds, memory: Path, vocab: str) -> None:
    seconds[vocab] = 9.0
    with Engine(LoadOptions(toys["target"], spec(**EQUAL), n_ctx=128, vocab=vocab)) as engine:
        engine.measure()
        assert (engine.drafter.using, seconds["n"]) == (vocab, 0)


@pytest.mark.parametrize("rates", [{}, {"trim": 0.9}, {"trim": 0.9, "context": 2.0, "spec": 0.9}])
def test_without_rates_the_most_is_used(toys, spec, seconds, memory: Path, rates: dict[str, float]) -> None:
    """Older companions have one rate or none. A rate above 1 is damage."""
    with Engine(LoadOptions(toys["target"], spec(**rates), n_ctx=128)) as engine:
        engine.measure()
        assert (engine.drafter.using, seconds["n"]) == ("spec", 0)


@pytest.mark.parametrize("name", ["target", "good-trimmed"])
def test_there_may_be_nothing_to_choose(toys, seconds, memory: Path, name: str) -> None:
    with Engine(LoadOptions(toys["target"], toys[name], n_ctx=128)) as engine:
        engine.measure()
        assert (engine.drafter.using, seconds["n"]) == ("full" if name == "target" else "context", 0)


def test_an_interruption_leaves_what_was_asked_for(toys, spec, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(LoadOptions(toys["target"], spec(**EQUAL), n_ctx=128)) as engine:
        engine.drafter.vocab, calls = "context", itertools.count()
        honest = engine.drafter.propose

        def pressed(*args):
            if next(calls) == 3:
                raise KeyboardInterrupt
            return honest(*args)

        monkeypatch.setattr(engine.drafter, "propose", pressed)
        with pytest.raises(KeyboardInterrupt):
            engine.measure()
        assert (engine.drafter.vocab, engine.drafter.auto) == ("context", "spec")
        engine.measure()
        assert engine.drafter.vocab == "context"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target, and itself cut to few of its many rows: scoring all of these takes longer than the step itself."""
    folder = tmp_path_factory.mktemp("large")
    target, cut = write_model(folder / "large.gguf", n_tokens=8_000), folder / "cut.gguf"
    write(lay_out(target, keep_first(400)), cut)
    return target, with_speculator(cut, 256)


@pytest.mark.parametrize(("spec_rate", "slowness", "taken"), [(0.6, 1, False), (0.99, 100, True)])
def test_steps_are_measured(
    large, memory: Path, monkeypatch: pytest.MonkeyPatch, spec_rate: float, slowness: float, taken: bool
) -> None:
    """A dear step is taken if it brings more, and if the target is so slow that it does not matter."""
    target, cut = large
    speculator = Speculator.of(trimmed := Trimmed.open(cut))
    assert speculator is not None
    attach(trimmed, replace(speculator, acceptance={"trim": 0.6, "context": 0.6, "spec": spec_rate}))
    with Engine(LoadOptions(target, cut, n_ctx=128, n_threads=1)) as engine:
        found = measured_vocabs(engine.drafter, engine.reader)
        assert 1.1 * found["trim"] < found["spec"] and found["context"] > 0
        plain = slowness * found["trim"]
        monkeypatch.setattr(measured, "measured_verify", lambda _: ({1: plain, 2: 1.01 * plain, 16: 1.1 * plain}, 0.0))
        before = [round_.tokens for round_ in engine.rounds([65, 66], GREEDY, max_tokens=9, draft_max=3)]
        engine.measure()
        assert (engine.drafter.using == "spec") == taken
        after = [round_.tokens for round_ in engine.rounds([65, 66], GREEDY, max_tokens=9, draft_max=3)]
        assert list(itertools.chain(*after)) == list(itertools.chain(*before))


@pytest.mark.parametrize(
    ("rates", "whole", "verify", "wanted"),
    [
        ({"trim": 0.7, "context": 0.7, "spec": 0.8, "full": 0.8}, 0.2, 1.0, True),  # a head that costs nothing
        ({"trim": 0.7, "context": 0.7, "spec": 0.8, "full": 0.8}, 0.4, None, False),  # as dear as with the speculator
        ({"trim": 0.8, "context": 0.8, "spec": 0.8, "full": 0.8}, 0.35, 1.0, False),  # the kept rows do as well
        ({"trim": 0.1}, 0.0, None, False),  # what is not known
    ],
)
def test_a_drafter_that_is_quicker_uncut_is_left_whole(
    toys, spec, monkeypatch, rates: dict[str, float], whole: float, verify: float | None, wanted: bool
) -> None:
    """The target is timed only where that matters."""
    said = {"full": whole, "trim": 0.2, "context": 0.05, "spec": 0.2}
    monkeypatch.setattr(
        uncut, "by_turns", lambda steps, *_: {name: [step() * 0 + said[name]] for name, step in steps.items()}
    )
    monkeypatch.setattr(uncut, "verify_cost", lambda _: StepCost({1: verify, 8: 2 * verify}))
    assert uncut.uncut_pays(toys["target"], toys["target"], spec(**rates)) == wanted


def test_prepare_remembers_whether_a_drafter_is_left_whole(toys, tmp_path: Path, memory: Path, monkeypatch) -> None:
    monkeypatch.setenv("GGUF_TRIM_CACHE", str(tmp_path))
    monkeypatch.setattr("gguf_trim.fit.calibrate.CONVERSATIONS", 4)
    monkeypatch.setattr("gguf_trim.plan.quickest.DRAFT_REPEAT", 1)
    asked: list[Path] = []
    monkeypatch.setattr("gguf_trim.pairs.prepare.uncut_pays", lambda *files: asked.extend(files) or True)
    pair = {"target": toys["target"], "drafter": toys["wrong"], "choose": keep_first(400)}
    made = prepare(**pair)
    assert asked == [toys["target"], toys["wrong"], made.trimmed]
    assert prepare(**pair) == made and len(asked) == 3
    assert (made.uncut, made.quickest) == (True, toys["wrong"])
    by_hand = prepare(**pair, requant=GGUFFile(made.trimmed).path.stem.rpartition("405")[2].lstrip("-") or "none")
    assert (by_hand.trimmed, by_hand.uncut, by_hand.quickest) == (made.trimmed, False, made.trimmed)
