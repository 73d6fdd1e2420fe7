"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class MovingAverage:
    """A frozen copy of `model` that follows it: `w <- decay * w + (1 - decay) * w_model`.

    Modules that are added to `model` later are none of the average's.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._source = model
        self._decay = decay

    @torch.no_grad()
    def update(self) -> None:
        """Take one step towards the model's present weights."""
        weights = dict(self._source.named_parameters())
        for name, average in self.model.named_parameters():
            average.lerp_(weights[name].to(average.dtype), 1 - self._decay)
