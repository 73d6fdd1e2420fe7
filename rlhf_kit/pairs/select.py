"""The choice of pairs, and of single completions, among scored completions of prompts: pure functions."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from rlhf_kit.pairs.selection import (
    AllPairs,
    BestOfN,
    ExpertIteration,
    LargeMargin,
    PairSelection,
    RandomPair,
    Selection,
    SmallMargin,
    Threshold,
)


@dataclass(frozen=True)
class Candidate:
    """A completion that may be chosen.

    Attributes:
        prompt: the number of its prompt.
        place: its own number among all completions.
        score: NaN where a required source failed.
        length: in tokens.
        text: what it says.
        truncated: cut off at the length limit.
        measure: what the margin is of, where that is not the score; NaN where there is none.
    """

    prompt: int
    place: int
    score: float
    length: int
    text: str
    truncated: bool
    measure: float | None = None


@dataclass(frozen=True)
class Pair:
    """The places of two completions of one prompt, and their margin, which is not below 0."""

    chosen: int
    rejected: int
    margin: float


def usable(candidates: Iterable[Candidate], selection: Selection) -> dict[int, list[Candidate]]:
    """The candidates of each prompt that have a score and are not to be left out, in order."""
    groups: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        if math.isfinite(candidate.score) and not (candidate.truncated and selection.truncated == "drop"):
            groups.setdefault(candidate.prompt, []).append(candidate)
    return groups


def select_pairs(
    candidates: Iterable[Candidate], selection: PairSelection, round_number: int = 1, seed: int = 0
) -> list[Pair]:
    """The pairs of a selection, in the order of the prompts, within its budget.

    Equal scores make no pair. Of more than the budget, the smallest (or largest) margins stay where the selection is by
    margin, else random ones.
    """
    drawn = random.Random(f"pairs {seed} {round_number}")
    pairs: list[Pair] = []
    for _, group in sorted(usable(candidates, selection).items()):
        pairs += _of_prompt(_allowed(group, selection), selection, drawn)
    return _within_budget(pairs, selection, selection.budget_in(round_number), drawn)


def _allowed(group: Sequence[Candidate], selection: PairSelection) -> list[Pair]:
    """Every two completions of a prompt whose margin and lengths are allowed."""
    ordered = (sorted(pair, key=lambda one: -one.score) for pair in combinations(group, 2))
    longest, widest, ratio = selection.max_length_gap, selection.max_margin, selection.max_length_ratio
    return [
        Pair(best.place, worst.place, margin)
        for best, worst in ordered
        if best.score > worst.score
        and (margin := _margin(best, worst)) >= selection.min_margin  # NaN is not
        and (widest is None or margin <= widest)
        and (longest is None or abs(best.length - worst.length) <= longest)
        and (ratio is None or max(best.length, worst.length) <= ratio * min(best.length, worst.length))
        and _reaches(best, worst, selection)
    ]


def _margin(best: Candidate, worst: Candidate) -> float:
    if best.measure is None or worst.measure is None:
        return best.score - worst.score
    return abs(best.measure - worst.measure)


def _reaches(best: Candidate, worst: Candidate, selection: PairSelection) -> bool:
    if not isinstance(selection, Threshold):
        return True
    return best.score >= selection.chosen and worst.score <= selection.rejected


def _of_prompt(pairs: list[Pair], selection: PairSelection, drawn: random.Random) -> list[Pair]:
    if not pairs or isinstance(selection, AllPairs):
        return pairs
    if isinstance(selection, RandomPair | Threshold):
        return [drawn.choice(pairs)]
    pick = min if isinstance(selection, SmallMargin) else max
    return [pick(pairs, key=lambda pair: pair.margin)]


def _within_budget(pairs: list[Pair], selection: PairSelection, budget: int | None, drawn: random.Random) -> list[Pair]:
    if budget is None or len(pairs) <= budget:
        return pairs
    if isinstance(selection, SmallMargin | LargeMargin):
        sign = 1 if isinstance(selection, SmallMargin) else -1
        kept = sorted(range(len(pairs)), key=lambda place: (sign * pairs[place].margin, place))[:budget]
    else:
        kept = drawn.sample(range(len(pairs)), budget)
    return [pairs[place] for place in sorted(kept)]


def select_completions(candidates: Iterable[Candidate], selection: BestOfN | ExpertIteration) -> list[int]:
    """The places of the completions for supervised training, in the order of the prompts.

    `best_of_n`: the best of each prompt, the first of equals. `expert_iteration`: the first `per_prompt` different ones
    that score enough.
    """
    places: list[int] = []
    for _, group in sorted(usable(candidates, selection).items()):
        enough = [one for one in group if selection.min_score is None or one.score >= selection.min_score]
        if isinstance(selection, BestOfN):
            places += [max(enough, key=lambda one: one.score).place] if enough else []
        else:
            first = {one.text: one.place for one in reversed(enough)}
            places += sorted(first.values())[: selection.per_prompt]
    return places
