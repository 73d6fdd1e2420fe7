"""Models that score a rollout's tokens for a source: an adapter on the policy's base, or a model of their own."""

from __future__ import annotations

from typing import Any, cast

from peft import PeftModel
from torch import nn
from trl.trainer.utils import disable_dropout_in_model

from rlhf_kit.models.adapters import adapter_on, add_adapter_copy, load_second_adapter
from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.loading import load_copy
from rlhf_kit.models.scorer import Scorer, adapter_scorer, add_log_prob_head
from rlhf_kit.rewards.config import BuildContext


def scorer_of(path: str | None, name: str, context: BuildContext, trainable: bool = False) -> Scorer:
    """The model in `path`, or the policy as it starts: as the adapter `name` on the policy's base where it is one."""
    if isinstance(context.policy, PeftModel):
        trained = None if path is None else adapter_on(context.policy, path)
        if trained is not None:
            load_second_adapter(context.policy, name, trained)
        elif path is None:
            add_adapter_copy(context.policy, name)
        if trained is not None or path is None:
            return adapter_scorer(context.policy, name)
    return whole_model(path, context, trainable)


def whole_model(path: str | None, context: BuildContext, trainable: bool = False) -> Scorer:
    """A model of its own, loaded as the policy was.

    Raises:
        ValueError: the policy is made from scratch, so that there is nothing to load.
    """
    policy = context.policy_config
    if not isinstance(policy, Pretrained):
        raise ValueError("an implicit PRM needs a policy with weights to start from; train it by an sft stage first")
    changes: dict[str, str | None] = {}
    if path is not None and path != policy.path:
        changes |= {"path": path, "revision": None, "gguf_file": None}
    module = cast(nn.Module, load_copy(policy.model_copy(update=changes)).train())
    add_log_prob_head(cast(Any, module), context.temperature)
    disable_dropout_in_model(module)
    return Scorer(module.to(context.device), list(module.parameters()) if trainable else [])
