"""An exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_kit.models.scorer import Scorer
from rlhf_kit.models.zero3 import whole
from rlhf_kit.rollout import Rollout


class MovingAverage:
    """Frozen weights that follow others: `w <- decay * w + (1 - decay) * w_followed`.

    Args:
        scorer: the average, which starts as a copy of what it follows.
        followed: the weights that it follows, in the order of the scorer's.
        decay: how much of the average is kept at each step.
    """

    def __init__(self, scorer: Scorer, followed: Sequence[nn.Parameter], decay: float) -> None:
        self.scorer = scorer
        self._followed = followed
        self._decay = decay

    def __call__(self, rollout: Rollout) -> Float[Tensor, "B T"]:
        """Log-probabilities (B, T) of the rollout's completions."""
        return self.scorer(rollout)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The averaged weights."""
        return self.scorer.parameters()

    @torch.no_grad()
    def update(self) -> None:
        """Take one step towards the model's present weights."""
        for average, followed in zip(self.parameters(), self._followed, strict=True):
            with whole([followed]), whole([average], modify=True):
                average.lerp_(followed.to(average.dtype), 1 - self._decay)
