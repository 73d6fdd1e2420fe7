"""Configuration of selections: which pairs, or which single completions, are taken among scored ones."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf_kit.config import Config


class Selection(Config):
    """Fields of every selection.

    Completions cut off at `max_new_tokens` are left out, unless `truncated: keep` (DICE, arXiv 2406.09760, drops them).
    """

    truncated: Literal["drop", "keep"] = "drop"

    @property
    def makes_pairs(self) -> bool:
        """Whether it gives pairs, or single completions for supervised training."""
        return True


class PairSelection(Selection):
    """Fields of selections of pairs.

    A pair's margin is the score of its chosen completion less that of its rejected one; one without a margin is none.
    With `margin_of` a pair's margin is how far apart this source's scores are, whichever is higher (before weights and
    `length_debias`), and the whole score still says which is chosen, so that a source of weight 0 picks among the pairs
    that have a better side. (arXiv 2406.17312 picks first and labels then: there a pair of equals costs a label.)
    `budget` is the number of pairs at most, or a list of it by round (the last for all later ones). `max_length_gap` is
    in tokens, `max_length_ratio` that of the longer to the shorter.
    """

    min_margin: NonNegativeFloat = 0.0
    max_margin: PositiveFloat | None = None
    margin_of: str | None = None
    max_length_gap: NonNegativeInt | None = None
    max_length_ratio: Annotated[float, Field(ge=1)] | None = None
    budget: PositiveInt | Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None

    def budget_in(self, round_number: int) -> int | None:
        """The budget of a round, from 1."""
        if isinstance(self.budget, tuple):
            return self.budget[min(round_number, len(self.budget)) - 1]
        return self.budget


class BestWorst(PairSelection):
    """The best against the worst completion of each prompt."""

    type: Literal["best_worst"]


class SmallMargin(PairSelection):
    """The pair of each prompt with the smallest margin; of all, those with the smallest (arXiv 2406.17312)."""

    type: Literal["small_margin"]


class LargeMargin(PairSelection):
    """The best against the worst of each prompt; of all prompts, those with the largest margins."""

    type: Literal["large_margin"]


class RandomPair(PairSelection):
    """Two completions of each prompt at random."""

    type: Literal["random"]


class AllPairs(PairSelection):
    """Every two completions of a prompt."""

    type: Literal["all_pairs"]


class Threshold(PairSelection):
    """A completion that scores at least `chosen` against one that scores at most `rejected`, at random."""

    type: Literal["threshold"]
    chosen: float
    rejected: float


class BestOfN(Selection):
    """The best completion of each prompt, for supervised training, if it scores at least `min_score`."""

    type: Literal["best_of_n"]
    min_score: float | None = None

    @property
    def makes_pairs(self) -> bool:
        return False


class ExpertIteration(Selection):
    """At most `per_prompt` different completions that score at least `min_score` (ReST-EM, arXiv 2312.06585)."""

    type: Literal["expert_iteration"]
    min_score: float
    per_prompt: PositiveInt = 10

    @property
    def makes_pairs(self) -> bool:
        return False


SelectConfig = Annotated[
    BestWorst | SmallMargin | LargeMargin | RandomPair | AllPairs | Threshold | BestOfN | ExpertIteration,
    Field(discriminator="type"),
]
