"""Baselines from the other completions of the same prompt.

The rows of a group are adjacent. A row that is not `valid` (its scoring failed) gets 0 and is nobody's
baseline.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from rlhf_kit.credit.masks import masked_mean, masked_var, place_on_actions, zero_outside

_SCALES = ("none", "group", "batch")
_HORIZONS = ("return_to_go", "immediate")


def rloo(scores: Float[Tensor, "B"], group_size: int, valid: Bool[Tensor, "B"] | None = None) -> Float32[Tensor, "B"]:
    """Score minus the mean of the other valid rows of its group, `s_i - mean_{j != i} s_j`.

    REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al., arXiv 2402.14740, section 3.2). The baseline
    does not depend on the row's own sample, so the policy gradient stays unbiased. A row with no other valid
    row gets 0.

    Raises:
        ValueError: if the rows are no whole number of groups.
    """
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    baseline, usable = _mean_of_others(scores, group_size, valid)
    return zero_outside(scores.float() - baseline, usable)


def group_centred(
    scores: Float[Tensor, "B"],
    group_size: int,
    scale: str = "none",
    valid: Bool[Tensor, "B"] | None = None,
    eps: float = 1e-4,
) -> Float32[Tensor, "B"]:
    """Score minus the mean of its group's valid rows, itself included (GRPO, arXiv 2402.03300, section 4.1).

    With `scale`, divided by `std + eps`, the unbiased standard deviation of the group's (`group`) or of all
    (`batch`) valid scores given, as TRL has it; that of fewer than two scores is 0. Unscaled, the policy
    gradient of K rows is `(K - 1) / K` times the true one, because a row's own score is in its baseline; with
    `group`, prompts whose scores differ little weigh more than in the true one.

    Raises:
        ValueError: if `scale` is unknown, or the rows are no whole number of groups.
    """
    if scale not in _SCALES:
        raise ValueError(f"scale {scale!r} is unknown; choose one of {', '.join(_SCALES)}")
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    grouped, in_group = _by_group(scores, group_size), _by_group(valid, group_size)
    centred = zero_outside(grouped.float() - masked_mean(grouped, in_group, dim=1)[:, None], in_group)
    if scale == "group":
        centred = centred / (masked_var(grouped, in_group, dim=1, unbiased=True).sqrt()[:, None] + eps)
    elif scale == "batch":
        centred = centred / (masked_var(scores, valid, unbiased=True).sqrt() + eps)
    return centred.flatten()


def prime_advantages(
    token_rewards: Float[Tensor, "B T"],
    outcomes: Float[Tensor, "B"],
    mask: Bool[Tensor, "B T"],
    group_size: int,
    valid: Bool[Tensor, "B"] | None = None,
    horizon: str = "return_to_go",
) -> Float32[Tensor, "B T"]:
    """Advantages from process rewards and outcomes, before whitening (PRIME, arXiv 2502.01456, Eq. 5).

    `A_t = sum_{s >= t} m_s [r_s - mean_{j != i} rbar_j] + (o_i - mean_{j != i} o_j)`, with `rbar_j` the mean
    token reward of completion j: the sum of `prime_process_advantages` and of `rloo` on every action token.
    The two read the group's rows alike, except that a completion without action tokens has an outcome but no
    mean token reward.

    Raises:
        ValueError: if `horizon` is unknown, or the rows are no whole number of groups.
    """
    process = prime_process_advantages(token_rewards, mask, group_size, valid, horizon)
    return process + place_on_actions(rloo(outcomes, group_size, valid), mask)


def prime_process_advantages(
    token_rewards: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    group_size: int,
    valid: Bool[Tensor, "B"] | None = None,
    horizon: str = "return_to_go",
) -> Float32[Tensor, "B T"]:
    """The process rewards' part of `prime_advantages`.

    `return_to_go` credits a reward to its own and every earlier token, `sum_{s >= t} m_s [r_s - mean_{j != i}
    rbar_j]` (Eq. 5). The baseline is taken off once per token to come, so its policy gradient is that of
    `E[sum_t r_t] - b E[length]` at fixed `b = E[rbar]`: true for completions of one length, otherwise also a
    reward of -b for each token.

    `immediate` credits a reward to its own token alone, `m_t [r_t - mean_{j != i} rbar_j]`. Its policy
    gradient is that of `sum_states d(state) E_{a ~ pi}[r(state, a)]` at a fixed distribution d of visited
    states; for `r = log phi - log pi` that is minus the KL divergence from phi, state by state.

    Raises:
        ValueError: if `horizon` is unknown, or the rows are no whole number of groups.
    """
    if horizon not in _HORIZONS:
        raise ValueError(f"horizon {horizon!r} is unknown; choose one of {', '.join(_HORIZONS)}")
    acted = mask.any(dim=1)
    baseline, usable = _mean_of_others(
        masked_mean(token_rewards, mask, dim=1), group_size, acted if valid is None else acted & valid
    )
    mask = mask & usable[:, None]
    centred = zero_outside(token_rewards.float() - baseline[:, None], mask)
    if horizon == "immediate":
        return centred
    return zero_outside(centred.flip(1).cumsum(dim=1).flip(1), mask)


def _mean_of_others(
    scores: Float[Tensor, "B"], group_size: int, valid: Bool[Tensor, "B"]
) -> tuple[Float32[Tensor, "B"], Bool[Tensor, "B"]]:
    """Mean over the other valid rows of a row's group, and whether the row is valid and has such a mean."""
    grouped, in_group = _by_group(zero_outside(scores, valid), group_size), _by_group(valid, group_size)
    others = in_group.sum(dim=1, keepdim=True) - in_group.long()
    mean = (grouped.sum(dim=1, keepdim=True) - grouped) / others.clamp(min=1)
    return mean.flatten(), (in_group & (others > 0)).flatten()


def _by_group(rows: Tensor, group_size: int) -> Tensor:
    if group_size < 1 or rows.shape[0] % group_size:
        raise ValueError(
            f"{rows.shape[0]} rows are no whole number of groups of {group_size}; "
            "give every prompt's completions together, as many for each"
        )
    return rows.view(-1, group_size)
