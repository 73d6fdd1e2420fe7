"""Contrastive unlikelihood training on judgments (CUT, arXiv 2312.14591)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat

from rlhf_kit.objectives.base import Loss, Objective, Rows, Scored

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

CERTAIN = 1 - 1e-6  # where log(1 - p) ends


class Cut(Objective):
    """`0.5 * (NLL(y | x, j) + U)`: learn what a judgment explains, and unlearn the tokens that it makes likelier.

    `prompt` is x, `judged_prompt` x with the judgment j of the completion. Where `p(y_t | x, j) / p(y_t | x)` exceeds
    `threshold`, U is `-weight * log(1 - p(y_t | x))`, elsewhere `-log p(y_t | x)`. A row of label 1 has a judgment that
    finds nothing wrong: U is its likelihood throughout. `weight` is the row's own where the data have the column. No
    gradient flows through the ratio; both parts are means over tokens.
    """

    roles: ClassVar = {"plain": ("prompt", "completion"), "judged": ("judged_prompt", "completion")}
    numbers: ClassVar = {"label": 0.0, "weight": 1.0}

    type: Literal["cut"]
    threshold: PositiveFloat = 1.1
    weight: NonNegativeFloat = 1.0

    def loss(self, rows: Rows) -> Loss:
        import torch

        plain, judged = rows["plain"], rows["judged"]
        bad = inappropriate(plain, judged, self.threshold) & (rows.columns["label"] < 0.5)[:, None]
        probability = plain.log_probs.exp().clamp(max=CERTAIN)
        weight = self.weight * rows.columns["weight"][:, None]
        unlikelihood = torch.where(bad, -weight * torch.log1p(-probability), -plain.log_probs)
        count = plain.mask.sum(dim=1).clamp(min=1)
        unlearnt = torch.where(plain.mask, unlikelihood, 0.0).sum(dim=1) / count
        return Loss(0.5 * (-judged.means + unlearnt), {"inappropriate": bad.sum(dim=1) / count})


def inappropriate(plain: Scored, judged: Scored, threshold: float) -> Bool[Tensor, "B T"]:
    """Tokens that the judgment makes more than `threshold` times as likely."""
    ratio: Float[Tensor, "B T"] = (judged.log_probs - plain.log_probs).detach().exp()
    return plain.mask & (ratio > threshold)
