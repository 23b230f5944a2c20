"""Drafting by cost: exact whatever it decides, and near the best fixed draft length in worlds of known costs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamabase.llama.context import LastBatch
from llamabase.llama.rounds import best_fixed
from llamabase.llama.timing import StepCost
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import Sampling
from runner.draft.auto import BUDGET, LOSS, AutoDrafter
from runner.draft.company import Company, Share
from runner.draft.contracts import Proposal, Round
from runner.draft.cost import Chances, DraftStats, KeptLength, best, worths
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

GREEDY = Sampling(temp=0)
# Seconds by batch size: kernels that like batches of four, dear verifying, and a machine bound by memory.
UNEVEN = {1: 0.087, 2: 0.164, 3: 0.196, 4: 0.143, 5: 0.210, 6: 0.23, 8: 0.260}
DEAR = {1: 0.098, 2: 0.179, 3: 0.228, 4: 0.205, 5: 0.337, 6: 0.36, 8: 0.415}
FLAT = {1: 0.050, 2: 0.051, 3: 0.052, 4: 0.053, 5: 0.054, 6: 0.056, 8: 0.060}
# Llama 3.1 8B Q4_K_M on an H200, where a change of the batch size costs a third of a plain step; and 1B's draft step.
GRAPHS, CHANGE = {1: 0.0045, 2: 0.00453, 3: 0.00527, 4: 0.00612, 5: 0.00662, 6: 0.00734, 8: 0.00878}, 0.0015
SMALL = {1: 0.0014, 2: 0.0015, 4: 0.0016}
# Two cores with AVX-512: sixteen rows cost little more than eight.
SIXTEEN = {1: 0.069, 2: 0.106, 3: 0.140, 4: 0.118, 5: 0.152, 6: 0.186, 8: 0.25, 12: 0.293, 16: 0.326, 32: 0.53}
SLOW = {1: 0.022, 2: 0.035, 4: 0.039, 16: 0.137, 64: 0.356}
DRAFT = {1: 0.018, 2: 0.030, 4: 0.035}
QUICK = {1: 0.006, 2: 0.0062, 4: 0.0065}
FIXED = (1, 2, 3, 5, 8)
LONGEST_ANSWER = 256
ALONE = LastBatch(0, 0, 0.0)


def judged(tokens: int, accepted: int, seconds: float) -> Round:
    """A round that took so long to verify."""
    return Round([0] * tokens, [], accepted, 0.0, seconds, 0.0)


def reading(draft: dict[int, float], verify: dict[int, float], share: float) -> StepCost:
    """The drafter's steps where it reads a text in this share of the target's time, a token an eighth of its V(8)."""
    return StepCost(draft | {64: draft[4] + 60 * share * verify[8] / 8})


@dataclass
class World:
    """A text; the drafter gets each token right with a chance of its own, and claims a noisy version of it.

    Its tokens are all different, so that they suggest nothing, or `misleading`: examples that begin alike, of which the
    answer is the last; then what was said before mostly goes on in another way.
    """

    acceptance: float
    seed: int
    verify: StepCost
    draft: StepCost
    prompt: int = 60
    tokens: int = 128
    misleading: bool = False
    text: list[int] = field(init=False)
    right: np.ndarray = field(init=False)
    claims: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        n = self.prompt + self.tokens + 64
        chances = self.rng.beta(2 * self.acceptance + 1e-3, 2 * (1 - self.acceptance) + 1e-3, n)
        self.right = self.rng.random(n) < chances
        self.claims = np.clip(0.8 * chances + 0.2 * self.rng.random(n), 0.01, 0.999)
        self.text = list(range(n))
        if self.misleading:
            self.text = [i % 16 if i % 16 < 10 else int(self.rng.integers(16, 46)) for i in range(10 - self.prompt, 10)]
            self.text += self.rng.integers(16, 46, n - self.prompt).tolist()

    def noise(self) -> float:
        return float(np.exp(self.rng.normal(0, 0.05)))


class Simulated:
    """A ModelDrafter of a World."""

    batched = True

    def __init__(self, world: World) -> None:
        self.world, self.seconds, self.held, self.acceptance, self.drafts = world, 0.0, 0, 0.0, 0

    def unread(self, text: Sequence[int]) -> int:
        return len(text) - min(self.held, len(text) - 1)

    def prepare(self, text: Sequence[int], left: int) -> None:
        self.seconds += (self.world.draft.of(self.unread(text)) - self.world.draft.of(1)) * self.world.noise()
        self.held = len(text) - 1

    def propose(self, text: Sequence[int], sampling: Sampling, noise: Noise) -> Iterator[Proposal]:
        unread, i = self.unread(text), len(text)
        while True:
            self.seconds += self.world.draft.of(unread) * self.world.noise()
            self.held, self.drafts = i, self.drafts + 1
            yield Proposal(self.world.text[i] if self.world.right[i] else 10**6, float(self.world.claims[i]))
            i, unread = i + 1, 1


def seconds_of(world: World, auto: AutoDrafter | None, fixed: int = 0) -> float:
    """What an answer takes with drafting by cost, or with a fixed draft length (0: plain)."""
    drafter = Simulated(world)
    text, left, size = world.text[: world.prompt], world.tokens, 0
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
        change = world.verify.change if len(tokens) + 1 != size else 0.0
        size = len(tokens) + 1
        verify = (world.verify.of(size) + change) * world.noise()
        rest = world.text[len(text) :]
        accepted = next((i for i, token in enumerate(tokens) if token != rest[i]), len(tokens))
        text += rest[: accepted + 1]
        drafter.held = min(drafter.held, len(text) - 1)
        left -= accepted + 1
        seconds = verify + drafter.seconds - before
        total += seconds
        if auto is not None:
            auto.learn(judged(accepted + 1, accepted, verify), len(tokens), size, ALONE)
    return total


Totals = dict[str | int, float]


def session(
    verify: StepCost,
    draft: StepCost,
    acceptance: float,
    seed: int,
    misleading: bool = False,
    ways: Sequence[str | int] = ("plain", "auto", *FIXED),
    stats: DraftStats | None = None,
) -> tuple[Totals, bool]:
    """Seconds of 512 tokens in answers of 16 to 256 to prompts of 20 to 120, by way: plain, auto, or a fixed length;
    and whether auto's drafter drafted in the first answer.

    Nothing but `stats` is known of the drafter when it begins.
    """
    rng = np.random.default_rng([seed, int(100 * acceptance)])
    auto = AutoDrafter(None, copy.deepcopy(verify), copy.deepcopy(draft), stats)
    total: Totals = dict.fromkeys(ways, 0.0)
    left, tried = 512, []
    while left:
        tokens, prompt = min(left, int(rng.integers(16, LONGEST_ANSWER + 1))), int(rng.integers(20, 121))
        left -= tokens
        for way in total:
            world = World(acceptance, 1000 * seed + left, verify, draft, prompt, tokens, misleading)
            fixed = way if isinstance(way, int) else 0
            total[way] += seconds_of(world, auto if way == "auto" else None, fixed)
        tried.append(auto._drafter.drafts > 0)  # type: ignore[union-attr]
    return total, tried[0]


def is_near_the_best(sessions: Sequence[Totals]) -> bool:
    """Whether no session was slower than plain decoding, and all together near the best fixed length."""
    total = {way: sum(seconds[way] for seconds in sessions) for way in sessions[0]}
    slowest = min(seconds["plain"] / seconds["auto"] for seconds in sessions)
    return slowest > 0.96 and min(total[way] for way in total if way != "auto") / total["auto"] > 0.95


@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.parametrize("acceptance", [0.02, 0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize(
    ("costs", "steps"), [(UNEVEN, DRAFT), (DEAR, DRAFT), (FLAT, QUICK)], ids=["uneven", "dear", "flat"]
)
def test_sessions_are_never_slower_and_near_the_best_fixed_length(
    costs: dict[int, float], steps: dict[int, float], acceptance: float, share: float
) -> None:
    draft = reading(steps, costs, share)
    assert is_near_the_best([session(StepCost(costs), draft, acceptance, seed)[0] for seed in range(8)])


@pytest.mark.parametrize(
    ("acceptance", "misleading"), [(0.02, False), (0.3, False), (0.8, False), (0.95, False), (0.02, True), (0.8, True)]
)
def test_so_are_they_where_a_change_of_the_batch_size_costs_a_third_of_a_step(
    acceptance: float, misleading: bool
) -> None:
    verify, draft = StepCost(GRAPHS, CHANGE), reading(SMALL, GRAPHS, 0.1)
    assert is_near_the_best([session(verify, draft, acceptance, seed, misleading)[0] for seed in range(3)])


@pytest.mark.parametrize("acceptance", [0.02, 0.95])
@pytest.mark.parametrize(
    ("verify", "draft"),
    [
        (StepCost(UNEVEN), reading(DRAFT, UNEVEN, 0.3)),
        (StepCost(FLAT), reading(QUICK, FLAT, 0.3)),
        (StepCost(GRAPHS, CHANGE), reading(SMALL, GRAPHS, 0.1)),
    ],
    ids=["uneven", "flat", "graphs"],
)
def test_a_misleading_text_does_not_keep_a_drafter_from_being_tried(
    verify: StepCost, draft: StepCost, acceptance: float
) -> None:
    """In the first answer, in every session, and the next session of the pair is no slower."""
    before = after = 0.0
    for seed in range(3):
        stats = DraftStats()
        seconds, tried = session(verify, draft, acceptance, seed, True, ("plain", "auto"), stats)
        assert tried and seconds["plain"] / seconds["auto"] > 0.96
        before += seconds["auto"]
        after += session(verify, draft, acceptance, seed, True, ("auto",), stats)[0]["auto"]
    assert after < 1.01 * before


def test_guesses_leave_a_trial_of_the_drafter_in_the_budget() -> None:
    """The first prompt is too long to be read for a trial, and the suggestions of its text are wrong."""
    verify, draft = StepCost(UNEVEN), reading(DRAFT, UNEVEN, 0.3)
    auto, tried = AutoDrafter(None, StepCost(UNEVEN), reading(DRAFT, UNEVEN, 0.3)), []
    for seed, prompt in enumerate((700, 40)):
        seconds_of(World(0.95, seed, verify, draft, prompt, 250, misleading=True), auto)
        tried.append(auto._drafter.drafts > 0)  # type: ignore[union-attr]
    assert tried == [False, True]


@given(
    st.sampled_from([(UNEVEN, 0.0), (DEAR, 0.0), (FLAT, 0.0), (GRAPHS, CHANGE)]),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=60), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1.0, BUDGET]),
)
def test_wherever_a_session_ends_guesses_have_cost_no_more_than_the_budget(
    costs: tuple[dict[int, float], float], texts: list[list[int]], seed: int, budget: float
) -> None:
    """The law of the budget, for what the text suggests: in texts that repeat themselves, and then do not."""
    verify = StepCost(*costs)
    plain, auto = verify.of(1), AutoDrafter(None, StepCost(*costs), None)
    seconds, emitted = 0.0, 0
    for answer in texts:
        size, seconds = 0, seconds - verify.change  # plain decoding changes the size after a prompt, too
        prompt = np.random.default_rng(seed).integers(0, 4, 40).tolist()
        whole, text = [*prompt, *answer], list(prompt)
        auto.prepare(text, 256)
        while len(text) < len(whole):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("runner.draft.auto.BUDGET", budget)
                guess = auto.draft(text, 15, GREEDY, Noise(0))
            rest = whole[len(text) :]
            accepted = next((i for i, (a, b) in enumerate(zip(guess, rest, strict=False)) if a != b), len(guess))
            tokens = rest[: accepted + 1]
            took = verify.of(len(guess) + 1) + verify.change * (len(guess) + 1 != size)
            size = len(guess) + 1
            auto.learn(judged(len(tokens), min(accepted, len(tokens)), took), len(guess), size, ALONE)
            text, seconds, emitted = [*text, *tokens], seconds + took, emitted + len(tokens)
            assert seconds <= plain * ((1 + LOSS) * emitted + budget) + 1e-9


def test_the_budget_is_what_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter that is always sure and always wrong, with nothing ever learned of it."""

    class Credulous(AutoDrafter):
        def learn(self, round_: Round, made: int, read: int, batch: LastBatch) -> None:
            before = self.stats.tokens, self.stats.steps
            super().learn(round_, made, read, batch)
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
        assert auto._company.saved > 0
        return auto.stats.speedup

    ahead = speedup()
    monkeypatch.setattr(Simulated, "prepare", lambda self, text, left: None)
    assert speedup() == pytest.approx(ahead, rel=0.05)


def test_what_the_text_suggests_replaces_the_drafter_if_it_brings_more() -> None:
    world, text = World(0.95, 0, StepCost(FLAT), StepCost(QUICK)), list(range(60))
    stats = DraftStats(certainties=Chances([[6.0, 6.0]] * 13))
    auto = AutoDrafter(Simulated(world), StepCost(dict(FLAT)), StepCost(dict(QUICK)), stats)  # type: ignore[arg-type]
    auto.prepare(text, 256)
    read = auto.seconds
    assert len(auto.draft([1, 2, 3] * 20, 15, GREEDY, Noise(0))) == 15 and auto.seconds == read
    assert auto.draft(text, 15, GREEDY, Noise(0)) and auto.seconds > read
    stats.certainties = Chances()  # a drafter that was not tried goes first
    read = auto.seconds
    assert auto.draft([1, 2, 3] * 20, 15, GREEDY, Noise(0)) and auto.seconds > read


@pytest.mark.parametrize(("accepted", "tokens", "n_judged"), [(0, 1, 1), (2, 3, 3), (2, 2, 2), (15, 16, 15)])
def test_learns_of_judged_drafts_alone(accepted: int, tokens: int, n_judged: int) -> None:
    """Up to the first that was not accepted, or to the end of the answer."""
    auto = AutoDrafter(None, StepCost(dict(FLAT)), None)
    auto.prepare([1], 256)
    assert len(auto.draft([1, 2, 3] * 20, 15, GREEDY, Noise(0))) == 15
    auto.learn(judged(tokens, accepted, FLAT[8]), 15, 15, ALONE)
    counts = np.sum(auto.stats.matches.seen, axis=0)
    assert counts == pytest.approx([accepted, n_judged], rel=0.3)  # earlier ones count for less


def test_a_long_prompt_is_not_read_for_a_short_answer() -> None:
    """Whatever was won before, and however well the drafter does."""
    draft, auto = reading(QUICK, FLAT, 0.3), AutoDrafter(None, StepCost(dict(FLAT)), reading(QUICK, FLAT, 0.3))

    def answer(seed: int, prompt: int, tokens: int) -> float:
        seconds_of(World(0.95, seed, StepCost(FLAT), draft, prompt, tokens), auto)
        return auto.seconds

    for seed in range(20):
        answer(seed, prompt=20, tokens=16)
    assert auto._company.saved > 100
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
    tokens, seconds, _ = best_fixed(chance, n, verify, step)
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
def test_a_beginning_is_worth_its_tokens_less_its_seconds_if_it_may_be_paid(
    chances: list[float], seconds: list[float], rate: float, step: float, made: int, most: float
) -> None:
    verify = StepCost(dict(enumerate(seconds, 1)))

    def added(m: int) -> float:
        return max(m - made, 0) * step + verify.of(1 + m) - verify.of(1)

    def value(m: int) -> float:
        return sum(float(np.prod(chances[: i + 1])) for i in range(m)) - rate * added(m)

    worth = worths(chances, verify, rate, step, made, most)
    assert worth == [pytest.approx(value(m) if m == 0 or added(m) <= most else -np.inf) for m in range(len(worth))]
    assert len(worth) == len(chances) + 1 and worth[best(worth)] == max(worth)


@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=6), max_size=9))
def test_without_a_price_every_round_has_its_best_length(rounds: list[list[float]]) -> None:
    length = KeptLength()
    for worth in rounds:
        assert length.choose(worth, 0.0) == best(worth)
        length.observe(worth, best(worth))


def test_a_length_is_kept_until_another_is_ahead_by_a_change_and_back() -> None:
    length = KeptLength()

    def rounds(*worth: float, n: int = 1) -> list[int]:
        chosen = []
        for _ in range(n):
            chosen.append(length.choose(worth, 0.5))
            length.observe(worth, chosen[-1])
        return chosen

    assert rounds(0, 0.5, 0.2) == [1]
    assert rounds(0, 0.2, 0.6, n=4) == [1, 1, 2, 2]  # 0.4, 0.8, 1.2
    assert rounds(0, 0.5, 0.2, n=3) == [2, 2, 2]  # 0.9
    assert rounds(0, 0.2, 0.6, n=3) + rounds(0, 0.5, 0.2, n=3) == [2] * 6  # 0.9 less 1.2, so nothing; then 0.9 again
    assert rounds(0, 3.0, 0.2) == [1]
    assert rounds(0, n=2) == [0, 0]  # an answer that ends
    assert rounds(0, 0.1, 0.5) == [1]
    assert rounds(0, -np.inf, 0.5) == [2]  # more than the budget


def test_where_changes_cost_only_measured_sizes_are_verified() -> None:
    for change, longest in ((0.0, 15), (CHANGE, 7)):
        auto = AutoDrafter(None, StepCost(FLAT, change), None)
        auto.prepare([1], 256)
        assert len(auto.draft([1, 2, 3] * 20, 15, GREEDY, Noise(0))) == longest


def test_steps_are_observed_without_the_price_of_a_change_which_the_budget_pays() -> None:
    auto = AutoDrafter(None, StepCost(GRAPHS, CHANGE), None)
    auto.prepare([1], 256)
    for size in [1, 4] * 40:
        auto.learn(judged(1, 0, GRAPHS[size] + CHANGE), size - 1, size, ALONE)
    assert auto._verify.of(1) == pytest.approx(GRAPHS[1]) and auto._verify.of(4) == pytest.approx(GRAPHS[4])
    lost = 40 * (GRAPHS[4] - GRAPHS[1]) + 79 * CHANGE  # the first batch changes the size for plain decoding, too
    assert auto._company.saved == pytest.approx(-lost / GRAPHS[1])


def test_the_first_steps_of_a_gpu_do_not_decide_about_a_drafter() -> None:
    """Each size has two that take ten times as long; the drafter's, too."""

    def slow_at_first(cost: StepCost) -> StepCost:
        seen: Counter[int] = Counter()
        of = cost.of

        def counted(n: int) -> float:
            seen[n] += 1
            return of(n) * (10 if seen[n] <= 2 else 1)

        cost.of = counted  # type: ignore[method-assign, assignment]
        return cost

    def speed(world: World, auto: AutoDrafter) -> float:
        return world.tokens / seconds_of(world, auto)

    steady = StepCost(GRAPHS, CHANGE), reading(SMALL, GRAPHS, 0.1)
    cold = slow_at_first(StepCost(GRAPHS, CHANGE)), slow_at_first(reading(SMALL, GRAPHS, 0.1))
    auto = AutoDrafter(None, StepCost(GRAPHS, CHANGE), reading(SMALL, GRAPHS, 0.1))
    speed(World(0.9, 1, *cold, tokens=200), auto)
    assert speed(World(0.9, 2, *steady, tokens=200), auto) > 1.2 / GRAPHS[1]


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
    assert cost.counted(1, 5.0) == pytest.approx(0.2) and cost.counted(1, 0.0) == pytest.approx(0.05)
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


def together(
    verify: StepCost,
    draft: StepCost,
    worlds: Sequence[World],
    stats: DraftStats,
    fixed: int | None = None,
    measured: StepCost | None = None,
) -> tuple[int, float]:
    """(tokens, seconds) of conversations in one batch, which draft by cost (fixed None) or all the same number.
    `measured`: what a step of the target was measured to cost, if not what it does.
    """
    company, autos, believed = Company(), [], (copy.deepcopy(measured or verify), copy.deepcopy(draft))
    drafters = [Simulated(world) for world in worlds]
    texts = [world.text[: world.prompt] for world in worlds]
    for drafter in drafters:
        auto = AutoDrafter(drafter, *believed, stats, company=company)  # type: ignore[arg-type]
        company.put(auto, Share())  # all come at once
        autos.append(auto)
    for text, auto, drafter in zip(texts, autos, drafters, strict=True):
        if fixed != 0:
            (auto if fixed is None else drafter).prepare(text, 256)
    total, emitted, size = sum(drafter.seconds for drafter in drafters), 0, 0
    while min(len(world.text) - len(text) for world, text in zip(worlds, texts, strict=True)) >= 20:
        rows, made = [], []
        for world, drafter, auto, text in zip(worlds, drafters, autos, texts, strict=True):
            before = drafter.drafts
            if fixed is None:
                tokens = auto.draft(text, 15, GREEDY, Noise(0))
            else:
                proposals = drafter.propose(text, GREEDY, Noise(0))
                tokens = [next(proposals).token for _ in range(fixed)]
            made.append(drafter.drafts - before)
            rest = world.text[len(text) :]
            accepted = next((j for j, (a, b) in enumerate(zip(tokens, rest, strict=False)) if a != b), len(tokens))
            text += rest[: accepted + 1]
            drafter.held = min(drafter.held, len(text) - 1)
            rows.append((len(tokens) + 1, accepted))
        last, size = size, sum(own for own, _ in rows)
        taken = verify.of(size) + verify.change * (size != last)
        taken += sum(draft.of(sum(each > depth for each in made)) for depth in range(max(made)))
        total, emitted = total + taken, emitted + sum(accepted + 1 for _, accepted in rows)
        batch = LastBatch(size, size, verify.of(size) + verify.change * (size != last))
        for auto, (own, accepted) in zip(autos, rows, strict=True):
            if fixed is None:
                auto.learn(judged(accepted + 1, accepted, verify.of(own)), own - 1, own, batch)
    return emitted, total


def tokens_per_second(
    verify: StepCost, draft: StepCost, acceptance: float, seed: int, n: int, fixed: int | None = None
) -> float:
    """Of n conversations in one batch, whose pair is known."""
    stats = DraftStats()
    for each in range(2):
        auto = AutoDrafter(None, copy.deepcopy(verify), copy.deepcopy(draft), stats)
        seconds_of(World(acceptance, 1000 + each, verify, draft, tokens=256), auto)
    worlds = [World(acceptance, 100 * seed + i, verify, draft, tokens=192) for i in range(n)]
    tokens, seconds = together(verify, draft, worlds, stats, fixed)
    return tokens / seconds


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize(
    ("costs", "change", "steps"),
    [(UNEVEN, 0.0, DRAFT), (FLAT, 0.0, QUICK), (GRAPHS, CHANGE, SMALL), (SIXTEEN, 0.0, SLOW)],
    ids=["uneven", "flat", "graphs", "sixteen"],
)
def test_several_in_one_batch_are_near_the_best_fixed_length_too(
    costs: dict[int, float], change: float, steps: dict[int, float], acceptance: float, n: int
) -> None:
    """With many it is that of none: plain batching."""
    verify, draft = StepCost(costs, change), StepCost(steps)
    speeds = {
        fixed: np.mean([tokens_per_second(verify, draft, acceptance, seed, n, fixed) for seed in range(2)])
        for fixed in (None, 0, 1, 2, 3, 5)
    }
    ours = speeds.pop(None)
    assert ours > 0.9 * max(speeds.values()) and ours > 0.94 * speeds[0]


def test_several_follow_what_their_batches_take() -> None:
    """Their rows are as dear as where arithmetic is the limit, and were measured as if they cost nothing."""
    dear, cheap, draft = StepCost(DEAR), StepCost({n: DEAR[1] * (1 + n / 100) for n in DEAR}), StepCost(DRAFT)
    worlds = [World(0.8, i, dear, draft, tokens=512) for i in range(4)]
    ours, plain = (together(dear, draft, worlds, DraftStats(), fixed, cheap) for fixed in (None, 0))
    assert ours[0] / ours[1] > 0.95 * plain[0] / plain[1]  # 0.89 if they went on believing it


@pytest.mark.parametrize("n", [2, 4])
def test_several_with_an_unknown_drafter_lose_one_budget(n: int) -> None:
    """It is always wrong. They share the budget, whose steps are batches of all."""
    verify, draft = StepCost(FLAT), reading(QUICK, FLAT, 1.0)
    worlds = [World(0.0, i, verify, draft, tokens=256) for i in range(n)]
    tokens, seconds = together(verify, draft, worlds, DraftStats())
    lost = seconds / verify.of(n) - tokens / n
    assert 4 < lost < BUDGET + LOSS * tokens / n + 1
