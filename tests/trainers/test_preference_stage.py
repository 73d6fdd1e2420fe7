"""The `preference` stage trains by every objective, on the model's own probabilities."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from rlhf_kit.data.load import load_data
from rlhf_kit.errors import RunError
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.trainers.config import Preference
from rlhf_kit.trainers.preference import run_preference
from rlhf_kit.trainers.setup import StageRun

ROWS = [
    {
        "prompt": f"{number} =",
        "corrupted_prompt": f"{(number + 1) % 4} =",
        "judged_prompt": f"4 {number} =",
        "chosen": f"{number} {number}",
        "rejected": "4 4",
        "completion": f"{number} {number}" if number % 2 else "4 4 4",
        "label": number % 2,
        "scope": number % 3,
    }
    for number in range(4)
]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"loss_type": ["sigmoid"]},
    "dpo, two losses": {"type": "dpo", "loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.5, 1.0]},
    "kto": {},
    "orpo": {},
    "orpo with the prompt": {"type": "orpo", "nll": "prompt_and_completion"},
    "cringe": {"top_k": 3},
    "pairwise_cringe": {"top_k": 3},
    "pmpo": {},
    "cut": {},
    "i_orpo": {},
    "c3po": {},
    "nca": {},
    "ce": {},
}
LORA = {"type": "lora", "r": 4}
Make = Callable[..., Preference]


@pytest.fixture
def make(policy_path: str, tmp_path: Path) -> Make:
    """A stage on the tiny policy; `args` are those of its trainer."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))

    def stage(objective: str, args: dict[str, Any] | None = None, **fields: Any) -> Preference:
        given = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1}
        return Preference.model_validate(
            {
                "type": "preference",
                "objective": {"type": objective.split(",")[0].split(" ")[0], **OBJECTIVES[objective]},
                "data": {"type": "jsonl", "path": str(path)},
                "trainer": {"args": {**given, "gradient_checkpointing": False, **(args or {})}},
                **fields,
                "model": {"path": policy_path, **fields.get("model", {})},
            }
        )

    return stage


class Logs(TrainerCallback):
    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.entries.append(dict(logs))


@pytest.mark.parametrize("peft", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_and_its_model_loads_anywhere(
    objective: str, peft: Any, make: Make, policy_path: str, tmp_path: Path
) -> None:
    logs = Logs()
    results = run_preference(make(objective, model={"peft": peft}), StageRun(tmp_path / "run", callbacks=[logs]))
    assert results["updates"] == 3
    losses = [entry["loss"] for entry in logs.entries if "loss" in entry]
    assert len(losses) == 3 and all(torch.tensor(losses).isfinite())
    start = AutoModelForCausalLM.from_pretrained(policy_path).state_dict()
    if peft is None:
        trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
        assert any(not torch.equal(trained[name], start[name]) for name in start)
    else:
        adapter = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == policy_path


@pytest.mark.parametrize("objective", ["orpo", "i_orpo", "nca", "pairwise_cringe", "dpo"])
def test_the_model_learns_to_prefer_what_was_chosen(objective: str, make: Make, tmp_path: Path) -> None:
    stage = make(objective, {"max_steps": 30, "learning_rate": 3e-2})
    stage = stage.model_copy(update={"eval_data": stage.data})
    results = run_preference(stage, StageRun(tmp_path / "run"))
    assert results["eval_rewards/accuracies"] == 1.0
    assert results["eval_rewards/margins"] > 0


def test_the_first_loss_of_ce_and_nca_is_that_of_equal_models(make: Make, tmp_path: Path) -> None:
    for objective, expected in (("ce", 1.0), ("nca", 2.0)):
        logs = Logs()
        run_preference(make(objective, {"max_steps": 1}), StageRun(tmp_path / objective, callbacks=[logs]))
        assert logs.entries[0]["loss"] == pytest.approx(expected * torch.tensor(2.0).log().item(), abs=1e-6)


def test_the_loss_of_orpo_is_the_formula_on_the_models_own_probabilities(
    make: Make, policy_path: str, tmp_path: Path
) -> None:
    logs, stage = Logs(), make("orpo", {"max_steps": 1, "per_device_train_batch_size": 4})
    model, tokenizer = load_model(stage.model), load_tokenizer(stage.model)

    def mean_log_prob(prompt: str, completion: str) -> torch.Tensor:
        before = tokenizer(prompt)["input_ids"]
        ids = torch.tensor(
            [[*before, *tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
        )
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
        return log_p[len(before) - 1 :].mean()

    losses = []
    for row in load_data(stage.data).to_list():
        chosen, rejected = (mean_log_prob(row["prompt"], row[name]) for name in ("chosen", "rejected"))
        odds = [p - torch.log1p(-p.exp()) for p in (chosen, rejected)]
        losses.append(-chosen - 0.1 * torch.nn.functional.logsigmoid(odds[0] - odds[1]))
    run_preference(stage, StageRun(tmp_path / "run", callbacks=[logs]))
    assert logs.entries[0]["loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


def test_a_stage_that_was_stopped_ends_with_the_same_weights(make: Make, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    stage = make("pairwise_cringe", {"max_steps": 4, "save_strategy": "steps", "save_steps": 2})
    run_preference(stage, StageRun(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run_preference(stage, StageRun(tmp_path / "stopped", callbacks=[Stop()]))
    run_preference(stage, StageRun(tmp_path / "stopped"))
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("whole", "stopped"))
    for name, weight in before.state_dict().items():
        assert torch.equal(weight, after.state_dict()[name]), name


@pytest.mark.parametrize("objective", ["orpo", "kto"])
def test_a_missing_column_is_named(objective: str, make: Make, tmp_path: Path) -> None:
    stage = make(objective)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1 =", "answer": "1"}))
    with pytest.raises(RunError, match=rf"objective {objective} learns from .* only prompt, answer"):
        run_preference(stage, StageRun(tmp_path / "run"))


def test_a_broken_row_is_named(make: Make, tmp_path: Path) -> None:
    stage = make("c3po")
    rows = [{**ROWS[0]}, {**ROWS[1], "scope": None}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(RunError, match="row 2: 'scope' is missing"):
        run_preference(stage, StageRun(tmp_path / "run"))
