"""Choosing among n completions, against the enumeration of all subsets."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.evals.selection import any_right, best_of, best_of_n_kl, sizes, subsets, vote

NAN = float("nan")
completions = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0, 2.0, -3.5, NAN]), st.sampled_from([0.0, 1.0]), st.sampled_from("abc")),
    min_size=1,
    max_size=7,
)


def chosen_by_hand(scores, labels, subset):
    """The mean label of a subset's best; nothing judged is better than nothing, and all that are best are equal."""
    known = [place for place in subset if not math.isnan(scores[place])]
    pool = [p for p in known if scores[p] == max(scores[q] for q in known)] if known else list(subset)
    return Fraction(sum(int(labels[place]) for place in pool), len(pool))


@given(completions)
def test_best_of_n_is_the_mean_over_all_subsets(rows):
    scores, labels, _ = zip(*rows, strict=True)
    for size in range(1, len(rows) + 1):
        every = list(combinations(range(len(rows)), size))
        expected = sum(chosen_by_hand(scores, labels, subset) for subset in every) / len(every)
        assert best_of(np.array(scores), np.array(labels), size) == pytest.approx(float(expected))


def test_best_of_n_is_not_the_best_of_the_first_n():
    # By its first two completions best-of-2 would be right; over all three pairs it is right in one of them.
    scores, labels = np.array([2.0, 1.0, 3.0]), np.array([1.0, 0.0, 0.0])
    assert best_of(scores, labels, 2) == pytest.approx(1 / 3)


@given(completions)
def test_pass_at_n_is_the_share_of_subsets_with_a_right_one(rows):
    labels = np.array([label for _, label, _ in rows])
    for size in range(1, len(rows) + 1):
        every = list(combinations(range(len(rows)), size))
        expected = sum(any(labels[place] for place in subset) for subset in every) / len(every)
        assert any_right(labels, size) == pytest.approx(expected)


def voted_by_hand(answers, labels, weights, subset):
    voting = [place for place in subset if not math.isnan(weights[place])]
    power = {place: weights[place] for place in voting} if voting else dict.fromkeys(subset, 1.0)
    votes = {}
    for place, own in power.items():
        votes[answers[place]] = votes.get(answers[place], 0.0) + own
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    right = []
    for answer in winners:
        own = [labels[place] for place in subset if answers[place] == answer]
        right.append(sum(own) / len(own))
    return sum(right) / len(right)


@given(completions)
def test_votes_are_counted_for_each_answer_and_ties_are_shared(rows):
    weights, labels, answers = zip(*rows, strict=True)
    for size in range(1, len(rows) + 1):
        chosen = subsets(len(rows), size)
        plain = [voted_by_hand(answers, labels, [1.0] * len(rows), subset) for subset in chosen]
        assert vote(answers, np.array(labels), chosen) == pytest.approx(sum(plain) / len(plain))
        heavy = [voted_by_hand(answers, labels, weights, subset) for subset in chosen]
        assert vote(answers, np.array(labels), chosen, np.array(weights)) == pytest.approx(sum(heavy) / len(heavy))


def test_a_rewarded_minority_outvotes_a_majority():
    answers, labels = ["7", "8", "8"], np.array([1.0, 0.0, 0.0])
    everything = np.array([[0, 1, 2]])
    assert vote(answers, labels, everything) == 0.0
    assert vote(answers, labels, everything, np.array([0.9, 0.4, 0.4])) == 1.0
    assert vote(answers, labels, everything, np.array([0.8, 0.4, 0.4])) == 0.5


def test_negative_rewards_speak_against_an_answer_and_absent_answers_never_win():
    answers, labels = ["7", "8", "9"], np.array([1.0, 0.0, 0.0])
    assert vote(answers, labels, np.array([[0, 1]]), np.array([-1.0, -2.0, -0.5])) == 1.0


@pytest.mark.parametrize(("count", "size"), [(4, 2), (5, 5), (6, 1)])
def test_few_subsets_are_all_there_are(count, size):
    assert {tuple(row) for row in subsets(count, size)} == set(combinations(range(count), size))


def test_many_subsets_are_drawn_without_repeating_a_completion():
    drawn = subsets(30, 10, most=400)
    assert drawn.shape == (400, 10)
    assert all(len(set(row)) == 10 for row in drawn)
    counts = np.bincount(drawn.ravel(), minlength=30)  # binomial: 400 draws of chance 1/3
    assert abs(counts - 400 / 3).max() < 5 * math.sqrt(400 / 3 * 2 / 3)


def test_sizes_are_powers_of_two_and_the_whole():
    assert sizes(1) == [1]
    assert sizes(8) == [1, 2, 4, 8]
    assert sizes(12) == [1, 2, 4, 8, 12]


@pytest.mark.parametrize("size", [0, 4])
def test_more_than_all_cannot_be_chosen(size):
    with pytest.raises(ValueError, match=f"cannot choose {size} of 3"):
        best_of(np.zeros(3), np.zeros(3), size)


def test_the_distance_of_best_of_n():
    assert best_of_n_kl(1) == 0
    # The best of two by a continuous score has density 2 F, and KL = integral of 2F log(2F) dF = log 2 - 1/2.
    grid = (np.arange(200_000) + 0.5) / 200_000
    assert best_of_n_kl(2) == pytest.approx(float(np.mean(2 * grid * np.log(2 * grid))), abs=1e-6)
