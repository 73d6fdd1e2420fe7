"""What evaluations work with: the stage's model and sources, loaded when one of them is first needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from rlhf_kit.config import SEED_STRIDE
from rlhf_kit.data.config import DataConfig, Sampled
from rlhf_kit.data.load import Sampler, load_data
from rlhf_kit.evals.fingerprint import config_fingerprint
from rlhf_kit.evals.policy import FrozenPolicy, Progress
from rlhf_kit.evals.scoring import GivenScorer, Row, Scored
from rlhf_kit.evals.stage import Eval
from rlhf_kit.models.generation import generate_ids
from rlhf_kit.rollout import Text


class EvalContext(FrozenPolicy):
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
        super().__init__(stage.model, stage.batch_size, functions)
        self.stage = stage
        self.folder = folder
        self.seed = seed
        self.progress = progress
        self._sampler = sampler

    @cached_property
    def scorer(self) -> GivenScorer:
        """The stage's sources, ready to score."""
        return self.scorer_of(self.stage.rewards)

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
        set_seed((self.seed * SEED_STRIDE + seed) % 2**32)
        reader = tokenizer or self.tokenizer
        ids = generate_ids(
            cast(nn.Module, self.policy if model is None else model),
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
