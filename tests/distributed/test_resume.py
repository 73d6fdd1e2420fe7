"""Two processes that are killed and started again end bit for bit as two that were not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_kit.runs.metrics import read_metrics

from .conftest import launch

SCRIPT = str(Path(__file__).parent / "killed.py")
CLOCK = ("time", "step_time", "profiling", "train_")  # of the machine, or of the last attempt alone
UPDATES = 5


def recipe(folder: Path, policy: Path, model: dict[str, Any], prm: dict[str, Any]) -> Path:
    """A checkpoint after the third update: between two of one rollout, or with a joint PRM in the second epoch."""
    joint = prm["online"].get("order") == "with_policy"
    content = {
        "name": "run",
        "runs_dir": str(folder),
        "type": "ppo",
        "model": {"path": str(policy), **model},
        "data": {"type": "running_sums", "size": 8, "terms": 2, "modulus": 5},
        "rewards": [{"type": "verifier", "verifier": "exact"}, {"type": "implicit_prm", "beta": 0.5, **prm}],
        "credit": {"estimator": "gae"},
        "trainer": {
            "args": {
                "per_device_train_batch_size": 8,
                "num_generations": 4,
                "num_iterations": 1 if joint else 2,
                "max_completion_length": 5,
                "max_steps": UPDATES,
                "learning_rate": 1e-2,
                "logging_steps": 2,
                "save_strategy": "steps",
                "save_steps": 3,
            }
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("world", "model", "prm"),
    [
        ("cpu_ddp", {}, {"online": {"learning_rate": 1e-3}, "reference": "ema"}),
        ("zero2", {}, {"online": {"learning_rate": 1e-3, "order": "with_policy"}}),
        ("zero3", {"peft": {"type": "lora", "r": 2}}, {"online": {"learning_rate": 1e-3}, "reference": "ema"}),
    ],
)
def test_killed_processes_go_on_to_the_same_end(
    world: str, model: dict[str, Any], prm: dict[str, Any], small_policy: Path, tmp_path: Path
) -> None:
    folders = tmp_path / "whole", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
    whole, killed = (recipe(folder, small_policy, model, prm) for folder in folders)
    launch(world, SCRIPT, str(whole))
    launch(world, SCRIPT, str(killed), "micro_step", "5", succeeds=False)
    assert (folders[1] / "run" / "checkpoints" / "checkpoint-3").is_dir()
    launch(world, SCRIPT, str(killed))

    compared = [path.relative_to(folders[0]) for path in folders[0].glob("run/*/*.safetensors")]
    assert {path.parts[1] for path in compared} == {"model", "prm"}
    for path in compared:
        before, after = load_file(folders[0] / path), load_file(folders[1] / path)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), path
    lines = [
        [{key: value for key, value in line.items() if not key.startswith(CLOCK)} for line in read_metrics(folder)]
        for folder in (folders[0] / "run", folders[1] / "run")
    ]
    assert lines[0] == lines[1]
