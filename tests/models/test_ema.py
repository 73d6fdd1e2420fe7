"""The moving average is a model of its own that follows another's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from rlhf_kit.models.critic import ValueHead, add_critic
from rlhf_kit.models.ema import MovingAverage
from rlhf_kit.models.scorer import Scorer, add_log_prob_head, rollout_outputs


def average_of(model: nn.Module, decay: float) -> MovingAverage:
    copied = copy.deepcopy(model).requires_grad_(False)
    return MovingAverage(Scorer(copied, list(copied.parameters())), list(model.parameters()), decay)


def test_the_average_is_the_weighted_sum_of_all_weights_so_far() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    average = average_of(model, 0.75)
    seen = []
    for value in (5.0, -3.0):
        nn.init.constant_(model.weight, value)
        average.update()
        seen.append(next(average.parameters()).item())
    assert seen == [0.75 * 1 + 0.25 * 5, 0.75 * 2 + 0.25 * -3]
    assert model.weight.item() == -3.0


def test_the_average_scores_with_its_own_weights(make_model, rollout) -> None:
    model = make_model()
    add_log_prob_head(model)
    average = average_of(model, 0.5)
    with torch.no_grad():
        before = rollout_outputs(model, rollout)[0]
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        assert torch.equal(average(rollout), before)
        assert not torch.equal(rollout_outputs(model, rollout)[0], before)


def test_a_critic_that_is_added_later_is_not_averaged(make_model) -> None:
    model = make_model()
    add_log_prob_head(model)
    average = average_of(model, 0.0)
    add_critic(model, ValueHead(16))
    nn.init.zeros_(model.lm_head.weight)
    average.update()
    assert (average.scorer.model.lm_head.weight == 0).all()
    assert not hasattr(average.scorer.model, "critic")
