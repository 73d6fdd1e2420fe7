"""Losses beside the policy's, summed over the live tokens (or rows) of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_kit.credit import kl_penalty
from rlhf_kit.credit.implicit import implicit_rewards, outcome_cross_entropy
from rlhf_kit.models.critic import ActorCriticOutput, values_of_completion
from rlhf_kit.trainers.rollouts import masked_by


def value_loss_of(
    output: ActorCriticOutput, batch: Mapping[str, Any], mask: Bool[Tensor, "B T"], clip: float | None
) -> Float[Tensor, ""]:
    """Clipped value loss, summed over the mask."""
    assert output.state_values is not None
    values = values_of_completion(output.state_values, mask.shape[1])
    return masked_by(mask, value_loss(values, batch["old_values"], batch["returns"], clip)).sum()


def kl_of(
    output: ActorCriticOutput, batch: Mapping[str, Any], mask: Bool[Tensor, "B T"], estimator: str
) -> Float[Tensor, ""]:
    """KL penalty from the reference, summed over the mask."""
    assert output.log_probs is not None
    log_probs = output.log_probs[:, -mask.shape[1] :].float()
    return masked_by(mask, kl_penalty(log_probs, batch["reference_logprobs"], estimator)).sum()


def joint_prm_loss_of(
    output: ActorCriticOutput, batch: Mapping[str, Any], mask: Bool[Tensor, "B T"], beta: float
) -> Float[Tensor, ""]:
    """The PRM's cross-entropy on outcome labels, summed over the rows that have a live token."""
    assert output.prm_log_probs is not None
    log_probs = output.prm_log_probs[:, -mask.shape[1] :]
    rewards = implicit_rewards(log_probs, batch["prm_reference"], mask, beta)
    rows = outcome_cross_entropy(rewards, batch["prm_labels"], batch["prm_offsets"])
    return masked_by(mask.any(dim=1), rows).sum()


def value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    clip: float | None,
) -> Float[Tensor, "B T"]:
    """`0.5 * max((V - R)^2, (clip(V, V_old +- clip) - R)^2)` (arXiv 1707.06347, Eq. 9; clipped as in its code)."""
    plain = (values - returns) ** 2
    if clip is None:
        return 0.5 * plain
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum(plain, (clipped - returns) ** 2)
