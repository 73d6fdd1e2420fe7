"""Two processes train a segment model, agree on how good it is, write it whole, and let it reward a policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForTokenClassification, AutoTokenizer

from rlhf_kit.models.classifiers import Classifier
from rlhf_kit.recipe import load_recipe
from rlhf_kit.trainers.segment import evaluate, judge, read_texts
from rlhf_kit.trainers.setup import StageRun

from .conftest import launch

SCRIPT = str(Path(__file__).parent / "killed.py")
TEXTS = ["0 1", "3 4", "1 1", "5 0", "2 2", "0 3", "4 4", "1 5", "6", "0", "5 5 5", "2 0 1"]


def recipe(folder: Path, policy: Path, peft: Any) -> Path:
    """Every 0 is marked; the policy is a small model that has numbers for words."""
    rows = [
        {
            "prompt": f"{k % 7} =",
            "text": text,
            "spans": [{"start": j, "end": j + 1, "label": "zero"} for j, digit in enumerate(text) if digit == "0"],
        }
        for k, text in enumerate(TEXTS)
    ]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    args = {"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 5e-2, "logging_steps": 1}
    args = {**args, "gradient_checkpointing": False}
    spans = {
        "type": "segment",
        "model": {"path": str(policy), "peft": peft},
        "labels": ["zero"],
        "prompt_template": "{prompt}",
        "data": {"type": "jsonl", "path": str(data), "limit": 8},
        "eval_data": {"type": "jsonl", "path": str(data), "skip": 8},
        "trainer": {"args": args},
    }
    ppo = {
        "type": "ppo",
        "model": {"path": str(policy)},
        "data": {"type": "jsonl", "path": str(data)},
        "rewards": [{"type": "segment_model", "path": "${stages.spans.model}", "labels": {"zero": -1.0}}],
        "credit": {"estimator": "rloo"},
        "trainer": {"args": {**args, "max_steps": 2, "num_generations": 2, "max_completion_length": 4}},
    }
    file = folder / "recipe.yaml"
    content = {"name": "run", "runs_dir": str(folder), "stages": {"spans": spans, "ppo": ppo}}
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(("world", "peft"), [("cpu_ddp", None), ("zero3", {"type": "lora", "r": 2})])
def test_what_two_processes_wrote_is_what_they_evaluated(
    world: str, peft: Any, tmp_path: Path, small_policy: Path
) -> None:
    file = recipe(tmp_path, small_policy, peft)
    launch(world, SCRIPT, str(file))
    run = tmp_path / "run"
    results = json.loads((run / "spans" / "result.json").read_text())
    assert results["updates"] == 6
    assert json.loads((run / "ppo" / "result.json").read_text())["updates"] == 2
    logged = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("rewards/segment_model/mean", 0) < 0 for line in logged)

    stage: Any = load_recipe(file, world_size=2).stages["spans"]
    model = AutoModelForTokenClassification.from_pretrained(run / "spans" / "model").eval()
    classifier = Classifier(model, AutoTokenizer.from_pretrained(run / "spans" / "model"))
    held_out = read_texts(stage, "eval_data")
    scores = evaluate(stage, held_out, judge(stage, classifier, held_out, StageRun(tmp_path)))
    assert scores == {name.removeprefix("eval_"): x for name, x in results.items() if name.startswith("eval_")}
    untrained = AutoModelForTokenClassification.from_pretrained(small_policy)
    assert not model.model.layers[0].mlp.up_proj.weight.equal(untrained.model.layers[0].mlp.up_proj.weight)
