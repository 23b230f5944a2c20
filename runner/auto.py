"""Drafting by cost: who drafts, how much, and whether at all, decided in every round so that it is never slower.

Free drafts come first: what the text itself suggests (`lookup`) is verified without running the drafter where that is
worth more. The drafter goes on only while its next token is worth its step and its row of the verify batch, both as
measured on this machine (`pace`); rows that cost nothing are filled with what the text suggests. Where nothing is worth
its cost the target decodes plainly, and drafting is tried again later. An account of every answer bounds what it can
lose, whatever the estimates say. It grows with the tokens emitted, not with those expected: any may be the last. Beside
it, a session tries its drafter once, where that should pay.
"""

from __future__ import annotations

from collections.abc import Sequence

from corpus.noise import Noise
from corpus.sampling import Sampling

from .drafter import ModelDrafter
from .lookup import Lookup
from .pace import Chances, StepCost, best_cut

LOSS = 0.02  # of an answer's plain time so far that drafts may cost it
TRIAL = 4.0  # plain steps that a session spends beside these accounts to find out what its drafter is worth
CREDIT = 4.0  # plain steps of what drafts have won that they may lose again
OUTLOOK = 0.5  # of the tokens so far: an answer is counted on to go on for as many
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
        self._lost = self._spent = 0.0  # seconds of this answer, without reading up: more than plain takes, and all
        self._owed = 0.0  # seconds of this answer that its drafter, and reading for it, has yet to bring back
        self._emitted = self._left = 0
        self._trial = TRIAL * verify.of(1)
        self._idle, self._wait = 0, FIRST_WAIT
        self._claims: list[tuple[Chances, float]] = []  # who suggested each draft of this round, and how surely
        self._modelled = False
        self._invested = 0.0  # seconds of this round that the rest of the answer is to bring back

    def draft(self, text: Sequence[int], n: int, sampling: Sampling, noise: Noise) -> list[int]:
        self._claims, self._modelled, self._invested = [], False, 0.0
        if n <= 0:
            return []
        plain = self._verify.of(1)
        most = LOSS * plain * self._emitted - self._lost
        # A second is worth what it brings otherwise; more than twice plain decoding would be a fluke to count on.
        rate = min(max(1 / plain, self._tokens / self._seconds), 2 / plain)
        self._lookup.follow(text)
        guess, claims = self._suggest(n)
        kept, worth = best_cut([self._matches.of(claim) for claim in claims], self._verify, rate, most=most)
        if self._drafter is not None and self._draft is not None:
            # What a text suggests is another matter in every text; a drafter is known, and may risk what it promises.
            most += plain * best_cut([self._usual] * n, self._verify, 1 / plain, self._draft.of(1))[1] + self._trial
            if self._worth_drafting(self._drafter, text, n, rate, worth, most):
                return self._run(self._drafter, text, n, sampling, noise, rate, most)
        self._claims = [(self._matches, claim) for claim in claims[:kept]]
        return guess[:kept]

    def _suggest(self, n: int, tail: Sequence[int] = ()) -> tuple[list[int], list[float]]:
        """What the text suggests, and the chance that each claims by the length of the match before it.

        Of one token a quarter came true, of four two thirds, of ten and more nineteen in twenty (the default target's
        answers to 40 of the bundled prompts).
        """
        guess, length = self._lookup.guess(n, tail)
        return guess, [1 - 1 / (1 + (length + i) ** 1.5 / 3) for i in range(len(guess))]

    def _worth_drafting(
        self, drafter: ModelDrafter, text: Sequence[int], n: int, rate: float, otherwise: float, most: float
    ) -> bool:
        """Whether the drafter's usual luck is worth its time, more than what the text suggests; or a try is due."""
        assert self._draft is not None
        unread = drafter.unread(text)
        plain, step, first = self._verify.of(1), self._draft.of(1), self._draft.of(unread)
        usual = [self._usual] * n
        if unread <= CATCH_UP:
            _, worth = best_cut(usual, self._verify, rate, step, most=most - (first - step))
            if worth - rate * (first - step) > otherwise:
                return True
        else:
            # Reading up is an investment: what a token then takes less, over the tokens that may be left.
            m, _ = best_cut(usual, self._verify, 1 / plain, step, most=most)
            tokens = sum(self._usual**i for i in range(m + 1))
            saved = min(plain, self._spent / max(self._emitted, 1)) - (self._verify.of(m + 1) + m * step) / tokens
            if saved * self._left > first and saved * OUTLOOK * self._emitted > self._owed + first - self._trial:
                self._invested = first - step
                return True
        # The session's trial is for a drafter that should pay; this try must be earned.
        one = first + self._verify.of(2) - plain
        return self._idle >= self._wait and otherwise == 0 and one < most - self._trial

    def _run(
        self,
        drafter: ModelDrafter,
        text: Sequence[int],
        n: int,
        sampling: Sampling,
        noise: Noise,
        rate: float,
        most: float,
    ) -> list[int]:
        """Draft while the next token is worth it; then verify the beginning that is."""
        assert self._draft is not None
        draft: list[int] = []
        chances: list[float] = []
        together = 1.0
        self._modelled = True
        unread, before = drafter.unread(text), drafter.seconds
        most += before
        outlay, self._invested = self._invested, 0.0
        for proposal in drafter.propose(text, sampling, noise):
            self._draft.saw(unread, drafter.seconds - before)
            if not draft:
                # Never more than reading took: what it was thought to take besides has not been won.
                self._invested = min(outlay, drafter.seconds - before)
                most += self._invested
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
            still = most - drafter.seconds - (self._verify.of(rows) - self._verify.of(1))
            if not more or not best_cut(more, self._verify, rate, self._draft.of(1), rows, still)[0]:
                break
            unread, before = 1, drafter.seconds
        guess, claims = self._suggest(n - len(chances), draft)
        chances += [self._matches.of(claim) for claim in claims]
        kept, _ = best_cut(chances, self._verify, rate, most=most - drafter.seconds)
        self._claims += [(self._matches, claim) for claim in claims]
        del self._claims[kept:]
        return [*draft, *guess][:kept]

    def prepare(self, text: Sequence[int], left: int) -> None:
        """A new answer. The prompt is read by the first round that finds it worth reading."""
        self._emitted, self._left = 0, left
        self._lost = self._spent = self._owed = 0.0  # what other answers have won is no licence to make this one slower
        self._usual += 0.1 * (USUAL - self._usual)  # another text may suit the drafter better

    def learn(self, drafted: int, accepted: int, tokens: int, seconds: float, verify_seconds: float) -> None:
        self._verify.saw(drafted + 1, verify_seconds)
        seconds -= self._invested
        self._spent += seconds
        plain = self._verify.of(1)
        self._emitted += tokens
        self._left -= tokens
        if drafted or self._modelled:
            lost = seconds - tokens * plain
            if self._modelled:
                paid = min(self._trial, max(lost + self._invested, 0))
                self._trial -= paid
                lost -= max(paid - self._invested, 0)
                self._owed = max(self._owed + lost + max(self._invested - paid, 0), 0)
            # What was won before is no licence to lose all of it.
            self._lost = max(self._lost + lost, -CREDIT * plain)
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
