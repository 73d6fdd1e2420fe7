"""Several LoRA adapters on one frozen base model: the policy's, the PRM's, and none for the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn


@contextmanager
def active_adapter(model: PeftModel, name: str | None) -> Iterator[None]:
    """Make one adapter the active one (none with `None`: the base model) without touching `requires_grad`.

    PEFT's own `set_adapter` freezes the adapters it turns off, so a second adapter would silently stop training.
    """
    if name is None:
        with _unchanged_requires_grad(model), model.disable_adapter():
            yield
        return
    before = model.active_adapter
    with _unchanged_requires_grad(model):
        model.set_adapter(name)
    try:
        yield
    finally:
        with _unchanged_requires_grad(model):
            model.set_adapter(before)


@contextmanager
def _unchanged_requires_grad(model: nn.Module) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def adapter_parameters(model: PeftModel, name: str) -> list[nn.Parameter]:
    """The parameters of one adapter, in the model's order."""
    return [parameter for key, parameter in model.named_parameters() if f".{name}." in key]


def add_adapter_copy(model: PeftModel, name: str, of: str = "default") -> None:
    """Add an adapter `name` that starts as an exact copy of the adapter `of`."""
    with _unchanged_requires_grad(model):
        model.add_adapter(name, model.peft_config[of])
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in parameters.items():
            if f".{of}." in key:
                parameters[key.replace(f".{of}.", f".{name}.")].copy_(parameter)
