"""Odds-ratio preference optimisation (ORPO, arXiv 2403.07691)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeFloat

from rlhf_kit.objectives.base import PAIR, Loss, Need, Objective, Rows, Scored

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Orpo(Objective):
    """`NLL(y_w) - beta * logsigmoid(log odds(y_w) - log odds(y_l))`, odds of the mean log-probability (Eq. 6 and 7).

    The negative log-likelihood is that of the completion (the paper's), or with `nll: prompt_and_completion` of the
    prompt as well (TRL's); here it is the mean over a row's tokens, where TRL takes that over a batch's. No reference.
    """

    roles: ClassVar = PAIR

    type: Literal["orpo"]
    beta: NonNegativeFloat = 0.1
    nll: Literal["completion", "prompt_and_completion"] = "completion"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"prompt"}) if self.nll == "prompt_and_completion" else frozenset()

    def loss(self, rows: Rows) -> Loss:
        from torch.nn.functional import logsigmoid

        chosen, rejected = rows["chosen"], rows["rejected"]
        ratio = log_odds_of(chosen.means) - log_odds_of(rejected.means)
        nll = negative_log_likelihood(chosen, self.nll == "prompt_and_completion")
        return Loss(nll - self.beta * logsigmoid(ratio), {"nll": nll, "log_odds_ratio": ratio})

    def ranking(self, rows: Rows) -> Float[Tensor, "B"]:
        return rows["chosen"].means - rows["rejected"].means


def negative_log_likelihood(scored: Scored, with_prompt: bool = False) -> Float[Tensor, "B"]:
    """Mean of `-log pi` over a row's completion tokens, or over the prompt's as well."""
    if not with_prompt:
        return -scored.means
    assert scored.prompt_log_probs is not None and scored.prompt_mask is not None
    count = scored.mask.sum(dim=1) + scored.prompt_mask.sum(dim=1)
    return -(scored.sums + scored.prompt_log_probs.sum(dim=1)) / count.clamp(min=1)


def log_odds_of(log_probs: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`log(p / (1 - p))` from `log p`; a probability of 1 is taken for the largest below it."""
    return log_probs - log1mexp(log_probs)


def log1mexp(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`log(1 - exp(x))` for x < 0, in the form that keeps its digits on either side of -log 2 (Maechler, 2012).

    At 0 the value is that of the largest number below it, and its gradient is finite.
    """
    import torch

    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )
