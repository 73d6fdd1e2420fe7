"""A reward for each turn that called a tool: whether the tool answered."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Literal

from rlhf_kit.rewards.config import BuildContext, SourceConfig
from rlhf_kit.rollout import Message, RewardSource, Rollout, Status, Text, TokenRewards


class TurnsConfig(SourceConfig):
    """`success` for a turn whose tool calls were all answered without an error, `failure` for any other that called.

    A call that the length limit or `max_tool_calling_iterations` left without an answer is a failure.
    """

    type: Literal["turns"]
    success: float = 0.1
    failure: float = -0.1

    @property
    def kind(self) -> Literal["outcome", "process"]:
        return "process"

    def build(self, context: BuildContext) -> Turns:
        return Turns(self)


class Turns(RewardSource):
    """Rewards each turn that called a tool, on the last token of the turn.

    A conversation without a call is judged, and earns 0: not to call was the policy's choice, and it is compared with
    the completions of the same prompt that did. Plain text, which cannot call a tool, is not applicable, and so is a
    row without action tokens.
    """

    kind = "process"

    def __init__(self, config: TurnsConfig) -> None:
        self.name = config.source_name
        self._success = config.success
        self._failure = config.failure

    def score(self, rollout: Rollout) -> TokenRewards:
        """`success` or `failure` on the last action token of each turn that called a tool."""
        import torch

        from rlhf_kit.credit.turns import place_at_turn_ends, turn_ids

        turns = turn_ids(rollout.action_mask)
        counts = [int(count) for count in (turns.amax(dim=1) + 1).tolist()] if turns.numel() else [0] * len(rollout)
        judged = [
            call_verdicts(completion, count) for completion, count in zip(rollout.completions, counts, strict=True)
        ]
        values = torch.zeros(len(rollout), max(counts, default=0), device=turns.device)
        status = torch.full((len(rollout),), int(Status.OK), device=turns.device)
        for row, verdicts in enumerate(judged):
            if isinstance(verdicts, Status):
                status[row] = int(verdicts)
                continue
            for turn, answered in enumerate(verdicts):
                if answered is not None:
                    values[row, turn] = self._success if answered else self._failure
        return TokenRewards(place_at_turn_ends(values, turns), status, metrics=self._metrics(judged))

    @staticmethod
    def _metrics(judged: Sequence[Sequence[bool | None] | Status]) -> dict[str, float]:
        """Calling turns a conversation, and the share of them whose tool answered."""
        rows = [verdicts for verdicts in judged if not isinstance(verdicts, Status)]
        calls = [answered for verdicts in rows for answered in verdicts if answered is not None]
        metrics = {"calls": len(calls) / len(rows)} if rows else {}
        return metrics | ({"answered": sum(calls) / len(calls)} if calls else {})


def call_verdicts(completion: Text, turns: int) -> list[bool | None] | Status:
    """For each of a completion's `turns` runs of action tokens: whether its calls were answered; None: it made none.

    TRL keeps one message of the assistant a turn, in order, also where the length limit cut a turn or left none behind
    a tool's answer. Should their numbers differ, no turn can be given its message for certain: the row is
    `Status.FAILED`, and nothing is credited.
    """
    if isinstance(completion, str) or turns == 0:
        return Status.NOT_APPLICABLE
    verdicts = [
        _answered(message, completion[place + 1 :])
        for place, message in enumerate(completion)
        if message.get("role") == "assistant"
    ]
    return verdicts if len(verdicts) == turns else Status.FAILED


def _answered(message: Message, later: Sequence[Message]) -> bool | None:
    """Whether each call of a message has an answer that is no error; None where it calls nothing."""
    calls = message.get("tool_calls")
    if not calls:
        return None
    answers = []
    for answer in later:
        if answer.get("role") != "tool":
            break
        answers.append(answer)
    return len(answers) == len(calls) and not any(is_error(answer) for answer in answers)


def is_error(answer: Message) -> bool:
    """Whether a tool's message is what TRL writes when a tool raises or is not there: `str({"error": ...})`."""
    content = answer.get("content")
    if not isinstance(content, str) or not content.startswith("{"):
        return False
    try:
        value = ast.literal_eval(content)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return isinstance(value, dict) and list(value) == ["error"]
