"""Drafting by cost: every round goes on in the way that should bring the most tokens per second on this machine.

A conversation among others in one batch decides by the same rule: what a row costs is what it adds to the rows of all,
and what its seconds would bring otherwise is what all of them bring. Each expects those that decide after it to draft
as many as would be best if all did the same: where two rows more in each pay, one row in one of them may not. Eight
concepts decide:

1. step cost: the seconds of a step by the number of its tokens, measured once and then followed (`StepCost`);
2. chance: how sure a draft's source is of it, corrected by how often drafts as sure as that were accepted (`Chances`);
3. speedup: the tokens of the drafter's recent rounds per plain-decoding step that their seconds equal;
4. prior: each answer counts as one more round at the speedup of the best fixed draft length, or in company makes what
   was seen of drafts count for less;
5. worth: what drafts should add in tokens, less what their seconds bring at the current speedup (`worths`); where a
   change of the batch size costs something, a length is kept until another would have brought more (`KeptLength`);
6. suggestion: what followed before (`Lookup`) replaces the drafter if it brings more, else extends it;
7. reading: the drafter is used if it should save more over the answer than reading the text up to here costs;
8. budget: a session, of one conversation or of many, loses at most BUDGET and LOSS to plain decoding, whatever the
   other seven say; the drafter is tried first, and suggestions leave half of BUDGET to that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from llamabase.llama.context import LastBatch
from llamabase.llama.rounds import LONGEST, best_fixed
from llamabase.llama.timing import StepCost
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import Sampling

from .company import NOTHING, Company, Share
from .contracts import Drafter, Proposal, Round
from .cost import WEIGHT, Chances, DraftStats, KeptLength, worths
from .drafters import ModelDrafter
from .lookup import Answers, Lookup

# BUDGET: plain-decoding steps a session may lose. LOSS: fraction of its tokens it may lose besides. In the worlds of
# tests/test_auto.py less does not pay for reading a prompt to try a drafter; more loses 4 % of 512 tokens to a bad one.
BUDGET, LOSS = 16.0, 0.005
USUAL = 0.8  # acceptance rate of an unknown drafter: about that of the default pair (2026-11-21-vocab.json)


@dataclass(frozen=True)
class _Draft:
    """A draft of this round, and how often drafts of its source were accepted."""

    proposal: Proposal
    source: Chances

    @property
    def chance(self) -> float:
        return self.source.of(self.proposal.certainty)


class AutoDrafter(Drafter):
    """A model drafter (None: lookup alone) and what text and earlier answers suggest, each used if it pays."""

    def __init__(
        self,
        drafter: ModelDrafter | None,
        verify: StepCost,
        draft: StepCost | None,
        stats: DraftStats | None = None,
        answers: Answers | None = None,
        company: Company | None = None,
    ) -> None:
        self._drafter, self._verify, self._step = drafter, verify, draft or verify
        self.stats = stats or DraftStats()
        self._lookup = Lookup(answers)
        self._company, self._beside = company or Company(), NOTHING
        self._following = NOTHING  # what others should put in if the drafter is used
        self._best: tuple[float, float, int] | None = None  # `_together` of this round, once it is asked for
        self._mean = 0.0  # expected tokens of an answer
        self._left = 0  # tokens that this one may still have
        self._drafts: list[_Draft] = []  # of this round, whether or not they are verified
        self._drafting = 0.0  # seconds that the drafter's took to make
        self._catching_up = 0.0  # those of them that belong to reading
        self._length = KeptLength()
        self._size = 0  # tokens of the answer's last batch; 0 before the first

    def prepare(self, text: Sequence[int], left: int) -> None:
        """Begin an answer, and read the prompt if that pays; if not, a later round may find that it does."""
        company, drafter, stats = self._company, self._drafter, self.stats
        company.answers, self._size = company.answers + 1, 0
        self._look()
        going_on = 1 + self._beside.n  # answers of which half of what they may have is still to come
        self._mean, self._left = (company.emitted + going_on * left / 2) / company.answers, left
        if drafter is None:
            return
        plain, step = self._verify.of(1), self._step.of(1)
        # `acceptance` was measured on the text of the fit, which says too little of other text.
        tokens, seconds, _ = best_fixed(max(USUAL, drafter.acceptance), LONGEST, self._verify, step)
        stats.observe(tokens, seconds / plain, 1.0 if stats.steps else WEIGHT)
        if self._beside.n:
            stats.certainties.fade()
        unread, before = drafter.unread(text), drafter.seconds
        if self._pays(unread):
            plain, expected = self._plain, self._step.of(unread)
            company.saved -= (expected - step) / plain  # before others begin to read, too
            drafter.prepare(text, left)
            company.saved -= (self._observed(unread, drafter.seconds - before + step) - expected) / plain

    def draft(self, text: Sequence[int], n: int, sampling: Sampling, noise: Noise) -> list[int]:
        self._drafts, self._drafting, self._catching_up = list[_Draft](), 0.0, 0.0
        drafts = self._drafts
        if n <= 0:
            self._company.put(self, Share())
            return []
        self._look()
        drafter, stats, lookup, verify, rows = self._drafter, self.stats, self._lookup, self._verify, self._beside.rows
        rate, most = 1 / self._now, self._budget
        if drafter is not None and rows:
            self._following = self._company.beside(self, self._together[2])
        lookup.follow(text)
        suggested = lookup.guess(n)
        if drafter is not None:
            unread, before = drafter.unread(text), drafter.seconds
            spare = most - self._reserve(unread)
            if self._pays(unread):
                rate, rows = self._rate, self._following.rows
                chances = [stats.matches.of(p.certainty) for p in suggested]
                worth = max(worths(chances, verify, rate, most=spare, beside=rows))
                if not stats.tried or worth <= self._worth(n, rate, spare):
                    drafts += self._modelled(drafter.propose(text, sampling, noise), unread, n, rate)
                    suggested = lookup.guess(n - len(drafts), [draft.proposal.token for draft in drafts])
            most = most - (self._drafting if rows else drafter.seconds - before) if drafts else spare
        made = len(drafts)
        drafts += [_Draft(proposal, stats.matches) for proposal in suggested]
        chances = [draft.chance for draft in drafts]
        kept = self._length.choose(worths(chances, verify, rate, most=most, beside=rows), self._price(rate))
        if verify.change:
            chances, step = (self._expected(drafts[:made], n), self._share(made)) if made else (chances, 0.0)
            self._length.observe(worths(chances, verify, rate, step, beside=rows), kept)
        self._company.put(self, Share(1 + kept, 1 + sum(accumulate(chances[:kept], mul)), (made,)))
        return [draft.proposal.token for draft in drafts[:kept]]

    def _look(self) -> None:
        """See what others put in, and forget what was concluded from it before."""
        self._beside, self._following, self._best = self._company.beside(self), NOTHING, None

    def _worth(self, n: int, rate: float, most: float) -> float:
        """What n drafts of the drafter at most should be worth in tokens."""
        if not self._beside.n:
            return self._speedup - 1
        expected = self._expected([], n)
        return max(worths(expected, self._verify, rate, self._share(1), most=most, beside=self._following.rows))

    def _price(self, rate: float) -> float:
        """Tokens that the seconds of a change of the batch size would bring otherwise."""
        return rate * self._verify.change

    def _expected(self, drafts: Sequence[_Draft], n: int) -> list[float]:
        """The chances of n drafts of the drafter, of which these are made."""
        return [draft.chance for draft in drafts] + [self.stats.certainties.mean(USUAL)] * (n - len(drafts))

    def _modelled(self, proposals: Iterator[Proposal], unread: int, n: int, rate: float) -> list[_Draft]:
        """The drafter's drafts, as long as more of them, each of the mean chance, would be worth their seconds."""
        drafts, self._catching_up = list[_Draft](), self._step.of(unread) - self._step.of(1)
        before, beside = self.seconds, self._following.rows
        most = self._budget - self._catching_up
        for made, proposal in enumerate(proposals, 1):
            self._drafting += self._observed(unread, self.seconds - before, made)
            unread, before = 1, self.seconds
            drafts.append(_Draft(proposal, self.stats.certainties))
            step = self._share(made + 1)
            worth = worths(self._expected(drafts, n), self._verify, rate, step, made, most, beside)
            if self._length.choose(worth, self._price(rate)) <= made:
                break
        return drafts

    @property
    def _plain(self) -> float:
        """Seconds of a token if all decode plainly."""
        return self._verify.of(1 + self._beside.n) / (1 + self._beside.n)

    @property
    def _now(self) -> float:
        """Seconds of a token of all if this one decodes plainly, and others do what they do."""
        return self._verify.of(1 + self._beside.rows) / (1 + self._beside.tokens)

    @property
    def _speedup(self) -> float:
        """Tokens of the drafter's rounds per plain-decoding step."""
        return self._rate * self._plain

    @property
    def _rate(self) -> float:
        """Tokens per second of all, if drafters draft as they do."""
        if not self._beside.n:
            return self.stats.speedup / self._plain
        tokens, seconds, _ = self._together
        return tokens / seconds

    @property
    def _together(self) -> tuple[float, float, int]:
        """`best_fixed` of all conversations: what rounds brought beside fewer or more of them says little."""
        if self._best is None:
            n, chance = 1 + self._beside.n, self.stats.certainties.mean(USUAL)
            batched = self._drafter is not None and self._drafter.batched
            step = self._step.of(n) if batched else n * self._step.of(1)
            self._best = best_fixed(chance, LONGEST, self._verify, step, n)
        return self._best

    def _share(self, draft: int, expected: bool = True) -> float:
        """Seconds of the draft of this number from 1 on: an equal part of a step of those that make as many, if they do
        that in one batch, or are expected to.
        """
        if self._drafter is None or not self._drafter.batched or not self._beside.n:
            return self._step.of(1)
        n = 1 + sum(made >= draft for made in (self._following if expected else self._beside).made)
        return self._step.of(n) / n

    def _observed(self, read: int, seconds: float, draft: int = 0) -> float:
        """The seconds of a draft step as they count. Beside others the clock tells nothing of one's own part."""
        if self._beside.rows:
            return self._share(draft, expected=False) if read == 1 else self._step.of(read)
        counted = self._step.counted(read, seconds)
        self._step.observe(read, seconds)
        return counted

    @property
    def _budget(self) -> float:
        """Seconds that may be lost now."""
        return self._most + self._plain * (LOSS * self._company.emitted + self._company.saved)

    @property
    def _most(self) -> float:
        """The seconds of BUDGET: a plain step is one of all conversations."""
        return BUDGET * self._verify.of(1 + self._beside.n)

    def _trial(self, unread: int) -> float:
        """The seconds of reading so many tokens and of as many steps as the drafter's prior counts for."""
        return self._step.of(unread) + WEIGHT * self._step.of(1)

    def _reserve(self, unread: int) -> float:
        """The seconds of the budget that suggestions leave to a drafter that should pay."""
        return min(self._trial(unread), self._most / 2) if self._speedup > 1 else 0.0

    def _pays(self, unread: int) -> bool:
        """Whether to use the drafter. The budget must allow a trial, or the next step of one that has begun, and the
        target must be prepared for a batch with drafts.
        """
        rest = min(self._mean, self._left)  # an answer that goes on is as far from its end as any
        saved, first = self._plain * (1 - 1 / self._speedup) * rest, self._step.of(unread)
        needed = self._trial(unread) if unread > LONGEST + 1 else first
        rows = max(self._beside.rows, self._following.rows)  # in `prepare` nobody is expected to draft yet
        may = any(self._verify.prepared(rows + m + 1) for m in range(1, LONGEST + 1))
        return may and saved > first - self._step.of(1) and needed <= self._budget

    def learn(self, round_: Round, made: int, read: int, batch: LastBatch) -> None:
        tokens = len(round_.tokens)
        # The first batch after a prompt is one of another size in any case.
        first, price = not self._size, self._verify.change if read != self._size else 0.0
        modelled = sum(draft.source is self.stats.certainties for draft in self._drafts)
        self._size, alone = read, not self._beside.rows
        if not alone:  # what the clock says is of all, and of the prompts that were read beside them
            self._follow(batch)
            self._beside = self._company.beside(self)  # now it is known what others put in
            n, rows = 1 + self._beside.n, self._beside.rows
            shares = sum(self._share(draft, expected=False) for draft in range(1, modelled + 1))
            self._drafting = shares + self._catching_up * (modelled > 0)
            added = self._verify.of(rows + read) - self._verify.of(n)  # an equal part of it for each draft
            step = self._plain + added * (read - 1) / max(rows + read - n, 1)
        else:
            step = self._verify.counted(read, round_.seconds - round_.draft_seconds - price)
            self._verify.observe(read, step)
        plain, taken = self._plain, step if first else step + price
        self._company.emitted += tokens
        self._left -= tokens
        if made or modelled or taken > step:
            self._company.saved += tokens - (self._drafting + taken) / plain
        if modelled and alone:  # without the seconds of catching up with the text, which belong to reading
            self.stats.observe(tokens, (modelled * self._step.of(1) + taken) / plain)
        for i, draft in enumerate(self._drafts[: min(made, tokens)]):  # drafts after an end token were not judged
            draft.source.observe(draft.proposal.certainty, i < round_.accepted)

    def _follow(self, batch: LastBatch) -> None:
        """Follow the seconds of a batch of all, once for all: not of one with pieces of prompts, which take longer."""
        before, self._company.batch = self._company.batch, batch
        if batch is not before and batch.tokens == batch.outputs:
            price = self._verify.change if batch.tokens != before.tokens else 0.0
            self._verify.observe(batch.tokens, batch.seconds - price)

    def settle(self) -> None:
        if self._drafter is not None:
            self._drafter.settle()

    @property
    def seconds(self) -> float:
        return self._drafter.seconds if self._drafter is not None else 0.0
