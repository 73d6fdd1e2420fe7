"""Length debiasing of scores that rank completions (DICE, arXiv 2406.09760, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

import torch
from jaxtyping import Bool, Float64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

RESOLUTION = 2.0**-48  # of a score: what is left of float64 where equal scores must come apart
NO_GAP = 1e-9  # of a mean of lengths: less is rounding


@dataclass(frozen=True)
class Debias:
    """A length penalty, and how much longer chosen completions still are than rejected ones on average.

    Attributes:
        alpha: `s - alpha * length` is the debiased score; 0 where there is nothing to debias.
        gap_before: the mean difference of lengths at a penalty of 0.
        gap: the same at `alpha`. It is not exactly 0 where it jumps across 0 there.
    """

    alpha: float
    gap_before: float
    gap: float


def length_debias(scores: Sequence[float], lengths: Sequence[float], groups: Sequence[int]) -> Debias:
    """The alpha nearest to 0 at which the best of a group, by `s - alpha * length`, is as long as the worst on average.

    The mean gap of lengths is a step function of alpha that never rises: let a be the best at alpha and b at
    alpha' > alpha. Then `s_a - alpha l_a >= s_b - alpha l_b` and `s_b - alpha' l_b >= s_a - alpha' l_a`, whose sum is
    `(alpha' - alpha)(l_a - l_b) >= 0`: the best does not get longer, and by the same argument the worst not shorter. So
    bisection finds where the gap crosses 0 (the paper searches a grid). Where it jumps across, the side with the
    smaller gap is taken. Scores of one prompt share a number in `groups`; those that are not finite (failed) are left
    out, and so are groups with fewer than two that are left. Of the best (worst) that are equal the mean length counts.
    """
    gap = _Gap(scores, lengths, groups)
    before = gap(0.0)
    if before == 0:
        return Debias(0.0, before, before)
    sign = 1.0 if before > 0 else -1.0  # what is too long is looked for at positive penalties, too short at negative
    near, far, resolution = 0.0, gap.bound(), gap.resolution()
    while far - near > resolution:
        middle = (near + far) / 2
        near, far = (middle, far) if sign * gap(sign * middle) > 0 else (near, middle)
    best = min((near, far), key=lambda alpha: abs(gap(sign * alpha)))
    return Debias(sign * best + 0.0, before, gap(sign * best))  # -0.0 is no penalty either


class _Gap:
    """The mean difference of the lengths of the best and the worst of each group, as a function of alpha."""

    def __init__(self, scores: Sequence[float], lengths: Sequence[float], groups: Sequence[int]) -> None:
        rows: dict[int, list[tuple[float, float]]] = {}
        for score, length, group in zip(scores, lengths, groups, strict=True):
            if torch.isfinite(torch.tensor(score)):
                rows.setdefault(group, []).append((score, length))
        kept = [torch.tensor(group, dtype=torch.float64) for group in rows.values() if len(group) > 1]
        table = pad_sequence(kept, batch_first=True, padding_value=torch.nan) if kept else torch.zeros(0, 1, 2)
        self._scores: Float64[Tensor, "G K"] = table[..., 0].double()
        self._lengths: Float64[Tensor, "G K"] = table[..., 1].double()

    def __call__(self, alpha: float) -> float:
        if len(self._scores) == 0:
            return 0.0
        debiased = self._scores - alpha * self._lengths
        best = debiased.nan_to_num(nan=-torch.inf).amax(dim=1, keepdim=True)
        worst = debiased.nan_to_num(nan=torch.inf).amin(dim=1, keepdim=True)
        differences = self._mean_length(debiased == best) - self._mean_length(debiased == worst)
        gap = fsum(differences.tolist()) / len(differences)  # the same in whatever order
        return gap if abs(gap) > NO_GAP else 0.0

    def _mean_length(self, of: Bool[Tensor, "G K"]) -> Float64[Tensor, "G"]:
        return self._lengths.where(of, 0.0).sum(dim=1) / of.sum(dim=1)

    def bound(self) -> float:
        """A penalty beyond which the shortest is best and the longest worst, in every group."""
        known = self._scores.isfinite()
        highest = self._scores.where(known, -torch.inf).amax(dim=1)
        spread = highest - self._scores.where(known, torch.inf).amin(dim=1)
        return 2 * (spread / self._least()).max().item() + 1.0

    def resolution(self) -> float:
        """The smallest difference of penalties that parts equal scores of different lengths."""
        return RESOLUTION * self._scores.nan_to_num(nan=0.0).abs().max().item() / self._least().min().item()

    def _least(self) -> Float64[Tensor, "G"]:
        """The smallest difference of two lengths of a group that is not 0."""
        differences = (self._lengths[:, :, None] - self._lengths[:, None, :]).abs()
        return differences.where(differences > 0, torch.inf).amin(dim=(1, 2))
