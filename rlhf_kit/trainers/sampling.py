"""Completions sampled from a model, for `sampled` data."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers import set_seed

from rlhf_kit.config import SEED_STRIDE
from rlhf_kit.data.config import Sampled
from rlhf_kit.data.load import SampledCompletion
from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.generation import generate_ids
from rlhf_kit.models.loading import load_copy, load_tokenizer
from rlhf_kit.processes import processes


def sample_completions(
    config: Sampled, prompts: Dataset, on_batch: Callable[[int, int], object] = lambda done, total: None
) -> list[list[SampledCompletion]]:
    """`config.num_generations` completions for every row of `prompts`, the same on every process.

    Each process samples for a block of the prompts, with a whole model of its own. `on_batch` is told how many
    completions there are, of how many, as if the other processes were as far as this one.
    """
    state = processes()
    rank, world = state.process_index, state.num_processes
    model_config = Pretrained(path=config.model)
    model = cast(nn.Module, load_copy(model_config)).to(state.device)
    tokenizer = load_tokenizer(model_config)
    set_seed((config.seed + rank * SEED_STRIDE) % 2**32)
    k = config.num_generations
    total = k * len(prompts)
    first, end = (len(prompts) * edge // world for edge in (rank, rank + 1))
    told = {name: prompts[name][first:end] for name in ("prompt", "tools") if name in prompts.column_names}
    repeated = {name: [value for value in values for _ in range(k)] for name, values in told.items()}
    own = generate_ids(
        model,
        tokenizer,
        repeated["prompt"],
        tools=repeated.get("tools"),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        batch_size=config.batch_size,
        synced_gpus=False,
        on_batch=lambda done, share: on_batch(total * done // max(share, 1), total),
    )
    completions = cast(list[list[int]], gather_object(own))
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    sampled = [SampledCompletion(text, ids) for text, ids in zip(texts, completions, strict=True)]
    return [sampled[start : start + k] for start in range(0, total, k)]
