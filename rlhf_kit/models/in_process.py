"""Models that answer or judge in the trainer's own process: a model of their own, or the policy's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from rlhf_kit.data.messages import content_text
from rlhf_kit.models.adapters import active_adapter
from rlhf_kit.models.config import Pretrained, Scratch
from rlhf_kit.models.loading import load_copy, load_tokenizer
from rlhf_kit.rollout import Message


class PolicyContext(Protocol):
    """What is asked of a reward source's `BuildContext`."""

    @property
    def policy(self) -> PreTrainedModel | PeftModel: ...
    @property
    def policy_config(self) -> Pretrained | Scratch: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None: ...


@dataclass(frozen=True)
class InProcess:
    """A causal language model that reads and writes without being trained.

    Attributes:
        model: the model, not wrapped by PEFT or by an engine; adapters may be inside.
        tokenizer: its tokenizer.
        activate: context in which `model` has the weights that are meant.
        own_precision: it computes in the precision that it was loaded in, whatever the trainer's autocast is.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    activate: Callable[[], AbstractContextManager[Any]] = nullcontext
    own_precision: bool = False

    @contextmanager
    def ready(self) -> Iterator[PreTrainedModel]:
        """The model in evaluation mode, without gradients and with the `generate` of its class.

        Evaluation mode also rules out gradient checkpointing, with which layers would drop their cache. A trainer that
        ends the policy's completions at stop strings does so by another `generate`, which is not meant for a judge.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        own = vars(self.model).pop("generate", None)
        precision = torch.autocast(self.model.device.type, enabled=False) if self.own_precision else nullcontext()
        try:
            with torch.no_grad(), self.activate(), precision:
                self.model.eval()
                yield self.model
        finally:
            for module, training in modes:
                module.training = training
            if own is not None:
                vars(self.model)["generate"] = own

    @property
    def positions(self) -> int | None:
        """How many tokens the model can read; None where its configuration does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def literal(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text with its special tokens' names broken up, so that they are read as text.

    A policy can spell `<|im_end|>` in ordinary tokens, and would otherwise end its turn in a judge's prompt and begin
    the judge's.
    """
    added = cast(Any, tokenizer).added_tokens_decoder.values()
    names = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, f"{name[0]} {name[1:]}")
    return text


def literal_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
    """Messages whose contents are `literal`."""
    return [{**message, "content": literal(tokenizer, content_text(message))} for message in messages]


def own_model(config: Pretrained | Scratch, device: torch.device) -> InProcess:
    """A frozen model of its own, whole on every process."""
    return InProcess(_on(load_copy(config), device), load_tokenizer(config), own_precision=True)


def policy_model(context: PolicyContext, frozen: bool) -> InProcess:
    """The policy's weights: as they are at any time, or with `frozen` as they were at first.

    The initial weights are the base of a LoRA policy, with its adapters turned off, else a frozen copy. Under ZeRO-3
    they are a copy in any case, for every process asks at its own pace, and must not wait for the others' part of a
    parameter.

    Raises:
        ValueError: the live policy's parameters are divided among the processes.
    """
    policy, config = context.policy, context.policy_config
    tokenizer = context.tokenizer or load_tokenizer(config)
    divided = is_deepspeed_zero3_enabled()
    if not frozen and divided:
        raise ValueError(
            "the live policy cannot be asked under ZeRO-3, where no process has all of its weights: write frozen: true "
            "(its initial weights, one copy a process), or train with ZeRO-2 or DDP"
        )
    base = cast(PreTrainedModel, policy.get_base_model() if isinstance(policy, PeftModel) else policy)
    if not frozen:
        return InProcess(base, tokenizer)
    if isinstance(policy, PeftModel) and not divided:
        return InProcess(base, tokenizer, partial(active_adapter, policy, None))
    copy = load_copy(config)
    if isinstance(config, Scratch):  # whose weights were drawn
        copy.load_state_dict(base.state_dict())
    return InProcess(_on(copy, context.device), tokenizer)


def _on(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    return cast(PreTrainedModel, cast(nn.Module, model).to(device))
