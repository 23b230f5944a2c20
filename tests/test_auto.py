"""Drafting by cost: exact whatever it decides, and never slower by more than it may be, in worlds of known costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.noise import Noise
from corpus.sampling import Sampling
from runner.auto import LOSS, TRIAL, AutoDrafter
from runner.drafter import Proposal
from runner.engine import Engine
from runner.pace import STAKE, Chances, StepCost, best_cut

GREEDY = Sampling(temp=0)
# Seconds by batch size: kernels that like batches of four, dear verifying, and a machine bound by memory.
UNEVEN = {1: 0.087, 2: 0.164, 3: 0.196, 4: 0.143, 5: 0.210, 6: 0.23, 8: 0.260}
DEAR = {1: 0.098, 2: 0.179, 3: 0.228, 4: 0.205, 5: 0.337, 6: 0.36, 8: 0.415}
FLAT = {1: 0.050, 2: 0.051, 3: 0.052, 4: 0.053, 5: 0.054, 6: 0.056, 8: 0.060}
DRAFT = {1: 0.018, 2: 0.030, 4: 0.035, 16: 0.1, 64: 0.25}
QUICK = {1: 0.006, 2: 0.0062, 4: 0.0065, 16: 0.01, 64: 0.03}


@dataclass
class World:
    """A text of which the drafter gets each token right with a chance of its own, that it half knows."""

    acceptance: float
    seed: int
    verify: StepCost
    draft: StepCost
    prompt: int = 60
    tokens: int = 128
    right: np.ndarray = field(init=False)
    claims: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        n = self.prompt + self.tokens + 64
        chances = self.rng.beta(2 * self.acceptance + 1e-3, 2 * (1 - self.acceptance) + 1e-3, n)
        self.right = self.rng.random(n) < chances
        self.claims = np.clip(0.8 * chances + 0.2 * self.rng.random(n), 0.01, 0.999)

    def noise(self) -> float:
        return float(np.exp(self.rng.normal(0, 0.05)))


class Simulated:
    """A ModelDrafter of a World: token i of the true text is i itself."""

    def __init__(self, world: World) -> None:
        self.world, self.seconds, self.held = world, 0.0, 0

    def unread(self, text: Sequence[int]) -> int:
        return len(text) - min(self.held, len(text) - 1)

    def propose(self, text: Sequence[int], sampling: Sampling, noise: Noise) -> Iterator[Proposal]:
        unread, i = self.unread(text), len(text)
        while True:
            self.seconds += self.world.draft.of(unread) * self.world.noise()
            self.held = i
            yield Proposal(i if self.world.right[i] else 10**6, float(self.world.claims[i]))
            i, unread = i + 1, 1


def seconds_of(world: World, auto: AutoDrafter | None, fixed: int = 0) -> float:
    """What an answer takes with drafting by cost, or with a fixed draft length (0: plain)."""
    drafter = Simulated(world)
    if auto is not None:
        auto._drafter = drafter  # type: ignore[assignment]
        auto.prepare([], world.tokens)
    text, left, total = list(range(world.prompt)), world.tokens, 0.0
    noise = Noise(0)
    while left:
        before = drafter.seconds
        n = min(15, left - 1)
        if auto is not None:
            tokens = auto.draft(text, n, GREEDY, noise)
        else:
            proposals = drafter.propose(text, GREEDY, noise)
            tokens = [next(proposals).token for _ in range(min(fixed, n))]
        verify = world.verify.of(len(tokens) + 1) * world.noise()
        accepted = next((i for i, token in enumerate(tokens) if token != len(text) + i), len(tokens))
        text += range(len(text), len(text) + accepted + 1)
        drafter.held = min(drafter.held, len(text) - 1)
        left -= accepted + 1
        seconds = verify + drafter.seconds - before
        total += seconds
        if auto is not None:
            auto.learn(len(tokens), accepted, accepted + 1, seconds, verify)
    return total


# Where a round of drafts costs more than a plain step, it must be earned first, which takes from what is won.
@pytest.mark.parametrize(
    ("costs", "steps", "share"),
    [(UNEVEN, DRAFT, 0.78), (DEAR, DRAFT, 0.78), (FLAT, QUICK, 0.9)],
    ids=["uneven", "dear", "flat"],
)
@pytest.mark.parametrize("acceptance", [0.02, 0.3, 0.6, 0.8, 0.95])
def test_never_much_slower_than_plain_and_near_the_best_fixed_length(
    costs: dict[int, float], steps: dict[int, float], share: float, acceptance: float
) -> None:
    verify, draft = StepCost(dict(costs)), StepCost(dict(steps))
    plain, auto, fixed = [], [], dict.fromkeys((1, 2, 3, 5, 8), 0.0)
    for session in range(4):
        drafter = AutoDrafter(None, StepCost(dict(costs)), StepCost(dict(steps)))
        for answer in range(4):

            def world(seed: int = 10 * session + answer) -> World:
                return World(acceptance, seed, verify, draft)

            plain.append(seconds_of(world(), None))
            auto.append(seconds_of(world(), drafter))
            for n in fixed:
                fixed[n] += seconds_of(world(), None, n)
    ratios = np.array(plain) / np.array(auto)
    assert ratios.min() > 0.92  # one answer, beside the noise of its own steps
    assert ratios.mean() > 0.97
    best = sum(plain) / min(sum(plain), *fixed.values())
    assert sum(plain) / sum(auto) > share * best


@given(
    st.sampled_from([UNEVEN, DEAR, FLAT]),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=60), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_wherever_an_answer_ends_guesses_have_cost_little_of_it(
    costs: dict[int, float], texts: list[list[int]], seed: int
) -> None:
    """The law of the account, for what the text suggests: in texts that repeat themselves, and then do not."""
    verify = StepCost(dict(costs))
    plain, auto = verify.of(1), AutoDrafter(None, StepCost(dict(costs)), None)
    for answer in texts:
        prompt = np.random.default_rng(seed).integers(0, 4, 40).tolist()
        whole, text, seconds = [*prompt, *answer], list(prompt), 0.0
        auto.prepare(text, 256)
        while len(text) < len(whole):
            guess = auto.draft(text, 15, GREEDY, Noise(0))
            rest = whole[len(text) :]
            accepted = next((i for i, (a, b) in enumerate(zip(guess, rest, strict=False)) if a != b), len(guess))
            tokens = rest[: accepted + 1]
            took = verify.of(len(guess) + 1)
            auto.learn(len(guess), min(accepted, len(tokens)), len(tokens), took, took)
            text, seconds = [*text, *tokens], seconds + took
            assert seconds <= plain * ((1 + LOSS) * (len(text) - len(prompt)) + STAKE) + 1e-9


@pytest.mark.parametrize("acceptance", [0.02, 0.6, 0.9])
def test_short_answers_cost_one_trial_a_session(acceptance: float) -> None:
    """In answers of sixteen tokens a drafter whose rounds are dear has no time to earn anything."""
    verify, draft = StepCost(dict(UNEVEN)), StepCost(dict(DRAFT))
    auto = AutoDrafter(None, StepCost(dict(UNEVEN)), StepCost(dict(DRAFT)))
    lost = []
    for answer in range(12):
        worlds = [World(acceptance, answer, verify, draft, tokens=16) for _ in range(2)]
        lost.append((seconds_of(worlds[0], auto) - seconds_of(worlds[1], None)) / verify.of(1))
    assert sum(lost) < TRIAL + 1
    assert max(lost[3:]) < 0.5


def test_a_reading_that_was_quicker_than_thought_has_won_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts are read in large batches, which the line through the measured sizes makes too dear."""

    class Batched(StepCost):
        def of(self, n: int) -> float:
            return super().of(n) * (0.15 if n > 16 else 1.0)

    world = World(0.0, 0, StepCost(dict(UNEVEN)), Batched(dict(DRAFT)), prompt=400, tokens=400)
    world.right[:], world.claims[:] = False, 0.99
    auto, learn, of_late = AutoDrafter(None, StepCost(dict(UNEVEN)), StepCost(dict(DRAFT))), AutoDrafter.learn, []

    def watched(*args: float) -> None:
        learn(*args)  # type: ignore[arg-type]
        of_late.append(auto._seconds)

    monkeypatch.setattr(AutoDrafter, "learn", watched)
    seconds_of(world, auto)
    assert len(set(of_late)) > 1  # it did read
    assert min(of_late) > 0


def test_readings_of_one_answer_are_bounded_together() -> None:
    """A drafter that does not pay is put aside, and must then read what was written without it, again and again."""
    auto, ratios = AutoDrafter(None, StepCost(dict(FLAT)), StepCost(dict(DRAFT))), []
    for answer in range(6):
        worlds = [World(0.3, answer, StepCost(dict(FLAT)), StepCost(dict(DRAFT)), tokens=300) for _ in range(2)]
        ratios.append(seconds_of(worlds[0], None) / seconds_of(worlds[1], auto))
    assert min(ratios) > 0.93


def test_the_bound_on_losses_is_what_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter that is always sure and always wrong: without the account of losses it costs a lot more."""
    verify, draft = StepCost(dict(UNEVEN)), StepCost(dict(DRAFT))

    def ratio() -> float:
        world, same = World(0.0, 1, verify, draft), World(0.0, 1, verify, draft)
        for each in (world, same):
            each.right[:], each.claims[:] = False, 0.99
        auto = AutoDrafter(None, StepCost(dict(UNEVEN)), StepCost(dict(DRAFT)))
        return seconds_of(same, None) / seconds_of(world, auto)

    assert ratio() > 0.92
    monkeypatch.setattr("runner.auto.LOSS", 10.0)
    monkeypatch.setattr(Chances, "saw", lambda self, claimed, accepted: None)
    assert ratio() < 0.7


@given(
    st.lists(st.floats(0.01, 0.99), max_size=8),
    st.lists(st.floats(0.001, 1.0), min_size=9, max_size=9),
    st.floats(0.1, 50),
    st.floats(0, 0.1),
)
def test_best_cut_is_the_best_of_all(chances: list[float], seconds: list[float], rate: float, step: float) -> None:
    verify = StepCost(dict(enumerate(seconds, 1)))

    def worth(m: int) -> float:
        expected = sum(float(np.prod(chances[: i + 1])) for i in range(m))
        return expected - rate * (m * step + verify.of(1 + m) - verify.of(1))

    m, found = best_cut(chances, verify, rate, step)
    assert found == pytest.approx(worth(m) if m else 0.0)
    assert found >= max(map(worth, range(len(chances) + 1))) - 1e-9


@given(st.floats(0.01, 0.99), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_chances_learn_what_claims_are_worth(claimed: float, true: float, seed: int) -> None:
    chances, rng = Chances(), np.random.default_rng(seed)
    assert chances.of(claimed) == pytest.approx(claimed)
    for accepted in rng.random(400) < true:
        chances.saw(claimed, bool(accepted))
    assert chances.of(claimed) == pytest.approx(true, abs=0.3)


def test_no_number_of_tokens_costs_less_than_the_largest_measured() -> None:
    """Where a single token has become dearer than a batch, the line through both falls below nothing."""
    cost = StepCost({1: 0.006, 64: 0.0065})
    for _ in range(30):
        cost.saw(1, 0.012)
    assert cost.of(1) > cost.of(64)
    assert cost.of(2000) >= cost.of(64) > 0


def test_costs_follow_what_is_seen_and_not_a_hiccup() -> None:
    cost = StepCost({1: 0.1, 4: 0.2})
    assert cost.of(2) == pytest.approx(0.1 + 0.1 / 3)
    assert cost.of(7) == pytest.approx(0.3)
    cost.saw(1, 5.0)
    assert cost.of(1) < 0.12
    for _ in range(60):
        cost.saw(1, 0.3)
    assert cost.of(1) == pytest.approx(0.3, rel=0.05)
    assert cost.of(4) > 0.25  # a longer context makes every size dearer


@pytest.mark.parametrize("name", [None, "target", "good-trimmed", "wrong", "tiny-trimmed", "spec-trimmed"])
def test_greedy_text_is_plain_greedy(toys, name: str | None, eager) -> None:
    with Engine(toys["target"], toys[name] if name else None, n_ctx=256) as engine:
        engine.model.is_end = lambda token: False  # type: ignore[method-assign]
        drafted = 0
        for text in ("the sea and the tea", "a rose is a rose is a rose is a", "in"):
            ids = engine.model.tokenize(text)
            plain = [token for r in engine.rounds(ids, GREEDY, max_tokens=60, draft_max=0) for token in r.tokens]
            rounds = list(engine.rounds(ids, GREEDY, max_tokens=60))
            assert [token for r in rounds for token in r.tokens] == plain
            drafted += sum(len(r.drafted) for r in rounds)
        assert drafted > 20


def test_drafts_nothing_without_room() -> None:
    auto = AutoDrafter(None, StepCost(FLAT), None)
    auto.prepare([1], 1)
    assert auto.draft([1, 1, 1, 1], 0, GREEDY, Noise(0)) == []
