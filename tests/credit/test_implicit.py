"""Implicit rewards and their loss, against rows worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_kit.credit.implicit import implicit_rewards, log_odds, outcome_cross_entropy


def test_rewards_are_beta_times_the_log_ratio_inside_the_mask() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, math.nan, -math.inf]])
    reference = torch.tensor([[-2.0, -2.0, -1.0], [-1.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rewards = implicit_rewards(log_probs, reference, mask, beta=0.5)
    assert rewards.tolist() == [[0.5, 0.0, 0.0], [-1.0, 0.0, 0.0]]


def test_rewards_are_float32_for_log_probs_in_bfloat16() -> None:
    one = torch.tensor([[-1.0]], dtype=torch.bfloat16)
    rewards = implicit_rewards(one, torch.tensor([[-1.001]]), torch.tensor([[True]]), beta=1.0)
    assert rewards.dtype == torch.float32
    assert rewards.item() == pytest.approx(0.001, rel=1e-3)


def test_equal_models_are_rewarded_with_exactly_0() -> None:
    log_probs = torch.randn(4, 7)
    mask = torch.rand(4, 7) > 0.3
    assert (implicit_rewards(log_probs, log_probs.clone(), mask, beta=0.3) == 0).all()


def test_the_loss_by_hand() -> None:
    # R = 1.5 right, R = -0.5 wrong, R = 0 with a label of 1/4
    rewards = torch.tensor([[1.0, 0.5], [-0.75, 0.25], [2.0, -2.0]])
    labels = torch.tensor([1.0, 0.0, 0.25])
    expected = [math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(-0.5)), math.log(2)]
    torch.testing.assert_close(outcome_cross_entropy(rewards, labels), torch.tensor(expected))


@pytest.mark.parametrize("score", [-1000.0, -20.0, 0.0, 20.0, 1000.0])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_the_gradient_never_vanishes_on_a_wrong_row(score, label) -> None:
    """dL/dR = sigmoid(R) - label; the cross-entropy of sigmoid(R) would have none once the sigmoid is 0 or 1."""
    rewards = torch.tensor([[score - 3.0, 3.0]], requires_grad=True)
    loss = outcome_cross_entropy(rewards, torch.tensor([label]))
    loss.sum().backward()
    expected = 1 / (1 + math.exp(-score)) - label if score > -700 else -label
    assert rewards.grad.tolist() == [[pytest.approx(expected, abs=1e-6)] * 2]
    assert math.isfinite(loss.item())
    if (score > 0) != (label > 0.5) and abs(score) > 1:
        assert abs(rewards.grad[0, 0].item()) > 0.99


def test_the_offset_is_the_log_odds_before_anything_is_read() -> None:
    """With rewards of 0 the predicted rate is the offset's, so the rewards have to explain only the rest."""
    rate = torch.tensor([0.25, 0.25, 0.9])
    rewards = torch.zeros(3, 2, requires_grad=True)
    loss = outcome_cross_entropy(rewards, torch.tensor([0.0, 1.0, 1.0]), log_odds(rate))
    torch.testing.assert_close(loss.detach(), -torch.log(torch.tensor([0.75, 0.25, 0.9])))
    loss.sum().backward()
    torch.testing.assert_close(rewards.grad[:, 0], torch.tensor([0.25, -0.75, -0.1]))


def test_log_odds_by_hand_and_clamped() -> None:
    rates = torch.tensor([0.5, 0.75, 0.0, 1.0, 0.01])
    expected = [0.0, math.log(3), math.log(0.02 / 0.98), math.log(0.98 / 0.02), math.log(0.02 / 0.98)]
    torch.testing.assert_close(log_odds(rates), torch.tensor(expected))
    assert log_odds(torch.tensor(0.1), floor=0.2).item() == pytest.approx(math.log(0.25))
