"""Cringe (arXiv 2211.05826) and pairwise Cringe (arXiv 2312.16682): a contrast for every token that is not wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from rlhf_kit.objectives.base import PAIR, SINGLE, Loss, Need, Objective, Rows, Scored

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Cringe(Objective):
    """`-log pi(y)` where the label is 1, `alpha` times the Cringe loss where it is 0; both are means over tokens."""

    roles: ClassVar = SINGLE
    numbers: ClassVar = {"label": None}

    type: Literal["cringe"]
    alpha: NonNegativeFloat = 1.0
    top_k: PositiveInt = 5

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"contrast"})

    @property
    def contrasts(self) -> int:
        return self.top_k

    def loss(self, rows: Rows) -> Loss:
        import torch

        scored, right = rows["completion"], rows.columns["label"] >= 0.5
        return Loss(torch.where(right, -scored.means, self.alpha * cringe(scored)))


class PairwiseCringe(Objective):
    """`g * (CE(y_w) + alpha * Cringe(y_l))`, `g = sigmoid((margin - M) / tau)`, `M = log pi(y_w) - log pi(y_l)`.

    The gate g (Eq. 4, read in a summary of the paper) closes on pairs that are well apart already. It is a weight: no
    gradient flows through it.
    """

    roles: ClassVar = PAIR

    type: Literal["pairwise_cringe"]
    alpha: NonNegativeFloat = 1.0
    margin: float = 0.0
    tau: PositiveFloat = 1.0
    top_k: PositiveInt = 5

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"contrast"})

    @property
    def contrasts(self) -> int:
        return self.top_k

    def loss(self, rows: Rows) -> Loss:
        chosen, rejected = rows["chosen"], rows["rejected"]
        gate = ((self.margin - (chosen.sums - rejected.sums).detach()) / self.tau).sigmoid()
        return Loss(gate * (-chosen.means + self.alpha * cringe(rejected)), {"gate": gate})

    def ranking(self, rows: Rows) -> Float[Tensor, "B"]:
        return rows["chosen"].sums - rows["rejected"].sums


def cringe(scored: Scored) -> Float[Tensor, "B"]:
    """Mean over tokens of `-log( e^{s*} / (e^{s*} + e^{s}) )`.

    s is the logit of the token that is not wanted, s* that of one drawn from the likeliest others. Their difference is
    that of log-probabilities.
    """
    import torch
    from torch.nn.functional import softplus

    assert scored.contrast is not None
    tokens = torch.where(scored.mask, softplus(scored.log_probs - scored.contrast), 0.0)
    return tokens.sum(dim=1) / scored.mask.sum(dim=1).clamp(min=1)
