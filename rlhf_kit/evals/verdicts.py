"""Who wins between two completions that a judge has seen in both orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_kit.judges.base import lead

Winner = Literal["win", "loss", "tie"]


@dataclass(frozen=True)
class Compared:
    """What a judge said of our completion and another.

    Attributes:
        ours_first: its log-odds that the first is better, ours standing first.
        theirs_first: the same with the other standing first.
    """

    ours_first: float
    theirs_first: float

    @property
    def winner(self) -> Winner:
        """A win where both orders prefer ours, a loss where both prefer the other; a disagreement is a tie."""
        if self.ours_first > 0 and self.theirs_first < 0:
            return "win"
        if self.ours_first < 0 and self.theirs_first > 0:
            return "loss"
        return "tie"

    @property
    def decided(self) -> bool:
        """Whether it prefers one in any order; equal texts are not even asked about."""
        return self.ours_first != 0 or self.theirs_first != 0

    @property
    def consistent(self) -> bool:
        """Whether the two orders prefer the same completion."""
        return self.winner != "tie"

    @property
    def contradicts(self) -> bool:
        """Whether both orders prefer what stands in the same place."""
        return self.ours_first * self.theirs_first > 0

    @property
    def probability(self) -> float:
        """The probability that ours is the better one, the mean over both orders."""
        return (1 + lead(self.ours_first) - lead(self.theirs_first)) / 2

    @property
    def points(self) -> float:
        """1 for a win, 1/2 for a tie, 0 for a loss."""
        return {"win": 1.0, "tie": 0.5, "loss": 0.0}[self.winner]

    @property
    def first_place(self) -> float:
        """How often what stands first is preferred: of two orders 0, 1/2 or 1, an undecided one counted half."""
        return (_preferred(self.ours_first) + _preferred(self.theirs_first)) / 2


def _preferred(log_odds: float) -> float:
    return 0.5 if log_odds == 0 else float(log_odds > 0)


def counts(compared: Sequence[Compared]) -> dict[Winner, int]:
    """How many of each."""
    found: dict[Winner, int] = {"win": 0, "tie": 0, "loss": 0}
    for item in compared:
        found[item.winner] += 1
    return found
