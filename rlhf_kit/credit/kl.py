"""Estimators of the KL divergence from a reference policy, and its adaptive coefficient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(-d) + d,
}


def kl_penalty(
    logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"], estimator: str
) -> Float32[Tensor, "*shape"]:
    """Estimate of KL(policy || reference) from each sampled token, with `d = logprobs - ref_logprobs`.

    `k1 = d`, `k2 = d^2 / 2`, `k3 = exp(-d) - 1 + d` (Schulman, Approximating KL divergence, 2020). k1 and k3
    are unbiased under the policy's samples, k2 to second order; k2 and k3 are never negative. It is element
    by element: the caller masks.

    Raises:
        ValueError: if `estimator` is none of `k1`, `k2`, `k3`.
    """
    if estimator not in _ESTIMATORS:
        raise ValueError(f"KL estimator {estimator!r} is unknown; choose one of {', '.join(_ESTIMATORS)}")
    return _ESTIMATORS[estimator](logprobs.float() - ref_logprobs.float())


@dataclass
class AdaptiveKl:
    """A coefficient that steers the KL towards a target (Ziegler et al., arXiv 1909.08593, Eq. 4).

    `error = clip(KL / target - 1, -0.2, 0.2)`, `coefficient *= 1 + error * n / horizon` after n completions.
    The paper's constant `K_beta` is `n / horizon`, as in its code.

    Attributes:
        coefficient: the present coefficient, all there is to save.
        target: wanted KL per completion, in nats.
        horizon: completions over which an error is worked off.
    """

    coefficient: float
    target: float
    horizon: int

    def __post_init__(self) -> None:
        if self.coefficient < 0 or self.target <= 0 or self.horizon <= 0:
            raise ValueError(f"{self} needs a coefficient of at least 0, and a target and horizon above 0")

    def update(self, kl: float, completions: int) -> float:
        """Move the coefficient by the mean `kl` of `completions` completions, and return it.

        Raises:
            ValueError: if `kl` is not finite, or the horizon is so short that the coefficient could reach 0.
        """
        if not math.isfinite(kl):
            raise ValueError(f"KL of {kl} would spoil the coefficient for good; skip the update of this rollout")
        if completions >= 5 * self.horizon:
            raise ValueError(
                f"{completions} completions per update over a horizon of {self.horizon} could make the "
                f"coefficient negative; set the horizon above {completions / 5}"
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * completions / self.horizon
        return self.coefficient
