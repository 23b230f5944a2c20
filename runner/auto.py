"""Drafting by cost: who drafts, how much, and whether at all, decided in every round so that it is never slower.

Free drafts come first: what the text itself suggests (`lookup`) is verified without running the drafter where that is
worth more. The drafter goes on only while its next token is worth its step and its row of the verify batch, both as
measured on this machine (`pace`); rows that cost nothing are filled with what the text suggests. Where nothing is worth
its cost the target decodes plainly, and drafting is tried again later. An account of the time lost to drafts that
failed bounds what an answer can lose, whatever the estimates say.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from corpus.llama import Context
from corpus.noise import Noise
from corpus.sampling import GREEDY, Sampling

from .drafter import ModelDrafter, Reader
from .lookup import Lookup
from .pace import Chances, StepCost, best_cut

VERIFY_SIZES = (1, 2, 3, 4, 5, 6, 8)
DRAFT_SIZES = (1, 2, 4, 16, 64)
LOSS = 0.02  # of an answer's plain time that drafts may cost it at the worst
CREDIT = 4.0  # plain steps of what drafts have won that they may lose again
OUTLOOK = 64  # tokens that an answer is expected to go on for, whatever is known
CATCH_UP = 16  # unread tokens that a round bears by itself; more is an investment in the rest of the answer
FIRST_WAIT, LAST_WAIT = 4, 64  # plain rounds before drafting is tried again
USUAL = 0.8  # the chance of a draft that the drafter has not been asked for yet, before anything is known
SLOW = 0.05  # what one token weighs in the drafter's usual luck
HALF_LIFE = 0.9  # weight of the past in the rate of late


class AutoDrafter:
    """A model drafter (None: lookup alone) and the text's own suggestions, each used where it pays."""

    def __init__(self, drafter: ModelDrafter | None, verify: StepCost, draft: StepCost | None) -> None:
        self._drafter, self._verify, self._draft = drafter, verify, draft
        self._lookup = Lookup()
        self._certainties, self._matches = Chances(), Chances()
        self._usual = USUAL
        self._tokens, self._seconds = 1.0, verify.of(1)  # of late, in rounds with drafts
        self._lost = 0.0
        self._emitted = self._left = 0
        self._idle, self._wait = 0, FIRST_WAIT
        self._claims: list[tuple[Chances, float]] = []  # who suggested each draft of this round, and how surely
        self._modelled = False
        self._invested = 0.0  # seconds of this round that the rest of the answer is to bring back

    def draft(self, text: Sequence[int], n: int, sampling: Sampling, noise: Noise) -> list[int]:
        self._claims, self._modelled, self._invested = [], False, 0.0
        plain = self._verify.of(1)
        allowance = LOSS * plain * (self._emitted + min(self._left, OUTLOOK)) - self._lost
        if n <= 0 or allowance < 0:
            return []
        # A second is worth what it brings otherwise; more than twice plain decoding would be a fluke to count on.
        rate = min(max(1 / plain, self._tokens / self._seconds), 2 / plain)
        self._lookup.follow(text)
        guess, claims = self._suggest(n)
        kept, worth = best_cut([self._matches.of(claim) for claim in claims], self._verify, rate, most=allowance)
        if self._drafter is not None and self._worth_drafting(self._drafter, text, n, rate, worth, allowance):
            return self._run(self._drafter, text, n, sampling, noise, rate)
        self._claims = [(self._matches, claim) for claim in claims[:kept]]
        return guess[:kept]

    def _suggest(self, n: int, tail: Sequence[int] = ()) -> tuple[list[int], list[float]]:
        """What the text suggests, and the chance that each claims by the length of the match before it."""
        guess, length = self._lookup.guess(n, tail)
        return guess, [(length + i) / (length + i + 2) for i in range(len(guess))]

    def _worth_drafting(
        self, drafter: ModelDrafter, text: Sequence[int], n: int, rate: float, otherwise: float, allowance: float
    ) -> bool:
        """Whether the drafter's usual luck is worth its time, more than what the text suggests; or a try is due."""
        assert self._draft is not None
        unread = drafter.unread(text)
        step, first = self._draft.of(1), self._draft.of(unread)
        usual = [self._usual] * n
        if unread <= CATCH_UP:
            _, worth = best_cut(usual, self._verify, rate, step)
            if worth - rate * (first - step) > otherwise:
                return True
        else:
            # Reading up is an investment: what a token then takes less, over the tokens that may be left.
            m, _ = best_cut(usual, self._verify, 1 / self._verify.of(1), step)
            tokens = sum(self._usual**i for i in range(m + 1))
            saved = self._verify.of(1) - (self._verify.of(m + 1) + m * step) / tokens
            if saved * min(self._left, max(OUTLOOK, self._emitted)) > first:
                self._invested = first - step
                return True
        return self._idle >= self._wait and otherwise == 0 and first < allowance

    def _run(
        self,
        drafter: ModelDrafter,
        text: Sequence[int],
        n: int,
        sampling: Sampling,
        noise: Noise,
        rate: float,
    ) -> list[int]:
        """Draft while the next token is worth it; then verify the beginning that is."""
        assert self._draft is not None
        draft: list[int] = []
        chances: list[float] = []
        together = 1.0
        self._modelled = True
        unread, before = drafter.unread(text), drafter.seconds
        for proposal in drafter.propose(text, sampling, noise):
            self._draft.saw(unread, drafter.seconds - before)
            chance = self._certainties.of(proposal.certainty)
            together *= chance
            self._usual += SLOW * (chance - self._usual)
            draft.append(proposal.token)
            chances.append(chance)
            self._claims.append((self._certainties, proposal.certainty))
            more = [self._usual] * (n - len(chances))
            if more:
                more[0] *= together
            rows = len(chances) + 1
            if not more or not best_cut(more, self._verify, rate, self._draft.of(1), rows)[0]:
                break
            unread, before = 1, drafter.seconds
        guess, claims = self._suggest(n - len(chances), draft)
        chances += [self._matches.of(claim) for claim in claims]
        kept, _ = best_cut(chances, self._verify, rate)
        self._claims += [(self._matches, claim) for claim in claims]
        del self._claims[kept:]
        return [*draft, *guess][:kept]

    def prepare(self, text: Sequence[int], left: int) -> None:
        """A new answer. The prompt is read by the first round that finds it worth reading."""
        self._emitted, self._left = 0, left
        self._lost = 0.0  # what other answers have won is no licence to make this one slower
        self._usual += 0.1 * (USUAL - self._usual)  # another text may suit the drafter better

    def learn(self, drafted: int, accepted: int, tokens: int, seconds: float, verify_seconds: float) -> None:
        self._verify.saw(drafted + 1, verify_seconds)
        seconds -= self._invested
        plain = self._verify.of(1)
        self._emitted += tokens
        self._left -= tokens
        if drafted or self._modelled:
            # What was won before is no licence to lose all of it.
            self._lost = max(self._lost + seconds - tokens * plain, -CREDIT * plain)
            self._tokens = HALF_LIFE * self._tokens + tokens
            self._seconds = HALF_LIFE * self._seconds + seconds
        if self._modelled:
            self._wait = FIRST_WAIT if accepted else min(2 * self._wait, LAST_WAIT)
            self._idle = 0
        else:
            self._idle += 1
        # A draft after an end token was never judged.
        judged = min(drafted, accepted + 1 if accepted < tokens else accepted)
        for i, (chances, claim) in enumerate(self._claims[:judged]):
            chances.saw(claim, i < accepted)

    def settle(self) -> None:
        if self._drafter is not None:
            self._drafter.settle()

    @property
    def seconds(self) -> float:
        return self._drafter.seconds if self._drafter is not None else 0.0

    def close(self) -> None:
        if self._drafter is not None:
            self._drafter.close()


def measured_verify(target: Reader) -> StepCost:
    """A target's verify cost on this machine: the faster of two steps of each size, on an empty cache."""
    context: Context = target.context
    target.settle()  # where an interruption cut the last measurement short
    target.keep([], 0)
    seconds: dict[int, float] = {}
    for turn in range(3):
        for n in VERIFY_SIZES[:: 1 if turn else -1]:
            if n > min(context.n_outputs, context.n_ctx):
                continue
            started = time.perf_counter()
            context.decode(list(range(n)), n)
            took = time.perf_counter() - started
            context.truncate(0)
            if turn:  # the first turn warms up
                seconds[n] = min(seconds.get(n, took), took)
    return StepCost(seconds)


def measured_draft(drafter: ModelDrafter) -> StepCost:
    """A drafter's cost to draft one token, by the number of tokens it has to read first."""
    noise = Noise(0)
    longest = min(DRAFT_SIZES[-1], drafter.n_ctx // 2)
    text = list(range(longest))
    seconds: dict[int, float] = {}
    for turn in range(3):
        for n in (size for size in DRAFT_SIZES if size <= longest):
            drafter.settle()
            drafter.prepare(text[: longest - n + 1], 0)
            before = drafter.seconds
            next(drafter.propose(text, GREEDY, noise))
            took = drafter.seconds - before
            if turn:
                seconds[n] = min(seconds.get(n, took), took)
    return StepCost(seconds)
