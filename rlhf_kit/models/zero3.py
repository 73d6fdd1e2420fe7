"""DeepSpeed's ZeRO stage 3, which divides every parameter among the processes: how to do without for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

from torch import nn
from transformers.integrations import deepspeed as integration

Model = TypeVar("Model", bound=nn.Module)


def whole(parameters: Iterable[nn.Parameter], modify: bool = False) -> AbstractContextManager[None]:
    """The parameters in full on every process, which all must enter; what `modify` changes is kept (rank 0's).

    Nothing happens to parameters that are not divided.
    """
    divided = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not divided:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(divided, modifier_rank=0 if modify else None)


def load_undivided(load: Callable[[], Model]) -> Model:
    """What `load` loads, whole on every process, as a model outside the policy's engine must be."""
    if not integration.is_deepspeed_zero3_enabled():
        return load()
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    config = cast(Any, integration)._hf_deepspeed_config_weak_ref()
    integration.unset_hf_deepspeed_config()
    try:
        model = load()
    finally:
        integration.set_hf_deepspeed_config(config)
    for parameter in model.parameters():
        cast(Any, parameter).ds_status = ZeroParamStatus.AVAILABLE  # TRL's head asks it of every parameter
    return model
