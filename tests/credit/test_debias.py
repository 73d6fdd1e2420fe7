"""The penalty at which chosen completions are no longer than rejected ones, against all penalties that differ."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.credit.debias import length_debias

rows = st.lists(
    st.tuples(st.integers(-20, 20).map(float), st.integers(1, 12), st.integers(0, 3)), min_size=2, max_size=14
)


def gap(scores, lengths, groups, alpha) -> float:
    """By definition: the mean length of the best less that of the worst."""
    differences = []
    for group in set(groups):
        of_group = [(s - alpha * n, n) for s, n, g in zip(scores, lengths, groups, strict=True) if g == group]
        of_group = [one for one in of_group if math.isfinite(one[0])]
        if len(of_group) > 1:
            best, worst = max(s for s, _ in of_group), min(s for s, _ in of_group)
            differences.append(fmean(n for s, n in of_group if s == best) - fmean(n for s, n in of_group if s == worst))
    return fmean(differences) if differences else 0.0


def crossings(scores, lengths, groups) -> list[float]:
    """Every penalty at which two rows of a group change places."""
    found = set()
    for s, n, g in zip(scores, lengths, groups, strict=True):
        for t, m, h in zip(scores, lengths, groups, strict=True):
            if g == h and n != m:
                found.add((s - t) / (n - m))
    return sorted(found)


@given(rows)
def test_no_penalty_balances_the_lengths_better(given_rows) -> None:
    scores, lengths, groups = zip(*given_rows, strict=True)
    found = length_debias(scores, lengths, groups)
    places = crossings(scores, lengths, groups)
    if not places:
        assert found.alpha == 0 and found.gap == found.gap_before == 0
        return
    between = [(a + b) / 2 for a, b in pairwise(places)]
    tried = [places[0] - 1, *between, places[-1] + 1]
    gaps = [gap(scores, lengths, groups, alpha) for alpha in tried]
    assert all(first >= second for first, second in pairwise(gaps))  # it never rises
    assert abs(found.gap) <= min(map(abs, gaps)) + 1e-12


@given(rows, st.floats(-50, 50))
def test_a_constant_changes_nothing(given_rows, constant) -> None:
    scores, lengths, groups = zip(*given_rows, strict=True)
    moved = [score + constant for score in scores]
    assert length_debias(moved, lengths, groups).alpha == pytest.approx(
        length_debias(scores, lengths, groups).alpha, abs=1e-6
    )


@given(rows, st.randoms())
def test_the_order_of_the_rows_changes_nothing(given_rows, order) -> None:
    shuffled = list(given_rows)
    order.shuffle(shuffled)
    assert length_debias(*zip(*given_rows, strict=True)) == length_debias(*zip(*shuffled, strict=True))


def test_of_equal_scores_the_mean_length_counts() -> None:
    """Two are right and two are wrong: 7 and 3 tokens against 1 and 5, and so 5 against 3 on average."""
    found = length_debias([1.0, 1.0, 0.0, 0.0], [7, 3, 1, 5], [0, 0, 0, 0])
    assert found.gap_before == 2.0
    assert length_debias([0.0, 0.0, 0.0], [3, 7, 1], [0, 0, 0]).gap_before == 0.0


def test_a_hand_worked_table() -> None:
    """Two prompts. The longest is best by half a point a token; from 0.5 on it is not."""
    scores, lengths, groups = [1.0, 2.0, 3.0, 0.0, 2.0], [2, 4, 6, 3, 7], [0, 0, 0, 1, 1]
    found = length_debias(scores, lengths, groups)
    assert found.gap_before == 4.0
    assert found.alpha == pytest.approx(0.5, abs=1e-9)
    assert gap(scores, lengths, groups, 0.49) > 0 > gap(scores, lengths, groups, 0.51)


def test_what_is_too_short_is_given_a_bonus() -> None:
    found = length_debias([3.0, 2.0, 1.0], [2, 3, 4], [0, 0, 0])
    assert found.gap_before == -2 and found.alpha == pytest.approx(-1.0, abs=1e-9)


def test_no_penalty_has_no_sign() -> None:
    """At 0 the gap is -1, at any bonus 1: nothing is better than 0, which is not -0."""
    found = length_debias([1.0, 1.0, 0.0, 0.0], [1, 4, 3, 4], [0, 0, 0, 0])
    assert (found.alpha, found.gap) == (0.0, -1.0) and math.copysign(1.0, found.alpha) == 1.0


def test_failed_rows_and_single_ones_are_left_out() -> None:
    scores, lengths, groups = [1.0, 2.0, math.nan, 5.0], [2, 4, 900, 70], [0, 0, 0, 1]
    assert length_debias(scores, lengths, groups) == length_debias(scores[:2], lengths[:2], groups[:2])
    assert length_debias([1.0], [3], [0]).alpha == 0 == length_debias([], [], []).alpha


def test_equal_lengths_need_no_penalty() -> None:
    assert length_debias([1.0, 5.0, 2.0, 0.0], [3, 3, 4, 4], [0, 0, 1, 1]).alpha == 0
