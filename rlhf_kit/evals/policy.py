"""The model of a stage that trains nothing, and what is asked of it: loaded when it is first needed, and frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_kit.evals.scoring import GivenScorer
from rlhf_kit.judges.base import Judge
from rlhf_kit.judges.config import JudgeConfig
from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.loading import load_copy, load_tokenizer
from rlhf_kit.models.scorer import add_log_prob_head
from rlhf_kit.processes import processes
from rlhf_kit.rewards.config import BuildContext, SourceConfig

Progress = Callable[[str], Callable[[int, int], object]]


class FrozenPolicy:
    """A model, whole in this process, with its tokenizer, reward sources and judges.

    Args:
        config: where the model is; None where nothing asks for one.
        batch_size: rows of a forward pass of the scorer.
        functions: reward functions by name.
    """

    def __init__(
        self, config: Pretrained | None, batch_size: int, functions: Mapping[str, Callable[..., Any]] | None = None
    ) -> None:
        self._config = config
        self._batch_size = batch_size
        self._functions = functions or {}

    @property
    def policy_config(self) -> Pretrained:
        """Where the model is."""
        assert self._config is not None, "`problems` refuses a stage that needs a model and has none"
        return self._config

    @cached_property
    def device(self) -> torch.device:
        """Where models belong."""
        return cast(torch.device, processes().device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        return load_tokenizer(self.policy_config)

    @cached_property
    def policy(self) -> PreTrainedModel:
        """The model, with the head that scores tokens."""
        return self.load_model(self.policy_config)

    def load_model(self, config: Pretrained) -> PreTrainedModel:
        """A frozen model with the head that scores tokens."""
        model = load_copy(config)
        add_log_prob_head(model)
        return cast(Any, model).to(self.device)

    def scorer_of(self, configs: Sequence[SourceConfig]) -> GivenScorer:
        """Sources, ready to score rows of `prompt` and `completion`."""
        context = BuildContext(self.policy, self.policy_config, 1.0, self.device, self._functions, self.tokenizer)
        built = [config.build(context) for config in configs]
        return GivenScorer(cast(nn.Module, self.policy), self.tokenizer, configs, built, batch_size=self._batch_size)

    def judge(self, config: JudgeConfig) -> Judge:
        """A judge."""
        return config.build(cast(Any, self))  # which has all that `PolicyContext` asks for
