"""Intervals over independent units."""

import math

import numpy as np
import pytest

from rlhf_kit.evals.resampling import difference_estimate, estimate, groups_of, mean_estimate


def test_groups_keep_the_order_in_which_they_appear():
    assert [group.tolist() for group in groups_of(["b", "a", "b", "c", "a"])] == [[0, 2], [1, 4], [3]]


def test_the_rows_of_a_unit_are_drawn_together():
    # Two units of one row's worth: a draw has the mean 0, 1/2 or 1, however many rows each unit has.
    values, keys = [0.0] * 50 + [1.0] * 50, ["a"] * 50 + ["b"] * 50
    clustered, alone = mean_estimate(values, keys), mean_estimate(values)
    assert (clustered.value, clustered.low, clustered.high, clustered.count) == (0.5, 0.0, 1.0, 2)
    assert alone.count == 100
    assert alone.low > 0.35
    assert alone.high < 0.65


def test_the_interval_of_a_mean_is_about_two_standard_errors():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    found = mean_estimate(values)
    error = values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)


def test_units_of_different_sizes_count_by_their_rows():
    assert mean_estimate([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]).value == 0.75


def test_missing_values_are_left_out_and_nothing_has_no_estimate():
    found = mean_estimate([1.0, math.nan, 0.0, math.nan], ["a", "a", "b", "c"])
    assert (found.value, found.count) == (0.5, 2)
    assert mean_estimate([math.nan]) is None
    assert mean_estimate([]) is None


def test_one_unit_has_no_interval():
    found = mean_estimate([0.0, 1.0], ["a", "a"])
    assert (found.value, found.low, found.high) == (0.5, None, None)


def test_both_ways_agree_on_a_mean():
    values, keys = np.array([1.0, 2.0, 4.0, 8.0, 3.0]), ["a", "b", "b", "c", "d"]
    general = estimate(lambda at: float(values[at].mean()), groups_of(keys))
    special = mean_estimate(values, keys)
    assert (general.value, general.count) == (special.value, special.count)
    assert general.low == pytest.approx(special.low, abs=0.3)
    assert general.high == pytest.approx(special.high, abs=0.3)


def test_a_statistic_that_some_draws_do_not_define_has_the_interval_of_the_others():
    labels = np.array([1.0, 0.0])

    def spread(at: np.ndarray) -> float | None:
        return None if labels[at].std() == 0 else float(labels[at].std())

    found = estimate(spread, groups_of([0, 1]))
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_two_parts_are_resampled_independently():
    # A mean of two draws from {0, 1} is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4: the difference of two is -1 or 1
    # with 1/16 each, which the 2.5 and 97.5 percentiles lie in. Drawn alike, it would always be 0.
    part, alone = np.array([0.0, 1.0]), groups_of([0, 1])
    found = difference_estimate(part, part, alone, alone)
    assert (found.value, found.low, found.high, found.count) == (0.0, -1.0, 1.0, 4)


def test_the_variance_of_a_difference_is_that_of_both_parts():
    generator = np.random.default_rng(0)
    before, after = generator.normal(1.0, 2.0, size=300), generator.normal(3.0, 1.0, size=200)
    found = difference_estimate(before, after, groups_of(range(300)), groups_of(range(200)))
    error = math.sqrt(before.var() / 300 + after.var() / 200)
    assert found.value == pytest.approx(after.mean() - before.mean())
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.2 * error)


def test_a_part_of_one_unit_gives_a_difference_without_an_interval():
    one, two = np.array([1.0]), np.array([2.0, 4.0])
    found = difference_estimate(one, two, groups_of([0]), groups_of([0, 1]))
    assert (found.value, found.low, found.high, found.count) == (2.0, None, None, 3)
    assert difference_estimate(two, one, groups_of([0, 1]), groups_of([0])).low is None
