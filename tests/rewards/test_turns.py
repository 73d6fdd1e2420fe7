"""A turn that called a tool is rewarded on its last token, by whether the tool answered; other tokens get nothing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from rlhf_kit.rewards.turns import TurnsConfig, is_error
from rlhf_kit.rollout import Rollout, Status, Text

OK, FAILED, NOT_APPLICABLE = int(Status.OK), int(Status.FAILED), int(Status.NOT_APPLICABLE)
CALL = {"type": "function", "function": {"name": "calculator", "arguments": {"a": 1, "operation": "+", "b": 2}}}
ERROR = {"role": "tool", "name": "calculator", "content": str({"error": "operation '^' is none of + -"})}
ANSWER = {"role": "tool", "name": "calculator", "content": "3"}
SPEECH = {"role": "assistant", "content": "3"}


def calls(count: int = 1) -> dict[str, object]:
    return {"role": "assistant", "content": "", "tool_calls": [CALL] * count}


def score(completions: Sequence[Text], masks: Sequence[str], **config: float):
    """Rewards of completions with these action masks: `a` an action, `t` a tool's token, `.` padding."""
    actions = torch.tensor([[token == "a" for token in mask] for mask in masks])
    present = torch.tensor([[token != "." for token in mask] for mask in masks])
    prompt = torch.ones(len(masks), 1, dtype=torch.long)
    rollout = Rollout(
        prompts=[[{"role": "user", "content": "1 + 2 ="}]] * len(masks),
        completions=completions,
        prompt_ids=prompt,
        prompt_mask=prompt.bool(),
        completion_ids=torch.ones_like(present, dtype=torch.long),
        completion_mask=present,
        action_mask=actions,
    )
    return TurnsConfig.model_validate({"type": "turns", **config}).build(None).score(rollout)  # pyright: ignore


def test_turns_that_called_are_judged_by_the_answer() -> None:
    completions = [[calls(), ANSWER, calls(), ERROR, SPEECH], [calls(), ERROR, SPEECH]]
    rewards = score(completions, ["aattaata", "aatta..."], success=2, failure=-3)
    assert rewards.tokens.tolist() == [[0, 2, 0, 0, 0, -3, 0, 0], [0, -3, 0, 0, 0, 0, 0, 0]]
    assert rewards.tokens.dtype == torch.float32
    assert rewards.status.tolist() == [OK, OK]
    assert rewards.metrics == {"calls": 1.5, "answered": pytest.approx(1 / 3)}


def test_the_default_rewards() -> None:
    rewards = score([[calls(), ANSWER, calls(), ERROR, SPEECH]], ["atata"])
    assert rewards.tokens.tolist() == [pytest.approx([0.1, 0, -0.1, 0, 0])]


def test_every_call_of_a_turn_must_be_answered() -> None:
    completions = [
        [calls(2), ANSWER, ANSWER, SPEECH],
        [calls(2), ANSWER, ERROR, SPEECH],
        [calls(2), ANSWER, SPEECH],
    ]
    assert score(completions, ["ata"] * 3, success=1, failure=-1).tokens[:, 0].tolist() == [1, -1, -1]


def test_a_call_that_a_limit_left_without_an_answer_fails() -> None:
    rewards = score([[calls(), ANSWER, calls()]], ["aataa"], success=1, failure=-1)
    assert rewards.tokens.tolist() == [[0, 1, 0, 0, -1]]


def test_an_answer_may_fill_the_length_limit() -> None:
    """TRL then has no message behind it: the last tokens are the tool's, and stay without reward."""
    rewards = score([[calls(), ANSWER]], ["aatt"], success=1, failure=-1)
    assert rewards.tokens.tolist() == [[0, 1, 0, 0]]
    assert rewards.status.tolist() == [OK]


def test_no_call_earns_0_and_is_judged() -> None:
    rewards = score([[SPEECH]], ["aa."])
    assert rewards.tokens.tolist() == [[0, 0, 0]]
    assert rewards.status.tolist() == [OK]
    assert rewards.metrics == {"calls": 0}


def test_what_could_not_call_a_tool_is_not_applicable() -> None:
    rewards = score(["3", [calls(), ANSWER, SPEECH]], ["aaa", "ttt"])  # text; a row that was masked whole
    assert rewards.status.tolist() == [NOT_APPLICABLE, NOT_APPLICABLE]
    assert (rewards.tokens == 0).all()
    assert rewards.metrics == {}


@pytest.mark.parametrize("mask", ["aaaaa", "atata", "aaata"])
def test_turns_and_messages_that_differ_in_number_are_never_credited(mask: str) -> None:
    completion = [calls(), ANSWER, calls(), ANSWER, SPEECH, SPEECH]
    rewards = score([completion, [calls(), ANSWER, SPEECH]], [mask, "atta."], success=1)
    assert rewards.status.tolist() == [FAILED, OK]
    assert rewards.tokens.tolist() == [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (str({"error": 'it\'s "odd"'}), True),
        (str({"error": "x", "value": 1}), False),
        ("{'error': ", False),
        ("{1, 2}", False),
        ("error", False),
        ([{"type": "text", "text": "{'error': 'x'}"}], False),
        (None, False),
    ],
)
def test_an_error_is_what_trl_writes_for_one(content: object, error: bool) -> None:
    assert is_error({"role": "tool", "content": content}) is error


def test_it_is_a_process_source_that_labels_no_outcomes() -> None:
    config = TurnsConfig(type="turns")
    assert config.kind == "process" and not config.labels_outcomes and config.source_name == "turns"
