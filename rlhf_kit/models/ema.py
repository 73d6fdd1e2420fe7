"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn

from rlhf_kit.models.adapters import adapter_parameters, add_adapter_copy
from rlhf_kit.models.scorer import Scorer, adapter_scorer
from rlhf_kit.rollout import Rollout

ADAPTER = "ema"


class MovingAverage:
    """A frozen copy of `model` that follows it: `w <- decay * w + (1 - decay) * w_model`.

    The copy of a LoRA model is one more adapter on its base. Modules that are added to `model` later are none of
    the average's.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        if isinstance(model, PeftModel):
            add_adapter_copy(model, ADAPTER)
            self.scorer = adapter_scorer(model, ADAPTER)
            self._followed = adapter_parameters(model, "default")
        else:
            average = copy.deepcopy(model).requires_grad_(False)
            self.scorer = Scorer(average, list(average.parameters()))
            self._followed = list(model.parameters())

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
            average.lerp_(followed.to(average.dtype), 1 - self._decay)
