"""Two processes run a whole pipeline: a model from scratch, a PRM on what it samples, PPO with that PRM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from .conftest import launch

SCRIPT = str(Path(__file__).parent / "killed.py")
SUMS = {"type": "running_sums", "terms": 2, "modulus": 5}
UPDATES = {"sft": 3, "prm": 2, "ppo": 2}


def trainer(stage: str, **args: Any) -> dict[str, Any]:
    given = {"per_device_train_batch_size": 4, "max_steps": UPDATES[stage], "learning_rate": 1e-2, "logging_steps": 1}
    return {"args": {**given, "gradient_checkpointing": False, **args}}


def recipe(folder: Path) -> Path:
    """Of the 13 prompts that are sampled from, one process has six and the other seven."""
    scratch = {"type": "scratch", "vocabulary": "running_sums", "hidden_size": 16, "intermediate_size": 32}
    start = {"path": "${stages.sft.model}"}
    evaluation = {"verifier": "exact", "max_new_tokens": 3, "batch_size": 4}
    sampled = {
        "type": "sampled",
        "model": "${stages.sft.model}",
        "prompts": {**SUMS, "size": 13, "seed": 1},
        "verifier": "exact",
        "num_generations": 4,
        "max_new_tokens": 4,
        "batch_size": 8,
    }
    stages = {
        "sft": {
            "type": "sft",
            "model": {**scratch, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32},
            "data": {**SUMS, "size": 40},
            "trainer": trainer("sft"),
        },
        "prm": {
            "type": "reward",
            "model": start,
            "objective": "ce",
            "offset": "running",
            "data": sampled,
            "trainer": trainer("prm"),
        },
        "ppo": {
            "type": "ppo",
            "model": start,
            "data": {**SUMS, "size": 8},
            "eval_data": {**SUMS, "size": 5, "seed": 2},
            "evaluation": evaluation,
            "rewards": [
                {"type": "verifier", "verifier": "exact"},
                {"type": "implicit_prm", "path": "${stages.prm.model}", "online": {"learning_rate": 1e-3}},
            ],
            "credit": {"estimator": "prime"},
            "trainer": trainer("ppo", num_generations=4, max_completion_length=4),
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({"name": "run", "runs_dir": str(folder), "stages": stages}))
    return file


@pytest.mark.parametrize("world", ["cpu_ddp", "zero3"])
def test_a_pipeline_ends_with_a_model_of_each_stage(world: str, tmp_path: Path) -> None:
    launch(world, SCRIPT, str(recipe(tmp_path)))
    run = tmp_path / "run"
    manifest = json.loads((run / "manifest.json").read_text())
    assert "finished" in manifest and manifest["world_size"] == 2
    for stage, updates in UPDATES.items():
        assert json.loads((run / stage / "result.json").read_text())["updates"] == updates
        assert AutoModelForCausalLM.from_pretrained(run / stage / "model").config.hidden_size == 16
