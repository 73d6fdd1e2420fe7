"""Log-probabilities of sampled tokens, without a (B, T, V) tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils
from trl.trainer.utils import add_fused_lm_head

from rlhf_kit.models.adapters import active_adapter, adapter_parameters
from rlhf_kit.rollout import Rollout

CPU_TILE = (512, 1024)  # tokens by words: 2 MiB in float32


def add_log_prob_head(model: PreTrainedModel | PeftModel, temperature: float = 1.0) -> None:
    """Let `model(..., labels=..., fused_lm_head=True)` return log-probabilities, projected in tiles.

    The same head (TRL's) serves the policy, its reference and the PRM, so that equal weights give bit-equal
    log-probabilities.
    """
    base = cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
    if not torch.cuda.is_available():
        _fit_tiles_to_cpu()
    add_fused_lm_head(base, temperature=temperature)


def _fit_tiles_to_cpu() -> None:
    """Let TRL's head work on small tiles of logits, in the whole process.

    Its own, of up to 512 MiB, are meant for GPUs, where one kernel reads a tile once. On a CPU a tile is read several
    times, which is quick while it fits the cache.
    """
    chunked_logprob.TOKEN_CHUNK_SIZE, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = CPU_TILE


def token_outputs(
    model: nn.Module,
    prompt_ids: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    completion_ids: Int[Tensor, "B T"],
    completion_mask: Bool[Tensor, "B T"],
    micro_batch_size: int,
    fields: tuple[str, ...] = ("log_probs",),
    **options: Any,
) -> tuple[Float[Tensor, "B _"], ...]:
    """Per-token outputs of a model in float32; `log_probs[b, t]` is `log p(y_t | x, y_<t)`, 0 on padding.

    `model` carries the head of `add_log_prob_head`. Rows are scored `micro_batch_size` at a time: log-probabilities
    depend in their last bits on the shape of the batch, so models that are compared must use the same. `log_probs`
    is cut to the T completion tokens; other `fields` come as the model gives them. `options` go to its forward.
    """
    input_ids = torch.cat([prompt_ids, completion_ids], dim=1)
    attention_mask = torch.cat([prompt_mask, completion_mask], dim=1).long()
    length = completion_ids.shape[1]
    parts: list[tuple[Tensor, ...]] = []
    for ids, mask in zip(input_ids.split(micro_batch_size), attention_mask.split(micro_batch_size), strict=True):
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :-length] = -100
        output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, **options)
        values = (getattr(output, name).float() for name in fields)
        parts.append(tuple(v[:, -length:] if n == "log_probs" else v for n, v in zip(fields, values, strict=True)))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def rollout_outputs(
    model: nn.Module, rollout: Rollout, fields: tuple[str, ...] = ("log_probs",), **options: Any
) -> tuple[Float[Tensor, "B _"], ...]:
    """`token_outputs` on the sampled ids of a rollout."""
    return token_outputs(
        model,
        rollout.prompt_ids,
        rollout.prompt_mask,
        rollout.completion_ids,
        rollout.completion_mask,
        rollout.micro_batch_size,
        fields,
        **options,
    )


class Scorer:
    """A causal language model seen as a scorer of rollouts.

    Args:
        model: the model, with the head of `add_log_prob_head`.
        parameters: what the scorer may train.
        activate: context in which `model` is this scorer (a LoRA adapter made active); none for a whole model.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        activate: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model = model
        self._parameters = parameters
        self.activate = activate

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that belong to this scorer alone."""
        return iter(self._parameters)

    def __call__(self, rollout: Rollout) -> Float[Tensor, "B T"]:
        """Log-probabilities (B, T) of the rollout's completions; gradients flow if they are enabled."""
        with self.activate():
            return rollout_outputs(self.model, rollout)[0]

    def outputs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """`token_outputs` of this scorer."""
        with self.activate():
            return token_outputs(self.model, *args, **kwargs)


def adapter_scorer(model: PeftModel, name: str) -> Scorer:
    """The adapter `name` of a model as a scorer; it shares the base with the model's other adapters."""
    return Scorer(model, adapter_parameters(model, name), partial(active_adapter, model, name))


def base_scorer(model: PeftModel) -> Scorer:
    """A model without its adapters as a scorer."""
    return Scorer(model, [], partial(active_adapter, model, None))
