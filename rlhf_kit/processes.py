"""The processes of a launch, for what runs outside a trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from rlhf_kit.errors import RunError
from rlhf_kit.world_size import uses_deepspeed

Result = TypeVar("Result")


def processes() -> PartialState:
    """accelerate's state: how many processes there are, and this one's number and device.

    A trainer's arguments make it as well. Where none has been made before, and there is no accelerator, accelerate
    takes every process for the only one unless it is told otherwise.
    """
    if torch.accelerator.is_available():
        return PartialState()
    return PartialState(backend="gloo") if uses_deepspeed(None) else PartialState(cpu=True)


def of_main(value: Result) -> Result:
    """What the main process has, on every process; all of them must call it."""
    processes()
    return cast(list[Result], gather_object([value]))[0]


def agreed(compute: Callable[[], Result]) -> Result:
    """What `compute` gives, once no process has failed: the others would wait for it for ever.

    Raises:
        RunError: on every process, if it raised on any of several.
    """
    state = processes()
    if state.num_processes == 1:
        return compute()
    result, error = None, None
    try:
        result = compute()
    except Exception as caught:
        error = caught
    said = None if error is None else f"process {state.process_index}: {error}"
    errors = [text for text in cast(list[str | None], gather_object([said])) if text is not None]
    if errors:
        raise RunError("; ".join(errors)) from error
    return cast(Result, result)
