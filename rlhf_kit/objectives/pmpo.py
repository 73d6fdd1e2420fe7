"""Preference optimisation from positives, negatives or both (PMPO, arXiv 2410.04166)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat

from rlhf_kit.objectives.base import SINGLE, Loss, Need, Objective, Rows
from rlhf_kit.problems import Problem


class Pmpo(Objective):
    """Minimises `-alpha E_pos log pi + (1 - alpha) E_neg log pi + beta * KL(pi_ref || pi)`.

    Rows are positives (label 1) and negatives (label 0); either may be missing. The KL is that of the whole next-token
    distribution, summed over the completion's tokens: without it negatives push probability anywhere, so that beta is 0
    only where alpha is 1. Expectations are over all rows, so that a label weighs by its frequency too.
    """

    roles: ClassVar = SINGLE
    numbers: ClassVar = {"label": None}

    type: Literal["pmpo"]
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    beta: NonNegativeFloat = 0.5

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"kl"})

    def problems(self) -> Iterator[Problem]:
        if self.beta == 0 and self.alpha < 1:
            what = "leaves out the KL that keeps negatives from pushing probability anywhere"
            yield Problem("beta", what, self.beta, "write more, or alpha: 1, which learns from positives alone")

    def loss(self, rows: Rows) -> Loss:
        import torch

        scored, right = rows["completion"], rows.columns["label"] >= 0.5
        assert scored.kl is not None
        kl = scored.kl.sum(dim=1)
        gain = torch.where(right, self.alpha * scored.sums, -(1 - self.alpha) * scored.sums)
        return Loss(self.beta * kl - gain, {"kl": kl.detach()})
