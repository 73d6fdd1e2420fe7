"""What TRL sends to vLLM: the policy alone, and its base as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rlhf_kit.trainers.export import KIT_MODULES


def leave_out_kit_modules(generation: Any) -> None:
    """Let TRL's vLLM client send the policy alone: vLLM's model has neither a critic nor a PRM."""
    named_parameters = generation._iter_named_params

    def of_the_policy() -> Iterator[tuple[str, Tensor]]:
        with base_kept(generation.model):
            yield from ((name, value) for name, value in named_parameters() if not KIT_MODULES.match(name))

    generation._iter_named_params = of_the_policy


@contextmanager
def base_kept(model: nn.Module) -> Iterator[None]:
    """The base weights below LoRA adapters as they were, bit for bit, once adapters have been merged and unmerged.

    Adding and subtracting in 16 bits leaves rounding errors, and reference and PRM share the base. (Under ZeRO-3 what
    is merged is a copy.)
    """
    layers = [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)]
    weights = [weight for layer in layers for weight in layer.parameters() if weight.dtype != torch.float32]
    before = [weight.detach().to("cpu", copy=True) for weight in weights]
    yield
    with torch.no_grad():
        for weight, value in zip(weights, before, strict=True):
            weight.copy_(value)
