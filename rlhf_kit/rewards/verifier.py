"""Outcome reward from a task's checker."""

from __future__ import annotations

from typing import Literal

from rlhf_kit.rewards.config import BuildContext, SourceConfig
from rlhf_kit.rollout import RewardSource, Rollout, TokenRewards


class VerifierConfig(SourceConfig):
    """1 for a right answer, 0 for a wrong one (reasoning-gym's scorer may lie between)."""

    type: Literal["verifier"]
    verifier: Literal["exact", "math", "reasoning_gym"]

    @property
    def kind(self) -> Literal["outcome", "process"]:
        return "outcome"

    @property
    def labels_outcomes(self) -> bool:
        """An online PRM may learn from its rewards."""
        return True

    def build(self, context: BuildContext) -> Verifier:
        return Verifier(self)


class Verifier(RewardSource):
    """Checks the answer of each completion against the row's own columns."""

    kind = "outcome"

    def __init__(self, config: VerifierConfig) -> None:
        self.name = config.source_name
        self._verifier = config.verifier

    def score(self, rollout: Rollout) -> TokenRewards:
        """The checker's score on the last action token; a row without an answer column is not applicable."""
        from rlhf_kit.data.messages import completion_text
        from rlhf_kit.data.verifiers import verify
        from rlhf_kit.rewards.outcome import outcome_rewards

        scores = [
            verify(self._verifier, completion_text(completion), {k: v[i] for k, v in rollout.columns.items()})
            for i, completion in enumerate(rollout.completions)
        ]
        return outcome_rewards(scores, rollout)
