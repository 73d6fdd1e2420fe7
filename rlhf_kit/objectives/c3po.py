"""Verbal feedback kept to where it belongs (C3PO; RLVF, arXiv 2402.10893)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat

from rlhf_kit.objectives.base import PAIR, Loss, Need, Objective, Rows

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

IN_SCOPE, NEAR_SCOPE, OUT_OF_SCOPE = 0.0, 1.0, 2.0


class C3po(Objective):
    """DPO on prompts that the feedback is about; likelihood of the original model's answers on the others.

    The number `scope` is 0 in scope (`chosen` follows the feedback, `rejected` is the original answer), 1 near it and 2
    out of it; there `chosen` is the original answer, and `rejected`, which every row has, plays no part: any text does.
    The likelihood is the mean over tokens, weighted by `near` and `out`.
    """

    roles: ClassVar = PAIR
    numbers: ClassVar = {"scope": None}

    type: Literal["c3po"]
    beta: PositiveFloat = 0.1
    near: NonNegativeFloat = 0.1
    out: NonNegativeFloat = 0.2

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference"})

    def row_problem(self, row: Mapping[str, Any]) -> str | None:
        found = super().row_problem(row)
        if found is None and float(row["scope"]) not in (IN_SCOPE, NEAR_SCOPE, OUT_OF_SCOPE):
            found = f"'scope' is {row['scope']!r}, and neither 0 (in scope) nor 1 (near it) nor 2 (out of it)"
        return found

    def loss(self, rows: Rows) -> Loss:
        import torch
        from torch.nn.functional import logsigmoid

        scope = rows.columns["scope"]
        weight = torch.where(scope == NEAR_SCOPE, self.near, self.out)
        kept = -weight * rows["chosen"].means
        return Loss(torch.where(scope == IN_SCOPE, -logsigmoid(self.beta * self._margin(rows)), kept))

    def ranking(self, rows: Rows) -> Float[Tensor, "B"]:
        import torch

        return torch.where(rows.columns["scope"] == IN_SCOPE, self._margin(rows), torch.nan)

    @staticmethod
    def _margin(rows: Rows) -> Float[Tensor, "B"]:
        return rows["chosen"].log_ratios - rows["rejected"].log_ratios
