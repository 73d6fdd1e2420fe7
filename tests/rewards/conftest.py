"""A tiny policy on disk, and a small rollout of text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_kit.data.tasks import running_sums_vocabulary
from rlhf_kit.models.config import Pretrained, Scratch
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.models.scorer import add_log_prob_head
from rlhf_kit.rewards.config import BuildContext
from rlhf_kit.rollout import Rollout

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """Folder of a tiny model with the weights of a seed."""
    config = Scratch(
        type="scratch",
        vocabulary=tuple(running_sums_vocabulary(5)),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        config={"initializer_range": 0.3},
    )

    def save(seed: int) -> str:
        torch.manual_seed(seed)
        folder: Path = tmp_path_factory.mktemp(f"model{seed}")
        load_model(config).save_pretrained(folder)
        load_tokenizer(config).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def policy_path(save_model: Callable[[int], str]) -> str:
    """Folder of the policy."""
    return save_model(0)


@pytest.fixture
def context(policy_path: str) -> Callable[..., BuildContext]:
    """What a source is built with; keyword arguments configure the policy."""

    def make(functions: Any = None, temperature: float = 1.0, **model: Any) -> BuildContext:
        config = Pretrained.model_validate({"path": policy_path, **model})
        policy = load_model(config)
        add_log_prob_head(policy, temperature)
        return BuildContext(policy, config, temperature, torch.device("cpu"), functions or {})

    return make


@pytest.fixture
def rollout() -> Rollout:
    """Two groups of two: ragged prompts, completions of 3, 1, 2 and 3 tokens, one token of a tool."""
    prompt_mask = torch.tensor([[0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]).bool()
    completion_mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    action_mask = completion_mask.clone()
    action_mask[3, 1] = False
    return Rollout(
        prompts=["1 =", "1 =", "0 1 =", "0 1 ="],
        completions=["1 2", "", "1", "3 4"],
        prompt_ids=torch.tensor([[0, 5, 9], [0, 5, 9], [4, 5, 9], [4, 5, 9]]),
        prompt_mask=prompt_mask,
        completion_ids=torch.tensor([[5, 6, 2], [2, 0, 0], [5, 2, 0], [7, 8, 2]]),
        completion_mask=completion_mask,
        action_mask=action_mask,
        columns={"answer": ["2", "2", "1", "0"], "task": ["a", "b", "a", "b"]},
        group_size=2,
        micro_batch_size=2,
    )
