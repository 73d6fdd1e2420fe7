"""What is expected of choosing among n of K completions: by the best score, by vote, by luck.

For every n the expectation is over all subsets of n of the K completions, not over the first n: exact where a closed
form exists, otherwise over every subset or, where there are too many, over subsets drawn at random. Functions are
pure; a score that is missing is NaN, and such a completion is chosen only where nothing else is there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations
from math import comb, log

import numpy as np
from jaxtyping import Float, Int

MOST_SUBSETS = 500


def sizes(count: int) -> list[int]:
    """1, 2, 4, ... and the number of completions itself."""
    return sorted({*(2**power for power in range(count.bit_length()) if 2**power <= count), count})


def best_of(scores: Float[np.ndarray, "K"], values: Float[np.ndarray, "K"], size: int) -> float:
    """The expected value of the completion with the highest score among `size` of K drawn without replacement.

    With the scores in falling order, the r-th (from 0) is the highest of a subset in `C(K-1-r, n-1)` of the `C(K, n)`.
    Among equal scores each is chosen as often as the others.

    Raises:
        ValueError: `size` is below 1 or above K.
    """
    count = len(scores)
    _check_size(size, count)
    ranked = np.where(np.isnan(scores), -np.inf, scores)
    order = np.argsort(-ranked, kind="stable")
    chances = np.array([comb(count - 1 - rank, size - 1) for rank in range(count)], dtype=object)
    total, start = 0.0, 0
    while start < count:
        stop = start
        while stop < count and ranked[order[stop]] == ranked[order[start]]:
            stop += 1
        total += int(chances[start:stop].sum()) / comb(count, size) * float(values[order[start:stop]].mean())
        start = stop
    return total


def any_right(labels: Float[np.ndarray, "K"], size: int) -> float:
    """pass@n: the chance that one of `size` of K is right, `1 - C(K-c, n) / C(K, n)` (arXiv 2107.03374, Eq. 1)."""
    count = len(labels)
    _check_size(size, count)
    wrong = int((np.asarray(labels) < 0.5).sum())
    return 1 - comb(wrong, size) / comb(count, size)


def subsets(count: int, size: int, most: int = MOST_SUBSETS, seed: int = 0) -> Int[np.ndarray, "S n"]:
    """All subsets of `size` of `count` places where there are at most `most`, otherwise `most` drawn at random."""
    _check_size(size, count)
    if comb(count, size) <= most:
        return np.array(list(combinations(range(count), size)))
    return np.random.default_rng(seed).random((most, count)).argsort(axis=1)[:, :size]


def vote(
    answers: Sequence[Hashable],
    labels: Float[np.ndarray, "K"],
    chosen: Int[np.ndarray, "S n"],
    weights: Float[np.ndarray, "K"] | None = None,
) -> float:
    """The expected label of the answer with the most votes, over the given subsets.

    A completion's vote counts `weights` (1 without them): "majority" and "reward-weighted" voting (arXiv 2412.01981,
    section 4.1), where rewards are added up for each distinct answer. Answers with equal votes share the win. The label
    of an answer is the mean label of its completions in the subset. A completion whose weight is NaN has no vote; a
    subset without any vote is decided by majority.
    """
    index = {answer: place for place, answer in enumerate(dict.fromkeys(answers))}
    place = np.array([index[answer] for answer in answers])
    given = np.ones(len(place)) if weights is None else np.asarray(weights, dtype=np.float64)
    own, power = place[chosen], given[chosen]
    voting = np.isfinite(power)
    decided = voting.any(axis=1, keepdims=True)
    power = np.where(decided, np.where(voting, power, 0.0), 1.0)
    heard = voting | ~decided
    rows = np.broadcast_to(np.arange(len(chosen))[:, None], own.shape)
    votes, sums, counts, standing = (np.zeros((len(chosen), len(index))) for _ in range(4))
    np.add.at(votes, (rows, own), power)
    np.add.at(standing, (rows, own), heard)
    np.add.at(sums, (rows, own), np.asarray(labels)[chosen])
    np.add.at(counts, (rows, own), 1.0)
    votes[standing == 0] = -np.inf
    winners = np.isclose(votes, votes.max(axis=1, keepdims=True), rtol=1e-12, atol=1e-12)
    right = np.where(winners, sums / counts.clip(min=1), 0.0).sum(axis=1) / winners.sum(axis=1)
    return float(right.mean())


def best_of_n_kl(size: int) -> float:
    """KL of best-of-n from the policy: `log n - (n-1)/n` (Stiennon et al., arXiv 2009.01325; an upper bound)."""
    return log(size) - (size - 1) / size


def _check_size(size: int, count: int) -> None:
    if not 1 <= size <= count:
        raise ValueError(f"cannot choose {size} of {count} completions: write a number from 1 to {count}")
