"""Preference accuracy of implicit rewards, on pairs worked by hand."""

from __future__ import annotations

import pytest

from rlhf_kit.evals.preference import Likelihood, length_only, pair_accuracy, verdicts
from rlhf_kit.evals.steps import accuracy_interval


def test_the_reward_is_the_log_ratio_where_there_is_a_reference() -> None:
    assert Likelihood(-6.0, -8.0, 4).reward == 2.0
    assert Likelihood(-6.0, -6.0, 4).reward == 0.0


def test_and_the_mean_log_probability_where_there_is_none() -> None:
    """A long completion of likelier tokens is better, though the whole of it is less likely."""
    long, short = Likelihood(-6.0, None, 4), Likelihood(-2.0, None, 1)
    assert (long.reward, short.reward) == (-1.5, -2.0)
    assert Likelihood(0.0, None, 0).reward == 0.0


def test_a_tie_counts_half() -> None:
    margins = [2.0, -1.0, 0.0, 0.5]
    assert verdicts(margins) == [1.0, 0.0, 0.5, 1.0]
    found = pair_accuracy(margins)
    assert (found.accuracy, found.pairs) == (0.625, 4)
    assert found.interval == accuracy_interval([1, 0, 0.5, 1])
    low, high = found.interval
    assert 0 < low < 0.625 < high < 1


def test_a_model_that_is_its_own_reference_is_right_by_half() -> None:
    assert pair_accuracy([0.0] * 10).accuracy == 0.5


def test_no_pairs_have_no_accuracy() -> None:
    with pytest.raises(ValueError, match="no trials"):
        pair_accuracy([])


@pytest.mark.parametrize(
    ("chosen", "rejected", "prefers", "accuracy"),
    [
        ([5, 4, 3, 2], [1, 1, 1, 9], "longer", 0.75),
        ([1, 1, 1, 9], [5, 4, 3, 2], "shorter", 0.75),
        ([1, 2, 3], [1, 3, 4], "shorter", 2.5 / 3),
        ([1, 2], [2, 1], "longer", 0.5),
    ],
)
def test_length_alone_is_the_better_of_two_rules(
    chosen: list[int], rejected: list[int], prefers: str, accuracy: float
) -> None:
    found = length_only(chosen, rejected)
    assert found.prefers == prefers
    assert found.accuracy == pytest.approx(accuracy)
