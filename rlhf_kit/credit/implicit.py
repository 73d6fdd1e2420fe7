"""The mathematics of implicit process rewards (arXiv 2412.01981)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def implicit_rewards(
    log_probs: Float[Tensor, "B T"],
    ref_log_probs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    beta: float,
) -> Float[Tensor, "B T"]:
    """Token rewards `r_t = beta * (log phi(y_t) - log ref(y_t))`, 0 outside the mask (arXiv 2412.01981, Eq. 3)."""
    return torch.where(mask, beta * (log_probs.float() - ref_log_probs.float()), 0.0)


def outcome_cross_entropy(
    rewards: Float[Tensor, "B T"],
    labels: Float[Tensor, "B"],
    offset: Float[Tensor, "B"] | float = 0.0,
) -> Float[Tensor, "B"]:
    """Binary cross-entropy, with logits, of `sum_t r_t + offset` against outcome labels in [0, 1].

    arXiv 2412.01981, Eq. 5. The offset is a departure: the log-odds of success before anything is read. Without it
    the PRM must give ordinary samples `logit(success rate)`, and moves probability to what was never sampled.
    """
    logits = rewards.sum(dim=1) + offset
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def log_odds(rate: Float[Tensor, "..."], floor: float = 0.02) -> Float[Tensor, "..."]:
    """`log(p / (1 - p))` with p kept in [floor, 1 - floor]."""
    clamped = rate.clamp(floor, 1 - floor)
    return torch.log(clamped) - torch.log1p(-clamped)
