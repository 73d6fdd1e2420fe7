"""What PPO puts beside a policy: a reference, a moving average, a critic, a PRM in the same forward; what cannot be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from rlhf_kit.errors import RunError
from rlhf_kit.models.adapters import adapter_parameters, add_adapter_copy
from rlhf_kit.models.config import Pretrained, Scratch
from rlhf_kit.models.critic import CriticModel, ValueHead
from rlhf_kit.models.ema import MovingAverage
from rlhf_kit.models.joint import add_joint_prm
from rlhf_kit.models.loading import load_copy
from rlhf_kit.models.scorer import Scorer, adapter_scorer, add_log_prob_head, base_scorer
from rlhf_kit.rewards.config import BuildContext
from rlhf_kit.rewards.implicit_prm import ImplicitPrm
from rlhf_kit.rollout import RewardSource
from rlhf_kit.trainers.config import Critic

if TYPE_CHECKING:
    from rlhf_kit.trainers.ppo import PpoTrainer


def build_critic(
    config: Critic, policy: PreTrainedModel, settings: Pretrained | Scratch | None = None
) -> ValueHead | CriticModel:
    """A value head for the policy's hidden states, or a model of its own.

    The model loads as the policy did, by its `settings`, in the policy's precision.
    """
    if config.type == "model":
        if not isinstance(settings, Pretrained):
            settings = Pretrained(path=config.path or policy.config._name_or_path)
        changes: dict[str, str | None] = {"dtype": str(policy.dtype).removeprefix("torch.")}
        if config.path is not None and config.path != settings.path:
            changes |= {"path": config.path, "revision": None, "gguf_file": None}  # those are of the policy's weights
        return CriticModel(settings.model_copy(update=changes))
    return ValueHead(policy.config.get_text_config().hidden_size).to(policy.device)


def reference_of(policy: PreTrainedModel | PeftModel, context: BuildContext) -> Scorer:
    """The policy's initial weights: its base model with LoRA, else a frozen second copy."""
    if isinstance(policy, PeftModel):
        return base_scorer(policy)
    return Scorer(_copy_of(policy, context), [])


def average_of(policy: PreTrainedModel | PeftModel, context: BuildContext, decay: float) -> MovingAverage:
    """The moving average of the policy: one more adapter with LoRA, else a second copy."""
    if isinstance(policy, PeftModel):
        add_adapter_copy(policy, "ema")
        return MovingAverage(adapter_scorer(policy, "ema"), adapter_parameters(policy, "default"), decay)
    copy = _copy_of(policy, context)
    return MovingAverage(Scorer(copy, list(copy.parameters())), list(policy.parameters()), decay)


def _copy_of(policy: PreTrainedModel, context: BuildContext) -> PreTrainedModel:
    """The policy's initial weights as a model of its own, with the log-prob head."""
    model = load_copy(context.policy_config)
    if isinstance(context.policy_config, Scratch):  # whose weights were drawn
        model.load_state_dict(policy.state_dict())
    add_log_prob_head(model, context.temperature)
    return cast(Any, model).to(context.device)


def critic_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the critic inside `model`."""
    return [parameter for name, parameter in model.named_parameters() if ".critic." in f".{name}"]


def join_prm(policy: PreTrainedModel, model: nn.Module, sources: Iterable[RewardSource]) -> ImplicitPrm | None:
    """Put a PRM whose order is `with_policy` inside the policy's forward; `model` is the policy with its adapters."""
    joint = [source for source in sources if isinstance(source, ImplicitPrm) and _learns_with_policy(source)]
    if not joint:
        return None
    (source,) = joint
    shared = source.scorer.model is model
    add_joint_prm(policy, None if shared else source.scorer.model, source.scorer.activate)
    for parameter in source.trainable_parameters():
        parameter.requires_grad_(True)
    return source


def _learns_with_policy(source: ImplicitPrm) -> bool:
    return source.config.online is not None and source.config.online.order == "with_policy"


def regroup(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], rate: float) -> None:
    """Move `parameters` to a group of their own, without weight decay."""
    moved = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    optimizer.add_param_group({"params": list(parameters), "lr": rate, "weight_decay": 0.0})


class FollowPolicy(TrainerCallback):
    """Moves the average after every optimiser step."""

    def __init__(self, average: MovingAverage) -> None:
        self._average = average

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        self._average.update()


def refuse_what_cannot_run(trainer: PpoTrainer) -> None:
    """Say what only the launch and the data make impossible.

    Raises:
        RunError: too few prompts, a part that would rest under DeepSpeed, or tools that would block each other.
    """
    prompts = int(trainer.args.generation_batch_size or 0) // trainer.num_generations
    if len(trainer.train_dataset) < prompts:
        raise RunError(
            f"data: {len(trainer.train_dataset)} prompts are fewer than the {prompts} of one rollout, so that there "
            "would be no update; give more (size, limit), or lower per_device_train_batch_size"
        )
    warms_up = trainer.critic_config is not None and trainer.critic_config.warmup_steps > 0
    if trainer.is_deepspeed_enabled and (warms_up or (trainer.joint_prm is not None and trainer.num_iterations > 1)):
        raise RunError(
            "DeepSpeed applies a gradient as soon as it is whole, so no part of the policy can rest: write "
            "critic.warmup_steps: 0, and online.order: before_scoring or num_iterations: 1, or launch without it"
        )
    server = trainer.use_vllm and (trainer.vllm_mode == "server" or trainer.args.vllm_tensor_parallel_size > 1)
    several = trainer.accelerator.num_processes > 1
    if trainer.config.tools and several and (is_deepspeed_zero3_enabled() or server):
        raise RunError(
            "tools: conversations of different lengths would let processes wait for each other for ever under "
            "ZeRO-3 and with a vLLM that they share: launch with zero2 or ddp, and write vllm_mode: colocate and "
            "vllm_tensor_parallel_size: 1"
        )
