"""A tiny policy that is right now and then, and what it takes to train it for a few steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import TrainerCallback
from transformers.utils import logging

from rlhf_kit.data.tasks import running_sums, running_sums_vocabulary
from rlhf_kit.models.config import Scratch
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.trainers.config import Ppo
from rlhf_kit.trainers.ppo import PpoTrainer
from rlhf_kit.trainers.run_ppo import build_ppo_trainer
from rlhf_kit.trainers.setup import StageRun

MODULUS, TERMS = 5, 2
DATA = {"type": "running_sums", "size": 60, "terms": TERMS, "modulus": MODULUS}

torch.set_num_threads(1)
datasets.disable_progress_bars()
logging.disable_progress_bar()


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a one-layer Llama that has seen a little of the task: rewards and lengths of its completions vary."""
    torch.manual_seed(0)
    config = Scratch(
        type="scratch",
        vocabulary=tuple(running_sums_vocabulary(MODULUS)),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model, tokenizer = load_model(config), load_tokenizer(config)
    rows = running_sums(60, TERMS, MODULUS, seed=9)
    ids = tokenizer([f"{row['prompt']} {row['completion']} <eos>" for row in rows], return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("policy")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def stage(policy_path: str) -> Callable[..., Ppo]:
    """A `ppo` stage on the tiny policy: keyword arguments are its fields, `args` those of its trainer."""

    def make(
        rewards: Sequence[Mapping[str, Any]] = ({"type": "verifier", "verifier": "exact"},),
        credit: Mapping[str, Any] | None = None,
        model: Mapping[str, Any] | None = None,
        args: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Ppo:
        trainer_args = {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 5,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "gradient_checkpointing": False,
            **(args or {}),
        }
        return Ppo.model_validate(
            {
                "type": "ppo",
                "model": {"path": policy_path, **(model or {})},
                "data": DATA,
                "rewards": list(rewards),
                "credit": {"estimator": "rloo", **(credit or {})},
                "trainer": {"args": trainer_args},
                **fields,
            }
        )

    return make


@pytest.fixture
def build(stage: Callable[..., Ppo], tmp_path: Path) -> Callable[..., PpoTrainer]:
    """A trainer of such a stage; `functions` are reward functions by name."""

    def make(
        functions: Mapping[str, Callable[..., Any]] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **fields: Any,
    ) -> PpoTrainer:
        return build_ppo_trainer(
            stage(**fields), StageRun(tmp_path, functions=functions or {}, callbacks=list(callbacks))
        )

    return make


@pytest.fixture
def batch_of() -> Callable[[PpoTrainer], list[dict[str, Any]]]:
    """The rows of a trainer's first rollout."""

    def rows(trainer: PpoTrainer) -> list[dict[str, Any]]:
        trainer.model.train()
        return next(iter(trainer.get_train_dataloader()))

    return rows


@pytest.fixture
def weights() -> Callable[[torch.nn.Module], dict[str, torch.Tensor]]:
    """A copy of a module's parameters."""
    return lambda module: {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@pytest.fixture
def logged() -> Callable[[PpoTrainer], list[dict[str, float]]]:
    """The log of every step."""
    return lambda trainer: [entry for entry in trainer.state.log_history if "reward" in entry]
