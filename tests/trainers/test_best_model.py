"""With `load_best_model_at_end`, what is reported is what is exported."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from rlhf_kit.data.load import load_data
from rlhf_kit.evals.accuracy import greedy_scores
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.trainers.run_ppo import run_ppo
from rlhf_kit.trainers.setup import StageRun

from .conftest import DATA

STEPS = 4


def brief(completions, **_) -> list[float]:
    """Teaches the policy to say nothing, so that the last model is not the best."""
    return [-float(len(text)) for text in completions]


@pytest.mark.parametrize("best", [True, False])
def test_the_accuracy_is_that_of_the_exported_model(best, stage, tmp_path) -> None:
    config = stage(
        rewards=[{"type": "function", "function": "brief"}],
        eval_data=DATA,
        evaluation={"verifier": "exact", "max_new_tokens": 5, "batch_size": 60},
        args={
            "max_steps": STEPS,
            "per_device_train_batch_size": 32,
            "learning_rate": 2e-1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "load_best_model_at_end": best,
        },
    )
    results = run_ppo(config, StageRun(tmp_path, functions={"brief": brief}))
    exported = config.model.model_copy(update={"path": str(tmp_path / "model")})
    model, tokenizer = load_model(exported), load_tokenizer(exported)
    scores = greedy_scores(model, tokenizer, load_data(config.eval_data), config.evaluation)
    assert results["eval_accuracy"] == pytest.approx(sum(scores) / len(scores))
    assert results["updates"] == STEPS
    if best:
        assert results["eval_step"] < STEPS and results["eval_accuracy"] > results["eval_accuracy_last"]
    checkpoint = tmp_path / "checkpoints" / f"checkpoint-{results['eval_step']}"
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "model"))
    assert all(torch.equal(before[name], after[name]) for name in after)
