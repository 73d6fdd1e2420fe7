"""How often a model, taken for a reward, prefers the chosen completion of a pair; and how often length alone does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_kit.evals.steps import Interval, accuracy_interval


@dataclass(frozen=True)
class Likelihood:
    """A completion as a model and its reference see it.

    Attributes:
        log_prob: log pi(y | x), summed over its tokens.
        reference: log pi_ref(y | x); None for objectives without a reference.
        length: its tokens.
    """

    log_prob: float
    reference: float | None
    length: int

    @property
    def reward(self) -> float:
        """The implicit reward, up to a positive factor: `log(pi / pi_ref)` (DPO, arXiv 2305.18290, Eq. 5).

        Without a reference it is the mean log-probability, which orders completions as ORPO's log-odds do (arXiv
        2403.07691, Eq. 4).
        """
        return self.log_prob / max(self.length, 1) if self.reference is None else self.log_prob - self.reference


@dataclass(frozen=True)
class PairAccuracy:
    """A share of pairs, with its 95 % interval (Wilson) and their number."""

    accuracy: float
    interval: Interval
    pairs: int


@dataclass(frozen=True)
class LengthOnly:
    """The better of two rules that look at nothing but the number of tokens, and its accuracy.

    The rule is chosen on the pairs that it is judged on, which flatters it.
    """

    prefers: Literal["longer", "shorter"]
    accuracy: float


def verdicts(margins: Sequence[float]) -> list[float]:
    """1 where the chosen completion is rewarded more, 0 where the other is, and 1/2 where they are equal."""
    return [0.5 if margin == 0 else float(margin > 0) for margin in margins]


def pair_accuracy(margins: Sequence[float]) -> PairAccuracy:
    """Accuracy of pairs by `reward(chosen) - reward(rejected)`; a tie counts half.

    Raises:
        ValueError: there are no pairs.
    """
    judged = verdicts(margins)
    return PairAccuracy(sum(judged) / max(len(judged), 1), accuracy_interval(judged), len(judged))


def length_only(chosen: Sequence[int], rejected: Sequence[int]) -> LengthOnly:
    """How often the longer completion is the chosen one, or the shorter, whichever is more often; a tie counts half."""
    longer = pair_accuracy([ours - theirs for ours, theirs in zip(chosen, rejected, strict=True)]).accuracy
    return LengthOnly("longer", longer) if longer >= 0.5 else LengthOnly("shorter", 1 - longer)
