"""Losses of implicit process reward models (arXiv 2412.01981), whose reward is `R = beta * sum_t log(pi / pi_ref)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveFloat

from rlhf_kit.objectives.base import PAIR, SINGLE, Loss, Need, Objective, Rows

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Ce(Objective):
    """Binary cross-entropy, with logits, of `R + offset` against the label, 0 or 1 (section 4)."""

    roles: ClassVar = SINGLE
    numbers: ClassVar = {"label": None, "offset": 0.0}

    type: Literal["ce"]
    beta: PositiveFloat = 0.05

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference"})

    def loss(self, rows: Rows) -> Loss:
        from torch.nn.functional import binary_cross_entropy_with_logits

        reward = self.beta * rows["completion"].log_ratios
        logits, labels = reward + rows.columns["offset"], rows.columns["label"]
        return Loss(
            binary_cross_entropy_with_logits(logits, labels, reduction="none"), {"rewards/implicit": reward.detach()}
        )


class Nca(Objective):
    """`-logsigmoid(R_w) - 0.5 logsigmoid(-R_w) - 0.5 logsigmoid(-R_l)` (NCA for pairs, arXiv 2402.05369)."""

    roles: ClassVar = PAIR

    type: Literal["nca"]
    beta: PositiveFloat = 0.05

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference"})

    def loss(self, rows: Rows) -> Loss:
        from torch.nn.functional import logsigmoid

        chosen, rejected = (self.beta * rows[role].log_ratios for role in ("chosen", "rejected"))
        return Loss(-logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected))

    def ranking(self, rows: Rows) -> Float[Tensor, "B"]:
        return rows["chosen"].log_ratios - rows["rejected"].log_ratios
