"""Drafting by cost: every round takes what brings the most expected tokens per second, as measured on this machine.

There are three ways to go on: plain decoding; what the text itself suggests (`lookup`), whose chances are learned; and
the drafter, which is worth the tokens and the seconds of its rounds so far. The drafter goes on while its next token is
worth its step and its row of the verify batch, and what the text suggests fills rows that cost less than they bring.
Text that the drafter has not read yet is read where that pays over the rest of the answer. Over a session all of this
may lose to plain decoding what one budget says, whatever the estimates say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llamabase.llama.timing import StepCost
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import Sampling

from .cost import MEMORY, WEIGHT, Chances, best_cut, best_fixed
from .drafters import Drafter, ModelDrafter, Proposal
from .lookup import Lookup

# A session may lose so many plain steps, and this share of its tokens: in the worlds of tests/test_auto.py less leaves
# no room to read a prompt and try a drafter that would pay, and more loses 4 % of 512 tokens to one that does not.
BUDGET, LOSS = 16.0, 0.005
USUAL = 0.8  # the chance of a draft where nothing is known: about that of the default pair (2026-11-21-vocab.json)
LEFT_UNREAD = 2  # tokens that a round whose drafts were all accepted leaves for the drafter to read
LONGEST = 16  # drafts in a round


@dataclass
class DraftStats:
    """What sessions have learned of a pair: remembered with what its steps cost.

    `usual` is the mean chance of a drafted token, `tokens` and `steps` are what rounds of the drafter brought of late
    and took, in plain steps (0: none was seen); and the corrections of what the drafter and the text claim.
    """

    usual: float = USUAL
    tokens: float = 0.0
    steps: float = 0.0
    certainties: Chances = field(default_factory=Chances)
    matches: Chances = field(default_factory=Chances)


class AutoDrafter(Drafter):
    """A model drafter (None: lookup alone) and the text's own suggestions, each used where it pays."""

    def __init__(
        self, drafter: ModelDrafter | None, verify: StepCost, draft: StepCost | None, known: DraftStats | None = None
    ) -> None:
        self._drafter, self._verify, self._draft = drafter, verify, draft
        self.known = known or DraftStats()
        self._lookup = Lookup()
        self._won = 0.0  # plain steps that drafting has saved this session, or lost
        self._emitted = self._answers = self._left = 0
        self._length = 0.0  # tokens of an answer on average; so many are yet to come, too, whenever one asks
        self._claims: list[tuple[Chances, float]] = []  # who suggested each draft of this round, and how surely
        self._modelled = False
        self._read = 0.0  # seconds of this round that the drafter took to read what others wrote

    def share_weights(self, drafter: ModelDrafter | None) -> AutoDrafter:
        """For another conversation: what is measured and learned is shared."""
        return AutoDrafter(drafter, self._verify, self._draft, self.known)

    def prepare(self, text: Sequence[int], left: int) -> None:
        """A new answer. Part of what is believed of the drafter is then what is hoped, since another text may suit it
        better. It reads the prompt where that pays; else a later round may find that it does.
        """
        self._answers += 1
        self._length = (self._emitted + left / 2) / self._answers
        self._left = left
        drafter, cost, known = self._drafter, self._draft, self.known
        if drafter is None or cost is None:
            return
        # The text that a trim was fitted to need not be this target's own, and may then say too little of it.
        hope, share = max(USUAL, drafter.acceptance), 1 - MEMORY**WEIGHT if known.steps else 1.0
        tokens, seconds = best_fixed(hope, LONGEST, self._verify, cost.of(1))
        known.usual += share * (hope - known.usual)
        known.tokens += share * (WEIGHT * tokens - known.tokens)
        known.steps += share * (WEIGHT * seconds / self._verify.of(1) - known.steps)
        if self._pays(drafter, cost, text):
            unread, before = drafter.unread(text), drafter.seconds
            drafter.prepare(text, left)
            took = drafter.seconds - before
            cost.observe(unread, took + cost.of(1))
            self._won -= took / self._verify.of(1)

    def draft(self, text: Sequence[int], n: int, sampling: Sampling, noise: Noise) -> list[int]:
        self._claims, self._modelled, self._read = [], False, 0.0
        if n <= 0:
            return []
        plain, known, drafter, cost = self._verify.of(1), self.known, self._drafter, self._draft
        rate, most, before = 1 / plain, self._most, self.seconds
        drafts, chances = list[int](), list[float]()
        self._lookup.follow(text)
        guess, claims = self._suggest(n)
        if drafter is not None and cost is not None and self._pays(drafter, cost, text):
            rate = known.tokens / (known.steps * plain)
            _, worth = best_cut([known.matches.of(claim) for claim in claims], self._verify, rate, most=most)
            # At the drafter's own rate a round of it is worth nothing, and plain decoding so much less.
            self._modelled = worth <= rate * plain - 1
            if self._modelled:
                proposals = drafter.propose(text, sampling, noise)
                drafts, chances = self._run(proposals, cost, drafter.unread(text), n, rate, most)
                guess, claims = self._suggest(n - len(drafts), drafts)
        self._claims += [(known.matches, claim) for claim in claims]
        chances += [known.matches.of(claim) for claim in claims]
        kept, _ = best_cut(chances, self._verify, rate, most=most - (self.seconds - before))
        del self._claims[kept:]
        return [*drafts, *guess][:kept]

    def _suggest(self, n: int, tail: Sequence[int] = ()) -> tuple[list[int], list[float]]:
        """What the text suggests, and the chance that each claims by the length of the match before it.

        Of one token a quarter came true, of four two thirds, of ten and more nineteen in twenty (the default target's
        answers to 40 of the bundled prompts).
        """
        guess, length = self._lookup.guess(n, tail)
        return guess, [1 - 1 / (1 + (length + i) ** 1.5 / 3) for i in range(len(guess))]

    @property
    def _most(self) -> float:
        """Seconds that may be lost now."""
        return self._verify.of(1) * (BUDGET + LOSS * self._emitted + self._won)

    def _pays(self, drafter: ModelDrafter, draft: StepCost, text: Sequence[int]) -> bool:
        """Whether what the drafter saves over the rest of the answer is more than reading up to here costs.

        Reading leaves as much of the budget as it takes to find out that it was in vain.
        """
        first, plain = draft.of(drafter.unread(text)), self._verify.of(1)
        saved = plain * (1 - self.known.steps / self.known.tokens) * min(self._length, self._left)
        return saved > first - draft.of(1) and first + WEIGHT * draft.of(1) <= self._most

    def _run(
        self, proposals: Iterator[Proposal], cost: StepCost, unread: int, n: int, rate: float, most: float
    ) -> tuple[list[int], list[float]]:
        """(drafts, their chances): as long as the next one is worth it."""
        known, drafts, chances, together = self.known, [], [], 1.0
        before, most = self.seconds, most + self.seconds
        for proposal in proposals:
            took = self.seconds - before
            cost.observe(unread, took)
            if unread > LEFT_UNREAD:
                self._read = max(took - cost.of(1), 0.0)
            chance = known.certainties.of(proposal.certainty)
            known.usual += (1 - MEMORY) * (chance - known.usual)
            together *= chance
            drafts.append(proposal.token)
            chances.append(chance)
            self._claims.append((known.certainties, proposal.certainty))
            rows, more = len(drafts) + 1, [known.usual] * (n - len(drafts))
            more[:1] = [together * chance for chance in more[:1]]
            left = most - self.seconds - (self._verify.of(rows) - self._verify.of(1))
            if not best_cut(more, self._verify, rate, cost.of(1), rows, left)[0]:
                break
            unread, before = 1, self.seconds
        return drafts, chances

    def learn(
        self, drafted: int, verified: int, accepted: int, tokens: int, seconds: float, verify_seconds: float
    ) -> None:
        self._verify.observe(verified + 1, verify_seconds)
        plain = self._verify.of(1)
        self._emitted += tokens
        self._left -= tokens
        if drafted or self._modelled:
            self._won += tokens - seconds / plain
        if self._modelled:
            self.known.tokens = MEMORY * self.known.tokens + tokens
            self.known.steps = MEMORY * self.known.steps + (seconds - self._read) / plain
        # A draft after an end token was never judged.
        judged = min(drafted, accepted + 1 if accepted < tokens else accepted)
        for i, (chances, claim) in enumerate(self._claims[:judged]):
            chances.observe(claim, i < accepted)

    def settle(self) -> None:
        if self._drafter is not None:
            self._drafter.settle()

    @property
    def seconds(self) -> float:
        return self._drafter.seconds if self._drafter is not None else 0.0
