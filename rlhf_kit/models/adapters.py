"""Several LoRA adapters on one frozen base model: the policy's, the PRM's, and none for the reference."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

from rlhf_kit.models.config import same_model

ADAPTER_FOLDER = "adapter"


@contextmanager
def active_adapter(model: PeftModel, name: str | None) -> Iterator[None]:
    """Make one adapter the active one (none with `None`: the base model) without touching `requires_grad`.

    PEFT's own `set_adapter` and `disable_adapter` freeze the adapters that they turn off, so a second adapter would
    silently stop training.

    Raises:
        ValueError: the model has no adapter `name`.
    """
    before = str(model.active_adapter)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter() if name is None else nullcontext():
            if name is not None:
                model.set_adapter(name)
            _set_requires_grad(flags)
            yield
    finally:
        if name is not None:
            model.set_adapter(before)
        _set_requires_grad(flags)


@contextmanager
def _same_requires_grad(model: nn.Module) -> Iterator[None]:
    """What PEFT freezes or unfreezes inside is as it was before, for the parameters that were there."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        _set_requires_grad(flags)


def _set_requires_grad(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def adapter_parameters(model: PeftModel, name: str) -> list[nn.Parameter]:
    """The parameters of one adapter, in the model's order."""
    return list(_adapter_parameters(model, name).values())


def add_adapter_copy(model: PeftModel, name: str, of: str = "default") -> None:
    """Add a frozen adapter `name` that starts as an exact copy of the adapter `of`.

    Raises:
        ValueError: the model has an adapter `name` already, or none called `of`.
    """
    if of not in model.peft_config or name in model.peft_config:
        have = ", ".join(model.peft_config)
        raise ValueError(f"cannot copy LoRA adapter '{of}' to '{name}': the model has {have}; choose another name")
    _recompute_with_own_adapter(model)
    config = cast(LoraConfig, model.peft_config[of])
    with _same_requires_grad(model):
        model.add_adapter(name, replace(config, lora_dropout=0.0))  # the copy must score as the original does
    originals, copies = _adapter_parameters(model, of), _adapter_parameters(model, name)
    with torch.no_grad():
        for place, copy in copies.items():
            copy.copy_(originals[place]).requires_grad_(False)


def load_second_adapter(model: PeftModel, name: str, folder: str) -> None:
    """Add the frozen adapter in `folder` as `name`, on the base model that is there."""
    _recompute_with_own_adapter(model)
    config = PeftConfig.from_pretrained(folder)
    cast(LoraConfig, config).lora_dropout = 0.0
    with _same_requires_grad(model):
        model.load_adapter(folder, name, peft_config=config, is_trainable=False)


@dataclass(frozen=True)
class OnBase:
    """A model as a base (a folder or hub id, and its revision) and the folder of an adapter on it; None for none."""

    base: str
    revision: str | None = None
    adapter: str | None = None


def on_base(path: str) -> OnBase:
    """The model at `path` as a base and an adapter, if it is an adapter or holds one.

    A model that is a base with two adapters merged in keeps the second one beside its weights.
    """
    for folder in (Path(path), Path(path) / ADAPTER_FOLDER):
        if (folder / "adapter_config.json").is_file():
            config = PeftConfig.from_pretrained(str(folder))
            return OnBase(str(config.base_model_name_or_path), config.revision, str(folder))
    return OnBase(path)


def adapter_on(model: PeftModel, path: str) -> str | None:
    """The folder of the adapter that `path` is or holds, if it was made for this model's base; else None."""
    own = str(next(iter(model.peft_config.values())).base_model_name_or_path)
    found = on_base(path)
    return found.adapter if same_model(found.base, own) else None


def _adapter_parameters(model: PeftModel, name: str) -> dict[tuple[str, str], nn.Parameter]:
    """An adapter's parameters by their names' parts before and behind the adapter's own name."""
    pattern = re.compile(rf"(.*\.lora_\w+)\.{re.escape(name)}((?:\..*)?)")
    named = ((pattern.fullmatch(key), parameter) for key, parameter in model.named_parameters())
    return {(match[1], match[2]): parameter for match, parameter in named if match}


def _recompute_with_own_adapter(model: PeftModel) -> None:
    """Let gradient checkpointing compute a layer again with the adapter that it was computed with at first.

    By the backward pass another adapter may be the active one. The layer would then be computed with that one's
    weights, which would also be given the gradients, and nothing would say so.
    """
    base: Any = model.get_base_model()
    enable = base.gradient_checkpointing_enable

    def enable_with_adapter(*args: Any, **kwargs: Any) -> None:
        enable(*args, **kwargs)
        for module in base.modules():
            checkpoint = vars(module).get("_gradient_checkpointing_func")
            if checkpoint is not None:
                module._gradient_checkpointing_func = _with_adapter(model, checkpoint)

    base.gradient_checkpointing_enable = enable_with_adapter


def _with_adapter(model: PeftModel, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """`checkpoint(function, *args)`, whose function always runs with the adapter that is active now."""

    def checkpoint_with_adapter(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        name = str(model.active_adapter)

        def with_own_adapter(*inputs: Any, **options: Any) -> Any:
            with nullcontext() if name == model.active_adapter else active_adapter(model, name):
                return function(*inputs, **options)

        return checkpoint(with_own_adapter, *args, **kwargs)

    return checkpoint_with_adapter
