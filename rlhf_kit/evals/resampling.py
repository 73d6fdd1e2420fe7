"""Intervals of means and of other statistics by the bootstrap over independent units (Efron, 1979)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from rlhf_kit.evals.result import Estimate
from rlhf_kit.evals.steps import bootstrap_interval

RESAMPLES = 1000


def groups_of(keys: Sequence[Hashable]) -> list[np.ndarray]:
    """The places of each distinct key, in the order in which the keys first appear."""
    places: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return [np.array(found) for found in places.values()]


def estimate(
    statistic: Callable[[np.ndarray], float | None],
    groups: Sequence[np.ndarray],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate | None:
    """A statistic of rows, with the 2.5 and 97.5 percentiles of its value on resampled groups of rows.

    `groups` hold the places of rows that belong together (the completions of a prompt): they are drawn as a whole,
    with replacement. `statistic` gets the places of rows; None where they do not define it, and then the whole is None
    or the draw is passed over. One group gives no interval.
    """
    if not groups:
        return None
    value = statistic(np.concatenate(groups))
    if value is None:
        return None
    interval = None
    if len(groups) > 1:
        interval = bootstrap_interval(
            lambda drawn: statistic(np.concatenate([groups[index] for index in drawn])), len(groups), resamples, seed
        )
    low, high = interval or (None, None)
    return Estimate(float(value), low, high, len(groups))


def mean_estimate(
    values: Sequence[float] | np.ndarray, keys: Sequence[Hashable] | None = None, seed: int = 0
) -> Estimate | None:
    """The mean of values, resampled by `keys` (without them, one by one); values that are not finite are left out."""
    numbers = np.asarray(values, dtype=np.float64)
    kept = np.isfinite(numbers)
    if not kept.any():
        return None
    numbers = numbers[kept]
    names = list(range(len(kept))) if keys is None else list(keys)
    index = {key: place for place, key in enumerate(dict.fromkeys(n for n, k in zip(names, kept, strict=True) if k))}
    unit = np.array([index[name] for name, keep in zip(names, kept, strict=True) if keep])
    sums = np.bincount(unit, numbers)
    counts = np.bincount(unit).astype(np.float64)
    value = float(numbers.mean())
    if len(sums) == 1:
        return Estimate(value, None, None, 1)
    generator = np.random.default_rng(seed)
    draws = np.empty(RESAMPLES)
    for place in range(RESAMPLES):  # one draw at a time: all of them at once would be units x draws numbers
        drawn = generator.integers(len(sums), size=len(sums))
        draws[place] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value, float(low), float(high), len(sums))


def difference_estimate(
    before: np.ndarray,
    after: np.ndarray,
    groups_before: Sequence[np.ndarray],
    groups_after: Sequence[np.ndarray],
    seed: int = 0,
) -> Estimate:
    """The mean of `after` less that of `before`, two parts that are independent: each is resampled by itself.

    `groups_before` and `groups_after` hold the places of values that are drawn together. A part of one group gives no
    interval. Values that are paired by what they are of have the `mean_estimate` of their differences instead.
    """
    value, count = float(after.mean() - before.mean()), len(groups_before) + len(groups_after)
    if min(len(groups_before), len(groups_after)) < 2:
        return Estimate(value, None, None, count)
    generator = np.random.default_rng(seed)  # one for both: two with one seed would draw the same groups of each

    def drawn(values: np.ndarray, groups: Sequence[np.ndarray]) -> float:
        chosen = generator.integers(len(groups), size=len(groups))
        return float(values[np.concatenate([groups[index] for index in chosen])].mean())

    draws = [drawn(after, groups_after) - drawn(before, groups_before) for _ in range(RESAMPLES)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value, float(low), float(high), count)
