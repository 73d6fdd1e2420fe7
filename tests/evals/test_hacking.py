"""Signs of reward hacking, each against its definition."""

import numpy as np
import pytest

from rlhf_kit.evals.hacking import (
    Mahalanobis,
    blocks,
    centred,
    correlation,
    kl_estimates,
    refuses,
    repetition,
    slope,
)


@pytest.mark.parametrize(
    ("text", "size", "share"),
    [
        ("a b c d", 2, 0.0),
        ("a a a a", 1, 0.75),
        ("a b a b a b", 2, 3 / 5),  # ab ba ab ba ab: two of five are new
        ("a", 4, 0.0),
        ("", 1, 0.0),
    ],
)
def test_repetition_is_the_share_of_n_grams_seen_before(text, size, share):
    assert repetition(text, size) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot do this.", True),
        ("As an AI language model, I have no opinion.", True),
        ("Sorry to hear that! Here is a plan.", False),
        ("You can't divide by zero.", False),
        ("The unable seaman I met", False),
    ],
)
def test_refusals(text, refused):
    assert refuses(text) == refused


def test_a_refusal_pattern_of_ones_own():
    assert refuses("NEIN", "(?i)nein")
    assert not refuses("I'm sorry", "(?i)nein")


def test_slope_and_correlation():
    x, y = np.array([1.0, 2.0, 3.0]), np.array([3.0, 5.0, 7.0])
    assert slope(x, y) == pytest.approx(2)
    assert correlation(x, y) == pytest.approx(1)
    assert correlation(x, -y) == pytest.approx(-1)
    assert correlation(x, np.array([0.0, 1.0, 0.0])) == pytest.approx(0)
    assert slope(np.ones(3), y) is None
    assert correlation(x, np.ones(3)) is None


def test_what_grows_from_step_to_step_is_not_what_goes_together_within_one():
    # Reward and length both grow over training; within a step the longer completion earns less.
    length, reward = np.array([1.0, 2.0, 11.0, 12.0]), np.array([1.0, 0.0, 11.0, 10.0])
    groups = [np.array([0, 1]), np.array([2, 3])]
    assert correlation(length, reward) > 0.9
    assert slope(centred(length, groups), centred(reward, groups)) == pytest.approx(-1)


def test_blocks_cover_everything_once():
    assert [block.tolist() for block in blocks(5, 2)] == [[0, 1], [2, 3], [4]]


def test_both_estimates_have_the_mean_of_the_kl_divergence():
    pi, other = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    exact = float((pi * np.log(pi / other)).sum())
    values = [kl_estimates(np.log(pi[[token]] / other[[token]])) for token in range(3)]
    for number in range(2):
        assert sum(p * value[number] for p, value in zip(pi, values, strict=True)) == pytest.approx(exact)


def test_k3_is_never_negative_and_both_are_0_at_the_start():
    assert kl_estimates(np.zeros(4)) == (0.0, 0.0)
    k1, k3 = kl_estimates(np.array([-1.0, -2.0]))
    assert k1 == -3.0
    assert k3 == pytest.approx(np.e - 2 + np.e**2 - 3)


def test_mahalanobis_distance_against_the_inverse_covariance():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(500, 3)) @ np.diag([1.0, 5.0, 0.2])
    fitted = Mahalanobis(features, shrinkage=0.0)
    covariance = np.cov(features, rowvar=False)
    away = np.array([[1.0, 5.0, 0.0], [0.0, 0.0, 2.0]])
    expected = [np.sqrt((a - features.mean(0)) @ np.linalg.inv(covariance) @ (a - features.mean(0))) for a in away]
    assert fitted(away) == pytest.approx(expected)
    assert fitted(away)[1] > fitted(away)[0]  # far in the direction that hardly varies


def test_mahalanobis_distance_of_fewer_rows_than_dimensions():
    features = np.random.default_rng(0).normal(size=(4, 10))
    assert np.isfinite(Mahalanobis(features)(features)).all()
