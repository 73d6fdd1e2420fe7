"""What PPO adds to a checkpoint: critic, online sources and their optimisers, normalisers, coefficients."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def save_state(trainer: PpoTrainer, folder: Path) -> None:
    """Write the kit's state into `folder`."""
    state = {
        "kl_coefficient": trainer.kl_coefficient,
        "skipped_updates": trainer.guard.skipped,
        "evaluations": trainer.evaluations,
        "scales": {name: scale.state_dict() for name, scale in trainer.scoring.scales.items()},
    }
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2))
    critic = _critic(trainer)
    if critic is not None:
        save_file(_contiguous(critic.state_dict()), folder / CRITIC_FILE)
    if trainer.average is not None:
        weights = {str(i): p for i, p in enumerate(trainer.average.model.parameters())}
        save_file(_contiguous(weights), folder / AVERAGE_FILE)
    for source in trainer.scoring.sources:
        source_folder = folder / source.name
        source_folder.mkdir(exist_ok=True)
        update = trainer.scoring.online.get(source.name)
        (update or source).save(source_folder)


def load_state(trainer: PpoTrainer, folder: Path) -> None:
    """Read back what `save_state` wrote."""
    state = json.loads((folder / STATE_FILE).read_text())
    trainer.kl_coefficient = state["kl_coefficient"]
    trainer.guard.skipped = state["skipped_updates"]
    trainer.evaluations = [(step, accuracy) for step, accuracy in state["evaluations"]]
    for name, scale in state["scales"].items():
        trainer.scoring.scales[name].load_state_dict(scale)
    critic = _critic(trainer)
    if critic is not None:
        critic.load_state_dict(load_file(folder / CRITIC_FILE))
    if trainer.average is not None:
        weights = load_file(folder / AVERAGE_FILE)
        with torch.no_grad():
            for index, parameter in enumerate(trainer.average.model.parameters()):
                parameter.copy_(weights[str(index)])
    for source in trainer.scoring.sources:
        update = trainer.scoring.online.get(source.name)
        (update or source).load(folder / source.name)


def _critic(trainer: PpoTrainer) -> Any:
    policy = trainer.accelerator.unwrap_model(trainer.model)
    policy = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    return getattr(policy, "critic", None)


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
