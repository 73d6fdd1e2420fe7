"""The verifier's reward is its score on the last action token; a row that it cannot judge is no failure."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlhf_kit.rewards.verifier import VerifierConfig
from rlhf_kit.rollout import Status


@pytest.fixture
def verifier(context):
    return VerifierConfig(type="verifier", verifier="exact").build(context())


def test_right_completions_earn_1_on_their_last_action_token(verifier, rollout) -> None:
    rewards = verifier.score(rollout)  # answers: "2", "2", "1", "0"
    assert rewards.tokens.tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert rewards.status.tolist() == [Status.OK] * 4


def test_rows_without_an_answer_are_not_applicable(verifier, rollout) -> None:
    rewards = verifier.score(replace(rollout, columns={"answer": ["2", None, None, "0"]}))
    assert rewards.status.tolist() == [Status.OK, Status.NOT_APPLICABLE, Status.NOT_APPLICABLE, Status.OK]
    assert rewards.tokens.sum().item() == 1
    rewards = verifier.score(replace(rollout, columns={}))
    assert rewards.status.tolist() == [Status.NOT_APPLICABLE] * 4
    assert (rewards.tokens == 0).all()


def test_a_conversation_is_judged_by_its_last_assistant_message(verifier, rollout) -> None:
    completions = [
        [
            {"role": "assistant", "content": "0"},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "2"},
        ],
        [{"role": "assistant", "content": "2"}, {"role": "tool", "content": "7"}],
        [{"role": "tool", "content": "1"}],
        [{"role": "assistant", "content": "so 0"}],
    ]
    assert verifier.score(replace(rollout, completions=completions)).tokens.sum(dim=1).tolist() == [1, 1, 0, 1]


def test_a_row_without_action_tokens_gets_nothing(verifier, rollout) -> None:
    rewards = verifier.score(replace(rollout, action_mask=torch.zeros_like(rollout.action_mask)))
    assert (rewards.tokens == 0).all()


def test_its_rewards_label_outcomes_and_its_name_is_its_type(verifier) -> None:
    config = VerifierConfig(type="verifier", verifier="math")
    assert config.labels_outcomes and config.kind == "outcome"
    assert verifier.name == "verifier"
    assert VerifierConfig(type="verifier", verifier="math", name="maths").source_name == "maths"
