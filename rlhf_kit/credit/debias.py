"""Length debiasing of scores that rank completions (DICE, arXiv 2406.09760, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

BISECTIONS = 200  # halvings of the bracket: as fine as float64 is


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
    out, and so are groups with fewer than two that are left.
    """
    gap = _Gap(scores, lengths, groups)
    before = gap(0.0)
    if before == 0:
        return Debias(0.0, before, before)
    sign = 1.0 if before > 0 else -1.0  # what is too long is looked for at positive penalties, too short at negative
    near, far = 0.0, gap.bound()
    for _ in range(BISECTIONS):
        middle = (near + far) / 2
        if middle in (near, far):
            break
        near, far = (middle, far) if sign * gap(sign * middle) > 0 else (near, middle)
    best = min((far, near), key=lambda alpha: abs(gap(sign * alpha)))
    return Debias(sign * best, before, gap(sign * best))


class _Gap:
    """The mean difference of the lengths of the best and the worst of each group, as a function of alpha."""

    def __init__(self, scores: Sequence[float], lengths: Sequence[float], groups: Sequence[int]) -> None:
        rows: dict[int, list[tuple[float, float]]] = {}
        for score, length, group in zip(scores, lengths, groups, strict=True):
            if torch.isfinite(torch.tensor(score)):
                rows.setdefault(group, []).append((score, length))
        kept = [torch.tensor(group, dtype=torch.float64) for group in rows.values() if len(group) > 1]
        widest = max(map(len, kept), default=1)
        # Padding repeats the first row, which changes neither the best nor the worst.
        padded = [torch.cat([group, group[:1].expand(widest - len(group), 2)]) for group in kept]
        table = torch.stack(padded) if padded else torch.zeros(0, 1, 2, dtype=torch.float64)
        self._scores: Float64[Tensor, "G K"] = table[..., 0]
        self._lengths: Float64[Tensor, "G K"] = table[..., 1]

    def __call__(self, alpha: float) -> float:
        if len(self._scores) == 0:
            return 0.0
        debiased = self._scores - alpha * self._lengths
        return (self._at(debiased.argmax(dim=1)) - self._at(debiased.argmin(dim=1))).mean().item()

    def _at(self, index: Int64[Tensor, "G"]) -> Float64[Tensor, "G"]:
        return self._lengths.gather(1, index[:, None]).squeeze(1)

    def bound(self) -> float:
        """A penalty beyond which the shortest is best and the longest worst, in every group."""
        spread = self._scores.amax(dim=1) - self._scores.amin(dim=1)
        differences = (self._lengths[:, :, None] - self._lengths[:, None, :]).abs()
        least = differences.where(differences > 0, torch.inf).amin(dim=(1, 2))
        return 2 * (spread / least).max().item() + 1.0
