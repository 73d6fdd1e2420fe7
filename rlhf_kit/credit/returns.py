"""Returns and advantages by recursion over the action tokens of a row."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from rlhf_kit.credit.masks import zero_outside


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    gamma: float,
    lam: float,
    bootstrap: Float[Tensor, "B"] | None = None,
) -> tuple[Float32[Tensor, "B T"], Float32[Tensor, "B T"]]:
    """Generalised advantage estimates and the returns that the value function learns.

    `delta_t = r_t + gamma V_{t+1} - V_t`, `A_t = delta_t + gamma lam A_{t+1}`, `returns = A + V` (Schulman et
    al., arXiv 1506.02438, Eqs. 11 and 16), where t+1 is the next action token. Behind the last one V is
    `bootstrap` (a row cut off at the length limit), or 0 (a row that ended), and A is 0.
    """
    values = zero_outside(values, mask)
    delta = zero_outside(rewards, mask) + gamma * _next_values(values, mask, bootstrap) - values
    advantages = _discounted_sum(delta, mask, gamma * lam)
    return advantages, advantages + values


def reinforce_returns(rewards: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], gamma: float) -> Float32[Tensor, "B T"]:
    """Discounted reward-to-go, `G_t = r_t + gamma G_{t+1}`, where t+1 is the next action token.

    For gamma below 1 the sum of `G_t grad log pi_t` leaves out the factor `gamma^t` of the discounted
    objective's gradient, as is usual: late tokens count as much as early ones.
    """
    return _discounted_sum(rewards, mask, gamma)


def _discounted_sum(terms: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], discount: float) -> Float32[Tensor, "B T"]:
    """`S_t = terms_t + discount * S_{t+1}` over action tokens."""
    terms = zero_outside(terms, mask)
    sums = torch.zeros_like(terms)
    carry = terms.new_zeros(terms.shape[0])
    for t in reversed(range(terms.shape[1])):
        carry = torch.where(mask[:, t], terms[:, t] + discount * carry, carry)
        sums[:, t] = carry
    return zero_outside(sums, mask)


def _next_values(
    values: Float32[Tensor, "B T"], mask: Bool[Tensor, "B T"], bootstrap: Float[Tensor, "B"] | None
) -> Float32[Tensor, "B T"]:
    """The value of the next action token of each token; `bootstrap`, or 0, behind the last one."""
    rows, length = mask.shape
    behind = values.new_zeros(rows) if bootstrap is None else bootstrap.float()
    columns = torch.where(mask, torch.arange(length, device=mask.device), length)
    columns = torch.cat([columns, columns.new_full((rows, 1), length)], dim=1)
    at_or_after = columns.flip(1).cummin(dim=1).values.flip(1)
    return torch.cat([values, behind[:, None]], dim=1).gather(1, at_or_after[:, 1:])
