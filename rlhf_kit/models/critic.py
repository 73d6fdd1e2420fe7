"""The critic: values inside the policy's own forward pass, from its hidden states or from a model of its own."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, disable_dropout_in_model

from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.loading import load_model


@dataclass
class ActorCriticOutput(FusedCausalLMOutput):
    """TRL's fused output, the critic's value of every position (entry i: after token i was read), and a PRM's
    log-probabilities (aligned with `log_probs`)."""

    state_values: Tensor | None = None
    prm_log_probs: Tensor | None = None


class ValueHead(nn.Module):
    """A linear layer on the last hidden state that starts at 0."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Float[Tensor, "B L H"]) -> Float[Tensor, "B L"]:
        """Values in float32 (under autocast too: a bfloat16 value has 3 digits)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1).float()


class CriticModel(nn.Module):
    """A transformer of its own, the body of the causal language model of `config`, with a value head."""

    def __init__(self, config: Pretrained) -> None:
        super().__init__()
        model = load_model(config.model_copy(update={"peft": None}))
        self.backbone = cast(PreTrainedModel, model.base_model)
        disable_dropout_in_model(self.backbone)
        self.head = ValueHead(self.backbone.config.get_text_config().hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Float[Tensor, "B L"]:
        """Values (B, L) of every position."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return self.head(hidden.last_hidden_state)


def add_critic(model: PreTrainedModel, critic: ValueHead | CriticModel) -> None:
    """Let `model(..., fused_lm_head=True, with_values=True)` return an `ActorCriticOutput`.

    The critic becomes the submodule `model.critic` and runs inside the wrapped forward, so that DDP, DeepSpeed and
    FSDP see its parameters used. It is off unless asked for: generation and reference passes never pay for it.
    `V_t` reads the hidden state that predicts token t. With `detach_hidden`, a head's loss does not reach the policy.
    Call it after the log-prob head has been added.
    """
    model.critic = critic.to(model.device)
    policy_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(*args, with_values: bool = False, detach_hidden: bool = False, **kwargs):
        if not with_values:
            return policy_forward(*args, **kwargs)
        hidden: list[Tensor] = []
        hook = model.base_model.register_forward_hook(
            lambda _module, _args, output: hidden.append(output.last_hidden_state)
        )
        try:
            output = policy_forward(*args, **kwargs)
        finally:
            hook.remove()
        if isinstance(critic, ValueHead):
            values = critic(hidden[0].detach() if detach_hidden else hidden[0])
        else:
            values = critic(kwargs["input_ids"], kwargs["attention_mask"])
        return ActorCriticOutput(**output, state_values=values)

    model.forward = forward


def values_of_completion(state_values: Float[Tensor, "B L"], length: int) -> Float[Tensor, "B T"]:
    """`V_t` of the last `length` tokens: the value of the position that predicts token t (index P + t - 1)."""
    return state_values[:, -length - 1 : -1]
