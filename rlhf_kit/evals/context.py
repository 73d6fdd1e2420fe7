"""What evaluations work with: the stage's model and sources, loaded when one of them is first needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from rlhf_kit.data.config import DataConfig, Sampled
from rlhf_kit.data.load import Sampler, load_data
from rlhf_kit.evals.fingerprint import config_fingerprint
from rlhf_kit.evals.scoring import GivenScorer, Row, Scored
from rlhf_kit.evals.stage import Eval
from rlhf_kit.judges.base import Judge
from rlhf_kit.judges.config import JudgeConfig
from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.generation import generate_ids
from rlhf_kit.models.loading import load_copy, load_tokenizer
from rlhf_kit.models.scorer import add_log_prob_head
from rlhf_kit.processes import processes
from rlhf_kit.rewards.config import BuildContext, SourceConfig
from rlhf_kit.rollout import Text

Progress = Callable[[str], Callable[[int, int], object]]


class EvalContext:
    """The model, the tokenizer and the sources of an `eval` stage.

    Args:
        stage: the stage.
        folder: where it keeps what it has sampled.
        seed: the recipe's.
        sampler: samples the completions of `sampled` data.
        functions: reward functions by name.
        progress: is told of what is being done.
    """

    def __init__(
        self,
        stage: Eval,
        folder: Path,
        seed: int = 0,
        sampler: Sampler | None = None,
        functions: Mapping[str, Callable[..., Any]] | None = None,
        progress: Progress = lambda what: lambda done, total: None,
    ) -> None:
        self.stage = stage
        self.folder = folder
        self.seed = seed
        self.progress = progress
        self._sampler = sampler
        self._functions = functions or {}

    @property
    def model_config(self) -> Pretrained:
        """Where the model is."""
        assert self.stage.model is not None, "`Eval.problems` refuses such a stage"
        return self.stage.model

    @property
    def policy_config(self) -> Pretrained:
        """The same, by the name that a judge asks for."""
        return self.model_config

    @property
    def policy(self) -> PreTrainedModel:
        """`model`, by the name that a judge asks for: one that is not the policy loads nothing else."""
        return self.model

    @cached_property
    def device(self) -> torch.device:
        """Where models belong."""
        return cast(torch.device, processes().device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        return load_tokenizer(self.model_config)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, frozen, with the head that scores tokens."""
        return self.load_model(self.model_config)

    def load_model(self, config: Pretrained) -> PreTrainedModel:
        """A frozen model with the head that scores tokens."""
        model = load_copy(config)
        add_log_prob_head(model)
        return cast(Any, model).to(self.device)

    @cached_property
    def scorer(self) -> GivenScorer:
        """The stage's sources, ready to score."""
        return self.scorer_of(self.stage.rewards)

    def scorer_of(self, configs: Sequence[SourceConfig]) -> GivenScorer:
        """Some sources, ready to score."""
        built = [config.build(self._build_context) for config in configs]
        return GivenScorer(
            cast(nn.Module, self.model), self.tokenizer, configs, built, batch_size=self.stage.batch_size
        )

    def judge(self, config: JudgeConfig) -> Judge:
        """A judge."""
        return config.build(cast(Any, self))  # which has all that `PolicyContext` asks for

    @property
    def _build_context(self) -> BuildContext:
        return BuildContext(self.model, self.model_config, 1.0, self.device, self._functions, self.tokenizer)

    def score(self, rows: Sequence[Row]) -> Scored:
        """What the stage's sources say of completions."""
        return self.scorer(rows, self.progress("scoring"))

    def load(self, config: DataConfig) -> list[dict[str, Any]]:
        """The rows of a data set; sampled completions are kept, and not sampled again after a kill."""
        if not isinstance(config, Sampled):
            return load_data(config).to_list()
        print_ = config_fingerprint(config)
        kept = self.folder / "sampled" / f"{print_[:16]}.parquet"
        if not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(".partial")
            load_data(config, self._sampler).to_parquet(str(partial))
            partial.replace(kept)
        return Dataset.from_parquet(str(kept), keep_in_memory=True).to_list()  # pyright: ignore[reportAttributeAccessIssue]

    def sample(
        self,
        prompts: Sequence[Text],
        max_new_tokens: int,
        temperature: float | None,
        batch_size: int,
        seed: int = 0,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> list[tuple[str, list[int]]]:
        """One completion for each prompt, by the stage's model or another: its text and its tokens."""
        set_seed((self.seed * 1_000_003 + seed) % 2**32)
        reader = tokenizer or self.tokenizer
        ids = generate_ids(
            cast(nn.Module, self.model if model is None else model),
            reader,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            batch_size=batch_size,
            synced_gpus=False,
            on_batch=self.progress("sampling"),
        )
        return list(zip(reader.batch_decode(ids, skip_special_tokens=True), ids, strict=True))


def prompt_key(prompt: Text) -> str:
    """A prompt as a key: rows of one prompt are resampled together."""
    return prompt if isinstance(prompt, str) else hashlib.sha256(json.dumps(prompt).encode()).hexdigest()
