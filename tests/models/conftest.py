"""Tiny models and ragged batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rlhf_kit.data.tasks import running_sums_vocabulary
from rlhf_kit.models.config import Scratch
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.rollout import Rollout

torch.set_num_threads(1)

VOCABULARY = tuple(running_sums_vocabulary(5))


def scratch(**fields: Any) -> Scratch:
    """A configuration of a one-layer Llama with large initial weights: its logits are far from uniform."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {"vocabulary": VOCABULARY, "config": {"initializer_range": 0.5}, "max_position_embeddings": 64, **sizes}
    return Scratch.model_validate({"type": "scratch", **settings, **fields})


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer of running sums modulo 5."""
    return load_tokenizer(scratch())


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """A tiny Llama; the same seed gives the same weights."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = load_model(scratch(**fields))
        assert isinstance(model, LlamaForCausalLM)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def saved(make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    """Folder of a tiny model and its tokenizer."""
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def rollout() -> Rollout:
    """Prompts of 1, 3 and 4 tokens and completions of 5, 2 and 1; the middle token of the first is a tool's."""
    prompt_mask = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    completion_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    generator = torch.Generator().manual_seed(1)
    prompt_ids = torch.randint(4, 10, (3, 4), generator=generator).masked_fill(~prompt_mask, 0)
    completion_ids = torch.randint(4, 10, (3, 5), generator=generator).masked_fill(~completion_mask, 0)
    action_mask = completion_mask.clone()
    action_mask[0, 2] = False
    return Rollout(
        prompts=["a", "b", "c"],
        completions=["x", "y", "z"],
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        action_mask=action_mask,
        micro_batch_size=2,
    )
