"""Masked statistics, and values per row placed on action tokens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor


def zero_outside(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """`values` in float32 where `mask` is True, and 0 elsewhere."""
    # A product would let NaN and inf through: 0 * inf is NaN.
    return torch.where(mask, values.float(), 0.0)


def masked_mean(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None
) -> Float32[Tensor, "..."]:
    """Mean of `values` over `mask`, of everything or along `dim`; 0 where the mask is empty."""
    return zero_outside(values, mask).sum(dim) / mask.sum(dim).clamp(min=1)


def masked_var(
    values: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    dim: int | None = None,
    unbiased: bool = False,
) -> Float32[Tensor, "..."]:
    """Variance of `values` over `mask`, of everything or along `dim`.

    `sum_t m_t (x_t - mean)^2 / n` with n the number of True entries, or n - 1 if `unbiased`; 0 where the
    divisor would not be positive.
    """
    mean = masked_mean(values, mask, dim)
    centred = zero_outside(values.float() - (mean if dim is None else mean.unsqueeze(dim)), mask)
    return centred.square().sum(dim) / (mask.sum(dim) - int(unbiased)).clamp(min=1)


def last_action_index(mask: Bool[Tensor, "B T"]) -> Int64[Tensor, "B"]:
    """Column of each row's last action token; -1 for a row that has none."""
    rows, length = mask.shape
    columns = torch.where(mask, torch.arange(length, device=mask.device), -1)
    return torch.cat([columns.new_full((rows, 1), -1), columns], dim=1).amax(dim=1)


def place_at_last(scores: Float[Tensor, "B"], mask: Bool[Tensor, "B T"]) -> Float32[Tensor, "B T"]:
    """Each row's score on its last action token; a row without action tokens gets nothing."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(columns == last_action_index(mask)[:, None], scores.float()[:, None], 0.0)


def place_on_actions(scores: Float[Tensor, "B"], mask: Bool[Tensor, "B T"]) -> Float32[Tensor, "B T"]:
    """Each row's score on every one of its action tokens."""
    return torch.where(mask, scores.float()[:, None], 0.0)
