"""A completion's score as the sum of its segments' rewards (return decomposition), with an optional local signal.

`rewards` (B, S) are those of the segments of each row, `present` (B, S) which of them there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from rlhf_kit.credit.masks import masked_mean
from rlhf_kit.rollout import CharRange


def sampled_sum(
    rewards: Float[Tensor, "B S"], present: Bool[Tensor, "B S"], sampled: Bool[Tensor, "B S"] | None = None
) -> Float32[Tensor, "B"]:
    """`(L / K) * sum over the K sampled segments of r`, an estimate of the sum over all L that are present.

    Where the K are drawn uniformly without replacement, its expectation is that sum (arXiv 2111.13485, section 3).
    Without `sampled` it is the sum itself. A row without segments sums to 0.
    """
    chosen = present if sampled is None else present & sampled
    return masked_mean(rewards, chosen, dim=1) * present.sum(dim=1)


def decomposition_loss(
    rewards: Float[Tensor, "B S"],
    present: Bool[Tensor, "B S"],
    scores: Float[Tensor, "B"],
    sampled: Bool[Tensor, "B S"] | None = None,
) -> Float32[Tensor, "B"]:
    """`((L / K) * sum_sampled r - score)^2` (GELI, arXiv 2403.11330; randomised by arXiv 2111.13485).

    Its expectation over samples is the squared error of the whole sum plus the variance of the estimate, so that of all
    rewards with the same sum it prefers those that are alike. With all segments (K = L) nothing tells such rewards
    apart: the last segment may be given everything. A row without segments has nothing to learn, and a loss of 0.
    """
    errors = (sampled_sum(rewards, present, sampled) - scores).square()
    return torch.where(present.any(dim=1), errors, 0.0)


def local_loss(
    rewards: Float[Tensor, "B S"], local: Float[Tensor, "B S"], present: Bool[Tensor, "B S"]
) -> Float32[Tensor, "B"]:
    """`mean_k (r_k - local_k)^2` over the segments with a local signal (GELI, arXiv 2403.11330); NaN is none.

    0 for a row without any.
    """
    known = present & ~local.isnan()
    return masked_mean((rewards - torch.where(known, local, 0.0)).square(), known, dim=1)


def segment_ends(
    segments: Sequence[Sequence[CharRange]],
    offsets: Sequence[Sequence[CharRange]],
    action_mask: Bool[Tensor, "B T"],
) -> Int64[Tensor, "B S"]:
    """The last action token that overlaps each segment (where `spread_spans` puts its reward).

    -1 for a segment that has none, such as a tool's answer, and behind a row's last segment.
    """
    width = max(map(len, segments), default=0)
    ends = torch.full((len(action_mask), width), -1, dtype=torch.int64, device=action_mask.device)
    columns = torch.arange(action_mask.shape[1], device=action_mask.device)
    for row, parts in enumerate(segments):
        if not parts or not offsets[row]:
            continue
        bounds = torch.tensor(parts, device=ends.device)
        ranges = torch.tensor(offsets[row], device=ends.device)
        mask = action_mask[row, : len(ranges)]
        overlaps = torch.maximum(bounds[:, :1], ranges[:, 0]) < torch.minimum(bounds[:, 1:], ranges[:, 1])
        ends[row, : len(parts)] = torch.where(overlaps & mask, columns[: len(ranges)], -1).amax(dim=1)
    return ends


def adjoining(segments: Sequence[CharRange], length: int) -> list[CharRange]:
    """Segments of a text of `length` characters made to cover it: what stands between two belongs to the first."""
    cuts = [0, *(start for start, _ in segments[1:]), length] if length else []
    return list(pairwise(cuts))
