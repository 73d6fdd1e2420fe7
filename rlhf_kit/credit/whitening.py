"""Standardisation over action tokens, of one process or of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from rlhf_kit.credit.masks import zero_outside


def whiten(
    values: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    shift_mean: bool = True,
    distributed: bool = False,
    eps: float = 1e-8,
) -> Float32[Tensor, "*shape"]:
    """`values` with mean 0 and variance 1 over `mask`.

    `(x - mean) / sqrt(var + eps)` with the population variance. Without `shift_mean` the mean is added back,
    so only the spread changes. With `distributed`, mean and variance are those of all ranks of the default
    process group, of whatever shapes; every rank must call. Without a process group this process is the only
    rank.
    """
    over_ranks = distributed and dist.is_available() and dist.is_initialized()
    values = zero_outside(values, mask)
    count, total = _sums(mask.sum(), values.sum(), over_ranks=over_ranks)
    count = count.clamp(min=1)
    mean = total / count
    centred = zero_outside(values - mean, mask)
    # The corrected two-pass algorithm: `drift` is the rounding error of the mean, without which equal large
    # values would show a variance that is not there.
    drift, square = _sums(centred.sum(), centred.square().sum(), over_ranks=over_ranks) / count
    variance = (square - drift.square()).clamp(min=0)
    whitened = (centred - drift) * torch.rsqrt(variance + eps)
    if not shift_mean:
        whitened = whitened + mean + drift
    return zero_outside(whitened, mask)


def _sums(*local: Tensor, over_ranks: bool) -> Float32[Tensor, "..."]:
    sums = torch.stack([value.float() for value in local])
    if over_ranks:
        dist.all_reduce(sums)
    return sums
