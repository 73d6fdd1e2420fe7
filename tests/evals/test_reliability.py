"""Calibration against values worked by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.evals.reliability import bin_places, brier, calibration_error, log_loss, reliability

P = np.array([0.1, 0.2, 0.6, 0.9])
Y = np.array([0.0, 1.0, 1.0, 1.0])


def test_brier_score():
    assert brier(P, Y) == pytest.approx((0.01 + 0.64 + 0.16 + 0.01) / 4)
    assert brier(np.full(10, 0.5), np.arange(10) % 2) == 0.25


def test_log_loss():
    assert log_loss(np.array([0.5, 0.25]), np.array([1.0, 0.0])) == pytest.approx((np.log(2) - np.log(0.75)) / 2)
    assert np.isfinite(log_loss(np.array([1.0]), np.array([0.0])))


@pytest.mark.parametrize("binning", ["mass", "width"])
def test_two_bins_by_hand(binning):
    # {0.1, 0.2}: confidence 0.15, accuracy 0.5. {0.6, 0.9}: confidence 0.75, accuracy 1.
    assert calibration_error(P, Y, 2, binning) == pytest.approx(0.5 * 0.35 + 0.5 * 0.25)
    low, high = reliability(P, Y, 2, binning)
    assert (low.count, low.confidence, low.accuracy) == (2, pytest.approx(0.15), 0.5)
    assert (high.count, high.low, high.high) == (2, 0.6, 0.9)


def test_bins_of_equal_width_and_of_equal_mass_differ():
    p, y = np.array([0.01, 0.02, 0.03, 0.9]), np.array([0.0, 0.0, 1.0, 1.0])
    # Width: {0.01, 0.02, 0.03} and {0.9}. Mass: {0.01, 0.02} and {0.03, 0.9}.
    assert calibration_error(p, y, 2, "width") == pytest.approx(0.75 * abs(1 / 3 - 0.02) + 0.25 * 0.1)
    assert calibration_error(p, y, 2, "mass") == pytest.approx(0.5 * 0.015 + 0.5 * abs(1 - 0.465))


def test_the_edges_of_equal_width():
    assert bin_places(np.array([0.0, 0.0999, 0.1, 0.95, 1.0]), 10, "width").tolist() == [0, 0, 1, 9, 9]


@given(st.lists(st.sampled_from([0.0, 0.2, 0.2, 0.5, 0.7, 1.0]), min_size=1, max_size=40), st.integers(1, 12))
def test_equal_probabilities_share_a_bin_whatever_their_order(values, count):
    places = bin_places(np.array(values), count, "mass")
    of_value = {value: {int(b) for v, b in zip(values, places, strict=True) if v == value} for value in values}
    assert all(len(found) == 1 for found in of_value.values())
    back = bin_places(np.array(values[::-1]), count, "mass")[::-1]
    assert places.tolist() == back.tolist()
    assert [min(of_value[value]) for value in sorted(of_value)] == sorted(min(of_value[value]) for value in of_value)


@given(st.integers(1, 60), st.integers(1, 12))
def test_bins_of_equal_mass_differ_by_one_row_at_most(rows, count):
    generator = np.random.default_rng(rows)
    counts = np.bincount(bin_places(generator.random(rows), count, "mass"))
    assert len(counts) == min(rows, count)
    assert counts.max() - counts.min() <= 1


def test_what_is_calibrated_has_no_error_and_what_says_the_base_rate_neither():
    p = np.repeat([0.25, 0.75], 8)
    y = np.array(([1, 0, 0, 0] * 2) + ([1, 1, 1, 0] * 2), dtype=float)
    assert calibration_error(p, y, 2, "mass") == pytest.approx(0)
    assert calibration_error(np.full(16, 0.5), y, 10, "width") == pytest.approx(0)
