"""What builders of pairs work with: the stage's model, sources, samples and judges, loaded when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

from torch import nn

from rlhf_kit.data.messages import completion_like, completion_text
from rlhf_kit.evals.fingerprint import config_fingerprint
from rlhf_kit.evals.policy import FrozenPolicy
from rlhf_kit.evals.scoring import GivenScorer
from rlhf_kit.models.generation import eos_token_ids
from rlhf_kit.pairs.builder import Row
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.pairs.sampling import VllmSampler, sample_with_model
from rlhf_kit.rollout import Text


class PairsContext(FrozenPolicy):
    """The model, the sources and the judges of a `pairs` stage, whole in this process.

    Args:
        stage: the stage.
        seed: the recipe's.
        recipe: the recipe's name.
        functions: reward functions by name.
    """

    def __init__(
        self,
        stage: Pairs,
        seed: int = 0,
        recipe: str = "",
        functions: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        super().__init__(stage.model, stage.batch_size, functions)
        self.stage = stage
        self.seed = seed
        self._recipe = recipe

    @cached_property
    def scorer(self) -> GivenScorer:
        """The stage's reward sources."""
        return self.scorer_of(self.stage.rewards)

    def sample(self, prompts: Sequence[Text]) -> list[list[int]]:
        """The ids of one completion for each prompt, as `generation` says, all in one batch."""
        if self.stage.generation.use_vllm:
            return self._vllm(prompts)
        return sample_with_model(cast(nn.Module, self.policy), self.tokenizer, prompts, self.stage.generation)

    def complete(self, prompts: Sequence[Row]) -> list[Row]:
        """`num_generations` rows for each prompt, with a `completion` that was sampled and its `completion_ids`."""
        repeated = [row for row in prompts for _ in range(self.stage.generation.num_generations)]
        ids = self.sample([row["prompt"] for row in repeated])
        return [
            {**row, "completion": completion_like(row["prompt"], text), "completion_ids": own}
            for row, text, own in zip(repeated, self.texts(ids), ids, strict=True)
        ]

    def facts(self, row: Row) -> Row:
        """The `text` of a row's sampled completion, its `length` in tokens, and whether it was cut off."""
        ids = row["completion_ids"]
        cut = not self.ends.intersection(ids[-1:])
        return {"text": completion_text(row["completion"]), "length": len(ids), "truncated": cut}

    @cached_property
    def _vllm(self) -> VllmSampler:
        return VllmSampler(self.policy_config, self.tokenizer, sorted(self.ends), self.stage.generation)

    @cached_property
    def ends(self) -> set[int]:
        """The ids that end a completion; one without them at its end was cut off."""
        return set(eos_token_ids(cast(nn.Module, self.policy), self.tokenizer))

    def texts(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """What sampled ids say, without special tokens."""
        return self.tokenizer.batch_decode(cast(Any, list(ids)), skip_special_tokens=True)

    @cached_property
    def lineage(self) -> dict[str, Any]:
        """Where the stage's rows come from: columns of every row that is written."""
        model = self.stage.model
        of_model = {} if model is None else {"model": model.path, "model_fingerprint": config_fingerprint(model)}
        return {**of_model, "recipe": self._recipe, "round": self.stage.round, "seed": self.seed}
