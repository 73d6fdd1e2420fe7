"""Rewards per step of a completion, and min-form credit.

`step_ids` (B, T) number the steps of each row from 0; -1 marks tokens outside every step (not action tokens).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from rlhf_kit.credit.masks import zero_outside


def sum_by_step(
    token_rewards: Float[Tensor, "B T"], step_ids: Int[Tensor, "B T"], num_steps: int
) -> Float32[Tensor, "B {num_steps}"]:
    """Sum of the token rewards of each step; 0 for a step without tokens.

    Raises:
        ValueError: if a step id is not below `num_steps`, or below -1.
    """
    _check_steps(step_ids, num_steps)
    sums = torch.zeros(step_ids.shape[0], num_steps + 1, device=token_rewards.device)
    # Tokens outside every step add zeros to a column 0, which is then dropped.
    return sums.scatter_add(1, step_ids.long() + 1, zero_outside(token_rewards, step_ids >= 0))[:, 1:]


def steps_present(step_ids: Int[Tensor, "B T"], num_steps: int) -> Bool[Tensor, "B {num_steps}"]:
    """Which steps have a token: the mask of `sum_by_step`'s sums."""
    return sum_by_step(torch.ones_like(step_ids, dtype=torch.float32), step_ids, num_steps) > 0


def spread_to_tokens(step_values: Float[Tensor, "B K"], step_ids: Int[Tensor, "B T"]) -> Float32[Tensor, "B T"]:
    """Each step's value on every one of its tokens; 0 outside every step.

    Raises:
        ValueError: if a step id is not below K, or below -1.
    """
    _check_steps(step_ids, step_values.shape[1])
    outside = step_values.new_zeros(step_values.shape[0], 1)
    return torch.cat([outside, step_values], dim=1).float().gather(1, step_ids.long() + 1)


def place_at_step_ends(step_values: Float[Tensor, "B K"], step_ids: Int[Tensor, "B T"]) -> Float32[Tensor, "B T"]:
    """Each step's value on the last of its tokens; 0 elsewhere, and a step without tokens has none.

    Raises:
        ValueError: if a step id is not below K, or below -1.
    """
    _check_steps(step_ids, step_values.shape[1])
    rows, width = step_ids.shape
    places = torch.arange(width, device=step_ids.device).expand(rows, width)
    last = torch.full((rows, step_values.shape[1] + 1), -1, device=step_ids.device)
    last = last.scatter_reduce(1, step_ids.long() + 1, places, "amax")[:, 1:]
    placed = torch.zeros(rows, width, device=step_values.device)
    return placed.scatter_add(1, last.clamp(min=0), torch.where(last >= 0, step_values.float(), 0.0))


def min_form_returns(step_rewards: Float[Tensor, "B K"], step_mask: Bool[Tensor, "B K"]) -> Float32[Tensor, "B K"]:
    """Return of a step: the least reward among it and the steps after it, `G_k = min_{j >= k} r_j`.

    Min-form credit (PURE, arXiv 2504.15275): no step gains by what is good elsewhere, and the return cannot
    grow with the number of steps. The paper reaches it by weighting rewards with a softmax of `-r /
    temperature` inside the summed return; in the limit of temperature 0 that gives steps behind the worst one
    0, whereas here they keep the least reward among the steps that they can still influence. Its bias: the first step
    follows the gradient of the expected least reward of all, a later one also where an earlier step was worse already.
    """
    rewards = torch.where(step_mask, step_rewards.float(), torch.inf)
    return zero_outside(rewards.flip(1).cummin(dim=1).values.flip(1), step_mask)


def _check_steps(step_ids: Int[Tensor, "B T"], num_steps: int) -> None:
    if step_ids.numel() == 0:
        return
    low, high = int(step_ids.min()), int(step_ids.max())
    if low < -1 or high >= num_steps:
        raise ValueError(
            f"step ids from {low} to {high} do not fit {num_steps} steps; count steps from 0, -1 is outside"
        )
