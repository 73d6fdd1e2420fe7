"""A model that was trained by DPO is a reward: on its pairs, in an evaluation, and in PPO on tokens or segments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_kit.evals.policy import FrozenPolicy
from rlhf_kit.evals.run import run_eval
from rlhf_kit.evals.stage import Eval
from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.loading import load_model
from rlhf_kit.models.scorer import add_log_prob_head, rollout_outputs
from rlhf_kit.models.tokenizers import SPECIAL_TOKENS
from rlhf_kit.rewards.dpo_implicit import DpoImplicitConfig
from rlhf_kit.trainers.config import Preference
from rlhf_kit.trainers.preference import run_preference
from rlhf_kit.trainers.setup import StageRun

BETA = 0.5
PAIRS = [{"prompt": f"{number} =", "chosen": f"{number} {number}", "rejected": "4 4"} for number in range(4)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Data of four pairs."""
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, PAIRS)))
    return {"type": "jsonl", "path": str(path)}


@pytest.fixture(scope="module")
def trained(policy_path: str, rows: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the policy after a DPO stage on the pairs."""
    args = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "gradient_checkpointing": False}
    fields = {"model": {"path": policy_path}, "objective": {"type": "dpo", "beta": BETA}, "data": rows}
    folder = tmp_path_factory.mktemp("dpo")
    run_preference(
        Preference.model_validate({"type": "preference", **fields, "trainer": {"args": args}}), StageRun(folder)
    )
    return str(folder / "model")


def test_on_its_training_pairs_the_chosen_have_more_of_it(trained: str, policy_path: str) -> None:
    sides = [{"prompt": row["prompt"], "completion": row[side]} for row in PAIRS for side in ("chosen", "rejected")]
    policy = FrozenPolicy(Pretrained(path=policy_path), batch_size=4)
    source = DpoImplicitConfig(type="dpo_implicit", path=trained, beta=BETA)  # compared with what the stage wrote down
    totals = policy.scorer_of([source])(sides, lambda done, total: None).sources["dpo_implicit"].totals.reshape(-1, 2)
    assert (totals[:, 0] > totals[:, 1]).all()
    before = DpoImplicitConfig(type="dpo_implicit", path=policy_path, reference=trained, beta=BETA)
    backwards = policy.scorer_of([before])(sides, lambda done, total: None).sources["dpo_implicit"].totals
    assert backwards.reshape(-1, 2) == pytest.approx(-totals, abs=1e-5)


def test_it_is_the_reward_model_of_an_evaluation(
    trained: str, policy_path: str, rows: dict[str, Any], tmp_path: Path
) -> None:
    fields = {"model": {"path": policy_path}, "evals": {"pairs": {"type": "preference_accuracy", "data": rows}}}
    source = {"type": "dpo_implicit", "path": trained, "per": "completion"}
    run_eval(Eval.model_validate({"type": "eval", **fields, "rewards": [source]}), tmp_path)
    figures = json.loads((tmp_path / "evals" / "pairs.json").read_text())["figures"]
    assert figures["dpo_implicit.accuracy"]["value"] == 1.0


def by_word(values: list[float], words: list[bool]) -> list[float]:
    """Sums at each word's end: to a word belongs what follows it without text, to the first what precedes it too."""
    sums, total = [0.0] * len(values), 0.0
    for place, value in enumerate(values):
        total += value
        if place + 1 == len(values) or (words[place + 1] and any(words[: place + 1])):
            sums[place], total = total, 0.0
    return sums


@pytest.mark.parametrize("per", ["token", "segment"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ppo_takes_it_as_a_dense_reward(build, trained: str, policy_path: str, per: str, temperature: float) -> None:
    source = {"type": "dpo_implicit", "path": trained, "per": per, "beta": BETA}
    source |= {"segments": {"by": "token"}} if per == "segment" else {}
    trainer = build(
        rewards=[{"type": "verifier", "verifier": "exact"}, source],
        credit={"estimator": "reinforce", "whiten": False, "horizon": "immediate"},
        args={"max_steps": 1, "temperature": temperature},
    )
    start, pi = (load_model(Pretrained(path=path)) for path in (policy_path, trained))
    for model in (start, pi):
        add_log_prob_head(model, temperature)
    trainer.train()
    (rollout,) = trainer.rollouts
    with torch.no_grad():
        ratio = rollout_outputs(pi, rollout)[0] - rollout_outputs(start, rollout)[0]
    expected = torch.where(rollout.action_mask, BETA * ratio, 0.0)
    for row, sample in enumerate(trainer.samples[0]):
        given, of_row = sample["rewards"]["dpo_implicit"], expected[row].tolist()[: len(sample["tokens"])]
        words = [number >= len(SPECIAL_TOKENS) for number in rollout.completion_ids[row].tolist()]
        assert given == pytest.approx(of_row if per == "token" else by_word(of_row, words), abs=1e-4)
    (logs,) = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert 0 < logs["credit/share/dpo_implicit"] < 1
    assert logs["credit/share/dpo_implicit"] + logs["credit/share/verifier"] == pytest.approx(1)
    totals = expected.sum(dim=1)
    assert logs["rewards/dpo_implicit/mean"] == pytest.approx(totals.mean().item(), abs=1e-3)
