"""Both orders of two completions, as a table."""

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


def test_exchanging_the_two_exchanges_wins_and_losses():
    pairs = [(1.0, -1.0), (1.0, 1.0), (-1.0, 3.0), (0.5, -0.2)]
    ours = counts([Compared(first, second) for first, second in pairs])
    theirs = counts([Compared(second, first) for first, second in pairs])
    assert ours == {"win": 2, "tie": 1, "loss": 1}
    assert theirs == {"win": ours["loss"], "tie": ours["tie"], "loss": ours["win"]}
