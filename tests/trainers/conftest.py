"""A tiny policy that is right now and then, and what it takes to train it for a few steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging

from rlhf_kit.data.load import load_data
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.models.scorer import rollout_outputs
from rlhf_kit.rewards.config import SourceConfig
from rlhf_kit.rollout import Rollout
from rlhf_kit.trainers.config import Ppo
from rlhf_kit.trainers.ppo import PpoTrainer
from rlhf_kit.trainers.rollouts import build_rollout
from rlhf_kit.trainers.run_ppo import ppo_args
from rlhf_kit.trainers.setup import StageRun
from rlhf_kit.trainers.trl_compat import Batch

from ..sums import save_policy_of_sums

MODULUS, TERMS = 5, 2
DATA = {"type": "running_sums", "size": 60, "terms": TERMS, "modulus": MODULUS}

torch.set_num_threads(1)
datasets.disable_progress_bars()
logging.disable_progress_bar()


class Recorder(PpoTrainer):
    """The trainer, with its rollouts kept.

    Attributes:
        batches: what was trained on, by rollout.
        rollouts: what the sources saw, by rollout, with the log-probabilities of the policy as it is now.
        samples: the samples of each rollout, as the report gets them: every row, in the order of the data.
    """

    samples: list[list[dict[str, Any]]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[Batch] = []
        self._generated: list[tuple[Any, ...]] = []

    def assign_credit(self, batch: Batch, *args: Any) -> Batch:
        self._generated.append((dict(batch), *args))
        batch = super().assign_credit(batch, *args)
        self.batches.append(dict(batch))
        return batch

    @property
    def rollouts(self) -> list[Rollout]:
        return [self._rebuilt(*generated) for generated in self._generated]

    @torch.no_grad()
    def _rebuilt(self, *generated: Any) -> Rollout:
        size = self.args.per_device_train_batch_size
        options = {"temperature": 1.0, "group_size": self.num_generations, "micro_batch_size": size, "step": 0}
        rollout = build_rollout(*generated, **options)
        return replace(rollout, logprobs={"behaviour": rollout_outputs(self.model, rollout)[0]})


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a one-layer Llama that has seen a little of the task: rewards and lengths of its completions vary."""
    folder = tmp_path_factory.mktemp("policy")
    save_policy_of_sums(folder, MODULUS, TERMS, updates=10)
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
def build(stage: Callable[..., Ppo], tmp_path: Path) -> Callable[..., Recorder]:
    """A trainer of such a stage; `functions` are reward functions by name, `sources` stand in for its rewards."""

    def make(
        functions: Mapping[str, Callable[..., Any]] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        sources: Sequence[SourceConfig] = (),
        **fields: Any,
    ) -> Recorder:
        config = stage(samples={"every": 1, "count": 1000}, **fields)
        config = config.model_copy(update={"rewards": tuple(sources)} if sources else {})
        run = StageRun(tmp_path)
        args = ppo_args(config, run)
        set_seed(args.seed)
        samples: list[list[dict[str, Any]]] = []
        trainer = Recorder(
            config=config,
            model=load_model(config.model),
            processing_class=load_tokenizer(config.model),
            args=args,
            train_dataset=load_data(config.data),
            functions=functions,
            callbacks=callbacks,
            log_samples=lambda step, rows: samples.append(rows),
        )
        trainer.samples = samples
        trainer.remove_callback(PrinterCallback)
        return trainer

    return make


@pytest.fixture
def weights() -> Callable[[torch.nn.Module], dict[str, torch.Tensor]]:
    """A copy of a module's parameters."""
    return lambda module: {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@pytest.fixture
def logged() -> Callable[[Recorder], list[dict[str, float]]]:
    """The log of every step."""
    return lambda trainer: [entry for entry in trainer.state.log_history if "reward" in entry]
