"""Drafting by cost: exact whatever it decides, and near the best fixed draft length in worlds of known costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamabase.llama.timing import StepCost
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import Sampling
from runner.draft.auto import BUDGET, LOSS, AutoDrafter
from runner.draft.contracts import Proposal
from runner.draft.cost import Chances, DraftStats, best_cut, best_fixed
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

GREEDY = Sampling(temp=0)
# Seconds by batch size: kernels that like batches of four, dear verifying, and a machine bound by memory.
UNEVEN = {1: 0.087, 2: 0.164, 3: 0.196, 4: 0.143, 5: 0.210, 6: 0.23, 8: 0.260}
DEAR = {1: 0.098, 2: 0.179, 3: 0.228, 4: 0.205, 5: 0.337, 6: 0.36, 8: 0.415}
FLAT = {1: 0.050, 2: 0.051, 3: 0.052, 4: 0.053, 5: 0.054, 6: 0.056, 8: 0.060}
DRAFT = {1: 0.018, 2: 0.030, 4: 0.035}
QUICK = {1: 0.006, 2: 0.0062, 4: 0.0065}
FIXED = (1, 2, 3, 5, 8)
LONGEST_ANSWER = 256


def reading(draft: dict[int, float], verify: dict[int, float], share: float) -> StepCost:
    """The drafter's steps where it reads a text in this share of the target's time, a token an eighth of its V(8)."""
    return StepCost(draft | {64: draft[4] + 60 * share * verify[8] / 8})


@dataclass
class World:
    """A text; the drafter gets each token right with a chance of its own, and claims a noisy version of it."""

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
        self.world, self.seconds, self.held, self.acceptance = world, 0.0, 0, 0.0

    def unread(self, text: Sequence[int]) -> int:
        return len(text) - min(self.held, len(text) - 1)

    def prepare(self, text: Sequence[int], left: int) -> None:
        self.seconds += (self.world.draft.of(self.unread(text)) - self.world.draft.of(1)) * self.world.noise()
        self.held = len(text) - 1

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
    text, left = list(range(world.prompt)), world.tokens
    if auto is not None:
        auto._drafter = drafter  # type: ignore[assignment]
        auto.prepare(text, max(world.tokens, LONGEST_ANSWER))
    total = drafter.seconds
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
            auto.learn(len(tokens), len(tokens), accepted, accepted + 1, seconds, verify)
    return total


def session(
    costs: dict[int, float], steps: dict[int, float], share: float, acceptance: float, seed: int
) -> dict[str | int, float]:
    """Seconds of 512 tokens in answers of 16 to 256 to prompts of 20 to 120, by way: plain, auto, or a fixed length.

    Nothing is known of the drafter when it begins.
    """
    draft, rng = reading(steps, costs, share), np.random.default_rng([seed, int(100 * acceptance)])
    auto = AutoDrafter(None, StepCost(costs), reading(steps, costs, share))
    total: dict[str | int, float] = dict.fromkeys(("plain", "auto", *FIXED), 0.0)
    left = 512
    while left:
        tokens, prompt = min(left, int(rng.integers(16, LONGEST_ANSWER + 1))), int(rng.integers(20, 121))
        left -= tokens
        for way in total:
            world = World(acceptance, 1000 * seed + left, StepCost(costs), draft, prompt, tokens)
            fixed = way if isinstance(way, int) else 0
            total[way] += seconds_of(world, auto if way == "auto" else None, fixed)
    return total


@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.parametrize("acceptance", [0.02, 0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize(
    ("costs", "steps"), [(UNEVEN, DRAFT), (DEAR, DRAFT), (FLAT, QUICK)], ids=["uneven", "dear", "flat"]
)
def test_sessions_are_never_slower_and_near_the_best_fixed_length(
    costs: dict[int, float], steps: dict[int, float], acceptance: float, share: float
) -> None:
    sessions = [session(costs, steps, share, acceptance, seed) for seed in range(8)]
    assert min(seconds["plain"] / seconds["auto"] for seconds in sessions) > 0.96
    total = {way: sum(seconds[way] for seconds in sessions) for way in sessions[0]}
    best = min(total[way] for way in ("plain", *FIXED))
    assert best / total["auto"] > 0.95


@given(
    st.sampled_from([UNEVEN, DEAR, FLAT]),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=60), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_wherever_a_session_ends_guesses_have_cost_no_more_than_the_budget(
    costs: dict[int, float], texts: list[list[int]], seed: int
) -> None:
    """The law of the budget, for what the text suggests: in texts that repeat themselves, and then do not."""
    verify = StepCost(dict(costs))
    plain, auto = verify.of(1), AutoDrafter(None, StepCost(dict(costs)), None)
    seconds, emitted = 0.0, 0
    for answer in texts:
        prompt = np.random.default_rng(seed).integers(0, 4, 40).tolist()
        whole, text = [*prompt, *answer], list(prompt)
        auto.prepare(text, 256)
        while len(text) < len(whole):
            guess = auto.draft(text, 15, GREEDY, Noise(0))
            rest = whole[len(text) :]
            accepted = next((i for i, (a, b) in enumerate(zip(guess, rest, strict=False)) if a != b), len(guess))
            tokens = rest[: accepted + 1]
            took = verify.of(len(guess) + 1)
            auto.learn(len(guess), len(guess), min(accepted, len(tokens)), len(tokens), took, took)
            text, seconds, emitted = [*text, *tokens], seconds + took, emitted + len(tokens)
            assert seconds <= plain * ((1 + LOSS) * emitted + BUDGET) + 1e-9


def test_the_budget_is_what_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter that is always sure and always wrong, with nothing ever learned of it."""

    class Credulous(AutoDrafter):
        def learn(self, *args: float) -> None:  # type: ignore[override]
            before = self.stats.tokens, self.stats.steps
            super().learn(*args)  # type: ignore[arg-type]
            self.stats.tokens, self.stats.steps = before

    monkeypatch.setattr(Chances, "observe", lambda self, claimed, accepted: None)

    def lost(tokens: int) -> float:
        world, same = (World(0.0, 1, StepCost(UNEVEN), reading(DRAFT, UNEVEN, 0.1), tokens=tokens) for _ in range(2))
        for each in (world, same):
            each.right[:], each.claims[:] = False, 0.99
        auto = Credulous(None, StepCost(dict(UNEVEN)), reading(DRAFT, UNEVEN, 0.1))
        return (seconds_of(world, auto) - seconds_of(same, None)) / UNEVEN[1]

    assert lost(512) < BUDGET + LOSS * 512 + 4  # a round's own noise, and that of plain steps
    monkeypatch.setattr("runner.draft.auto.BUDGET", 1e9)
    assert lost(512) > 200


@pytest.mark.parametrize("acceptance", [0.02, 0.6, 0.9])
def test_short_answers_cost_no_more_than_the_budget(acceptance: float) -> None:
    """In answers of sixteen tokens a drafter whose rounds are dear has no time to earn anything."""
    draft = reading(DRAFT, UNEVEN, 0.1)
    auto = AutoDrafter(None, StepCost(dict(UNEVEN)), reading(DRAFT, UNEVEN, 0.1))
    lost = 0.0
    for answer in range(24):
        worlds = [World(acceptance, answer, StepCost(UNEVEN), draft, tokens=16) for _ in range(2)]
        lost += (seconds_of(worlds[0], auto) - seconds_of(worlds[1], None)) / UNEVEN[1]
    assert lost < BUDGET + LOSS * 24 * 16 + 1


def test_reading_is_not_charged_to_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the prompt takes five plain steps, ahead of the first round or in it."""

    def speedup() -> float:
        auto = AutoDrafter(None, StepCost(dict(FLAT)), reading(QUICK, FLAT, 0.3))
        seconds_of(World(0.95, 0, StepCost(FLAT), reading(QUICK, FLAT, 0.3), prompt=100, tokens=40), auto)
        assert auto._saved > 0
        return auto.stats.speedup

    ahead = speedup()
    monkeypatch.setattr(Simulated, "prepare", lambda self, text, left: None)
    assert speedup() == pytest.approx(ahead, rel=0.05)


def test_what_the_text_suggests_replaces_the_drafter_if_it_brings_more() -> None:
    world, text = World(0.95, 0, StepCost(FLAT), StepCost(QUICK)), list(range(60))
    auto = AutoDrafter(Simulated(world), StepCost(dict(FLAT)), StepCost(dict(QUICK)))  # type: ignore[arg-type]
    auto.prepare(text, 256)
    read = auto.seconds
    assert len(auto.draft([1, 2, 3] * 20, 15, GREEDY, Noise(0))) == 15 and auto.seconds == read
    assert auto.draft(text, 15, GREEDY, Noise(0)) and auto.seconds > read


@pytest.mark.parametrize(("accepted", "tokens", "judged"), [(0, 1, 1), (2, 3, 3), (2, 2, 2), (15, 16, 15)])
def test_learns_of_judged_drafts_alone(accepted: int, tokens: int, judged: int) -> None:
    """Up to the first that was not accepted, or to the end of the answer."""
    auto = AutoDrafter(None, StepCost(dict(FLAT)), None)
    auto.prepare([1], 256)
    assert len(auto.draft([1, 2, 3] * 20, 15, GREEDY, Noise(0))) == 15
    auto.learn(15, 15, accepted, tokens, FLAT[8], FLAT[8])
    counts = np.sum(auto.stats.matches.seen, axis=0)
    assert counts == pytest.approx([accepted, judged], rel=0.3)  # earlier ones count for less


def test_a_long_prompt_is_not_read_for_a_short_answer() -> None:
    """Whatever was won before, and however well the drafter does."""
    draft, auto = reading(QUICK, FLAT, 0.3), AutoDrafter(None, StepCost(dict(FLAT)), reading(QUICK, FLAT, 0.3))

    def answer(seed: int, prompt: int, tokens: int) -> float:
        seconds_of(World(0.95, seed, StepCost(FLAT), draft, prompt, tokens), auto)
        return auto.seconds

    for seed in range(20):
        answer(seed, prompt=20, tokens=16)
    assert auto._saved > 100
    assert answer(20, prompt=400, tokens=16) == 0
    assert answer(21, prompt=20, tokens=16) > 0


def test_a_drafter_that_is_known_is_not_tried_again() -> None:
    def lost(stats: DraftStats | None) -> float:
        draft = reading(DRAFT, UNEVEN, 0.3)
        auto = AutoDrafter(None, StepCost(dict(UNEVEN)), reading(DRAFT, UNEVEN, 0.3), stats)
        worlds = [World(0.02, 0, StepCost(UNEVEN), draft, tokens=64) for _ in range(2)]
        learned.append(auto.stats)
        return (seconds_of(worlds[0], auto) - seconds_of(worlds[1], None)) / UNEVEN[1]

    learned: list[DraftStats] = []
    assert lost(None) > 4
    assert abs(lost(learned[0])) < 2  # noise


@given(st.floats(0, 1), st.integers(1, 16), st.floats(0, 0.1))
def test_the_best_fixed_length_is_the_best_of_all(chance: float, n: int, step: float) -> None:
    verify = StepCost(dict(UNEVEN))
    tokens, seconds = best_fixed(chance, n, verify, step)
    for m in range(1, n + 1):
        assert tokens / seconds >= sum(chance**i for i in range(m + 1)) / (verify.of(m + 1) + m * step) - 1e-9


@given(
    st.lists(st.floats(0.01, 0.99), max_size=8),
    st.lists(st.floats(0.001, 1.0), min_size=9, max_size=9),
    st.floats(0.1, 50),
    st.floats(0, 0.1),
    st.integers(0, 8),
    st.floats(0, 1),
)
def test_best_cut_is_the_best_of_all_that_may_be_paid(
    chances: list[float], seconds: list[float], rate: float, step: float, made: int, most: float
) -> None:
    verify = StepCost(dict(enumerate(seconds, 1)))

    def added(m: int) -> float:
        return max(m - made, 0) * step + verify.of(1 + m) - verify.of(1)

    def value(m: int) -> float:
        return sum(float(np.prod(chances[: i + 1])) for i in range(m)) - rate * added(m)

    m, worth = best_cut(chances, verify, rate, step, made, most)
    assert worth == pytest.approx(value(m)) and (m == 0 or added(m) <= most)
    assert worth >= max(value(m) for m in range(len(chances) + 1) if m == 0 or added(m) <= most) - 1e-9


@given(st.floats(0.01, 0.99), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_chances_learn_what_claims_are_worth(claimed: float, true: float, seed: int) -> None:
    chances, rng = Chances(), np.random.default_rng(seed)
    assert chances.of(claimed) == pytest.approx(claimed) and chances.mean(0.7) == pytest.approx(0.7)
    for accepted in rng.random(400) < true:
        chances.observe(claimed, bool(accepted))
    assert chances.of(claimed) == pytest.approx(true, abs=0.3)
    assert chances.mean(0.7) == pytest.approx(true, abs=0.3)


def test_no_number_of_tokens_costs_less_than_the_largest_measured() -> None:
    """Where a single token has become dearer than a batch, the line through both falls below nothing."""
    cost = StepCost({1: 0.006, 64: 0.0065})
    for _ in range(30):
        cost.observe(1, 0.012)
    assert cost.of(1) > cost.of(64)
    assert cost.of(2000) >= cost.of(64) > 0


def test_costs_follow_what_is_seen_and_not_a_hiccup() -> None:
    cost = StepCost({1: 0.1, 4: 0.2})
    assert cost.of(2) == pytest.approx(0.1 + 0.1 / 3)
    assert cost.of(7) == pytest.approx(0.3)
    cost.observe(1, 5.0)
    assert cost.of(1) < 0.12
    for _ in range(60):
        cost.observe(1, 0.3)
    assert cost.of(1) == pytest.approx(0.3, rel=0.05)
    assert cost.of(4) > 0.25  # a longer context makes every size dearer


@pytest.mark.parametrize("name", [None, "target", "good-trimmed", "wrong", "tiny-trimmed", "spec-trimmed"])
def test_greedy_text_is_plain_greedy(toys, name: str | None, eager) -> None:
    with Engine(LoadOptions(toys["target"], toys[name] if name else None, n_ctx=256)) as engine:
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
