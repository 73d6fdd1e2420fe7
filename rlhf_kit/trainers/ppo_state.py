"""What PPO adds to a checkpoint: critic, online sources and their optimisers, normalisers, coefficients."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from rlhf_kit.trainers.ppo import PpoTrainer

STATE_FILE = "state.json"
CRITIC_FILE = "critic.safetensors"
AVERAGE_FILE = "average.safetensors"
SOURCES_FOLDER = "sources"
WEIGHTS_FILE = "joint.safetensors"


def save_state(trainer: PpoTrainer, folder: Path) -> None:
    """Write the kit's state into `folder`."""
    state = {
        "kl_coefficient": trainer.kl_coefficient,
        "skipped_updates": trainer.guard.skipped,
        "evaluations": trainer.evaluations,
        "last_sampled": trainer.rollout_log.last_sampled,
        "failures": trainer.scoring.failures,
        "scales": {name: scale.state_dict() for name, scale in trainer.scoring.scales.items()},
    }
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2))
    critic = _critic(trainer)
    if critic is not None:
        save_file(_contiguous(critic.state_dict()), folder / CRITIC_FILE)
    if trainer.average is not None:
        save_file(_numbered(trainer.average.parameters()), folder / AVERAGE_FILE)
    for source in trainer.scoring.sources:
        source_folder = folder / SOURCES_FOLDER / source.name
        source_folder.mkdir(parents=True, exist_ok=True)
        update = trainer.scoring.online.get(source.name)
        (update or source).save(source_folder)
        if update is None and source.trainable_parameters():  # it learns in the policy's engine
            save_file(_numbered(source.trainable_parameters()), source_folder / WEIGHTS_FILE)


def load_state(trainer: PpoTrainer, folder: Path) -> None:
    """Read back what `save_state` wrote."""
    state = json.loads((folder / STATE_FILE).read_text())
    trainer.kl_coefficient = state["kl_coefficient"]
    trainer.guard.skipped = state["skipped_updates"]
    trainer.rollout_log.last_sampled = state["last_sampled"]
    trainer.scoring.failures = dict(state["failures"])
    trainer.evaluations = [(step, accuracy) for step, accuracy in state["evaluations"]]
    for name, scale in state["scales"].items():
        trainer.scoring.scales[name].load_state_dict(scale)
    critic = _critic(trainer)
    if critic is not None:
        critic.load_state_dict(load_file(folder / CRITIC_FILE))
    if trainer.average is not None:
        _copy_into(trainer.average.parameters(), folder / AVERAGE_FILE)
    for source in trainer.scoring.sources:
        source_folder = folder / SOURCES_FOLDER / source.name
        update = trainer.scoring.online.get(source.name)
        (update or source).load(source_folder)
        if update is None and source.trainable_parameters():
            _copy_into(source.trainable_parameters(), source_folder / WEIGHTS_FILE)
            for parameter in source.trainable_parameters():  # reading an adapter back freezes the others
                parameter.requires_grad_(True)


def _critic(trainer: PpoTrainer) -> Any:
    policy = trainer.accelerator.unwrap_model(trainer.model)
    policy = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    return getattr(policy, "critic", None)


def _numbered(parameters: Iterable[Tensor]) -> dict[str, Tensor]:
    return _contiguous({str(index): parameter for index, parameter in enumerate(parameters)})


def _copy_into(parameters: Iterable[Tensor], file: Path) -> None:
    weights = load_file(file)
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            parameter.copy_(weights[str(index)])


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
