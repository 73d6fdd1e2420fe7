"""Completions sampled from a model, for `sampled` data."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from datasets import Dataset
from torch import nn
from transformers import set_seed

from rlhf_kit.data.config import Sampled
from rlhf_kit.data.load import SampledCompletion
from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.generation import generate_ids
from rlhf_kit.models.loading import load_model, load_tokenizer


def sample_completions(
    config: Sampled, prompts: Dataset, on_batch: Callable[[int], None] = lambda done: None
) -> list[list[SampledCompletion]]:
    """`config.num_generations` completions for every row of `prompts`."""
    model_config = Pretrained(path=config.model)
    model = cast(nn.Module, load_model(model_config))
    tokenizer = load_tokenizer(model_config)
    if torch.cuda.is_available():
        model.to("cuda")
    set_seed(config.seed)
    repeated = [prompt for prompt in prompts["prompt"] for _ in range(config.num_generations)]
    completions = generate_ids(
        model,
        tokenizer,
        repeated,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        batch_size=config.batch_size,
        on_batch=on_batch,
    )
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    sampled = [SampledCompletion(text, ids) for text, ids in zip(texts, completions, strict=True)]
    k = config.num_generations
    return [sampled[start : start + k] for start in range(0, len(sampled), k)]
