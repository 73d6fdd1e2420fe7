"""ORPO over two prompts for one response (I-ORPO; Suri, arXiv 2406.19371)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeFloat

from rlhf_kit.objectives.base import Loss, Objective, Rows
from rlhf_kit.objectives.orpo import log_odds_of, negative_log_likelihood

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class IOrpo(Objective):
    """`NLL(y | x+) - beta * logsigmoid(log odds(y | x+) - log odds(y | x-))`, odds of the mean log-probability.

    The right instruction is `prompt`, the corrupted one `corrupted_prompt`; both go with the same `completion`.
    """

    roles: ClassVar = {"right": ("prompt", "completion"), "wrong": ("corrupted_prompt", "completion")}

    type: Literal["i_orpo"]
    beta: NonNegativeFloat = 0.4

    def loss(self, rows: Rows) -> Loss:
        from torch.nn.functional import logsigmoid

        right, wrong = rows["right"], rows["wrong"]
        ratio = log_odds_of(right.means) - log_odds_of(wrong.means)
        nll = negative_log_likelihood(right)
        return Loss(nll - self.beta * logsigmoid(ratio), {"nll": nll, "log_odds_ratio": ratio})

    def ranking(self, rows: Rows) -> Float[Tensor, "B"]:
        return rows["right"].means - rows["wrong"].means
