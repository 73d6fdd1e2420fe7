"""A PRM inside the policy's own forward pass, for training in the same engine and by the same optimiser."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from transformers import PreTrainedModel

from rlhf_kit.models.critic import ActorCriticOutput

SCORED = ("input_ids", "attention_mask", "labels")


def add_joint_prm(
    policy: PreTrainedModel,
    prm: nn.Module | None = None,
    activate: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Let `policy(..., fused_lm_head=True, with_prm=True)` return the PRM's `prm_log_probs` as well.

    A whole `prm` becomes the submodule `policy.prm`; without one the PRM is an adapter of the policy that `activate`
    turns on. Both passes are inside one wrapped forward, so that DDP, DeepSpeed and FSDP see one forward a backward.
    """
    if prm is not None:
        policy.prm = prm
    inner = policy.forward

    @functools.wraps(type(policy).forward)
    def forward(*args, with_prm: bool = False, **kwargs):
        output = inner(*args, **kwargs)
        if not with_prm:
            return output
        scored = {name: kwargs[name] for name in SCORED}
        with activate():
            log_probs = (prm or inner)(**scored, fused_lm_head=True).log_probs
        return ActorCriticOutput(**{**output, "prm_log_probs": log_probs})

    policy.forward = forward
