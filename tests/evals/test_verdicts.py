"""Both orders of two completions, as a table."""

import math

import pytest

from rlhf_kit.evals.verdicts import Compared, counts


@pytest.mark.parametrize(
    ("ours_first", "theirs_first", "winner", "points", "first_place"),
    [
        (2.0, -2.0, "win", 1.0, 0.5),
        (-2.0, 2.0, "loss", 0.0, 0.5),
        (2.0, 0.1, "tie", 0.5, 1.0),  # whatever stands first
        (-2.0, -0.1, "tie", 0.5, 0.0),  # whatever stands second
        (0.0, -1.0, "tie", 0.5, 0.25),
        (0.0, 0.0, "tie", 0.5, 0.5),
    ],
)
def test_a_winner_wins_in_both_orders(ours_first, theirs_first, winner, points, first_place):
    compared = Compared(ours_first, theirs_first)
    assert (compared.winner, compared.points, compared.first_place) == (winner, points, first_place)
    assert compared.consistent == (winner != "tie")
    assert compared.contradicts == (first_place in (0.0, 1.0))


@pytest.mark.parametrize(
    ("ours_first", "theirs_first", "probability"),
    [
        (math.log(3), -math.log(9), (3 / 4 + 9 / 10) / 2),
        (math.log(3), math.log(3), 1 / 2),  # whatever stands first
        (math.log(3), 0.0, (3 / 4 + 1 / 2) / 2),
        (-math.inf, math.inf, 0.0),
    ],
)
def test_the_probability_is_the_mean_over_both_orders(ours_first, theirs_first, probability):
    assert Compared(ours_first, theirs_first).probability == pytest.approx(probability)
    assert Compared(theirs_first, ours_first).probability == pytest.approx(1 - probability)


def test_exchanging_the_two_exchanges_wins_and_losses():
    pairs = [(1.0, -1.0), (1.0, 1.0), (-1.0, 3.0), (0.5, -0.2)]
    ours = counts([Compared(first, second) for first, second in pairs])
    theirs = counts([Compared(second, first) for first, second in pairs])
    assert ours == {"win": 2, "tie": 1, "loss": 1}
    assert theirs == {"win": ours["loss"], "tie": ours["tie"], "loss": ours["win"]}
