"""Implicit process reward model: the log-ratio of two language models as a per-token reward."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveFloat

from rlhf_kit.config import Location
from rlhf_kit.models.config import Pretrained, Scratch, same_model
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.config import BuildContext, Learning, SourceConfig
from rlhf_kit.rollout import RewardSource, Rollout, TokenRewards

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from rlhf_kit.models.scorer import Scorer

RUNNING_RATE_DECAY = 0.9
PRM_RECORD = "prm.json"


class Online(Learning):
    """How the PRM learns from the outcomes of each rollout (PRIME, arXiv 2502.01456).

    `before_scoring` steps the PRM with its own optimiser and clip before it scores the rollout; `with_policy` adds
    its loss to the policy's, in the same engine and optimiser, in the first epoch over the rollout.
    """

    order: Literal["before_scoring", "with_policy"] = "before_scoring"
    learning_rate: PositiveFloat = 1e-6
    loss: Literal["ce"] = "ce"

    @property
    def in_policy_engine(self) -> bool:
        return self.order == "with_policy"


class ImplicitPrmConfig(SourceConfig):
    """Token reward `beta * (log phi - log ref)` (Free Process Rewards without Process Labels, arXiv 2412.01981).

    `path` is the PRM's folder or hub id; without it the PRM starts from the policy. `reference` is the policy's
    initial weights (the papers' setting; with a `path` that a `reward` stage wrote, what that stage started from),
    the policy that sampled (`behaviour`) or the policy's moving average (`ema`).
    """

    type: Literal["implicit_prm"]
    path: Location | None = None
    beta: PositiveFloat = 0.05
    reference: Literal["initial", "behaviour", "ema"] = "behaviour"
    offset: Literal["none", "running", "prompt"] = "running"
    online: Online | None = None

    @property
    def kind(self) -> Literal["outcome", "process"]:
        return "process"

    @property
    def learning(self) -> Online | None:
        return self.online

    def problems(self, policy: Pretrained | Scratch, rewards: Sequence[SourceConfig]) -> Iterator[Problem]:
        if isinstance(policy, Scratch):
            remedy = "train it by an sft stage first, and write model.path: ${stages.sft.model}"
            yield Problem("", "an implicit PRM needs a policy with weights to start from", remedy=remedy)
        if self.online and not any(source.labels_outcomes for source in rewards):
            remedy = "add a verifier, or a function with bounded: true, to rewards"
            yield Problem("online", "an online PRM learns from outcomes, and no source gives them", remedy=remedy)
        if self.path is None and not self.online and self.reference == "initial":
            remedy = "set path to a trained PRM, or set online"
            yield Problem("", "a frozen copy of the policy against itself rewards every token with 0", remedy=remedy)

    def files(self) -> Iterator[tuple[str, str, bool]]:
        if self.path:
            yield "path", self.path, True

    def build(self, context: BuildContext) -> ImplicitPrm:
        """The source, its PRM equal to the policy where no `path` is given."""
        from rlhf_kit.rewards.scorers import scorer_of

        scorer = scorer_of(self.path, self.source_name, context, trainable=self.online is not None)
        return ImplicitPrm(self, scorer, _own_reference(self, context))


class ImplicitPrm(RewardSource):
    """Scores tokens by how much likelier the PRM finds them than its reference does.

    At initialisation PRM and reference are the same weights, scored by the same code in the same batches, so every
    reward is exactly 0.
    """

    kind = "process"

    def __init__(self, config: ImplicitPrmConfig, scorer: Scorer, reference: Scorer | None = None) -> None:
        self.name = config.source_name
        self.config = config
        self.scorer = scorer
        self.running_rate: float | None = None
        self._own_reference = reference
        self._reference_key = "reference" if config.reference == "initial" else config.reference
        self.needs = frozenset() if reference is not None else frozenset({self._reference_key})

    def score(self, rollout: Rollout) -> TokenRewards:
        """`beta * (log phi - log ref)` of every action token."""
        import torch

        from rlhf_kit.rollout import Status

        with torch.no_grad():
            rewards = self._rewards(rollout)
        return TokenRewards(rewards, torch.full((len(rollout),), int(Status.OK), device=rewards.device))

    def log_probs(self, rollout: Rollout) -> dict[str, Tensor]:
        """Those of a reference of its own."""
        return {} if self._own_reference is None else {self._own_reference_key: self.reference_log_probs(rollout)}

    @property
    def _own_reference_key(self) -> str:
        return f"reference of {self.name}"

    def observe(self, outcomes: Tensor) -> None:
        """Update the running success rate with the outcomes of all ranks."""
        rate = outcomes.mean().item()
        before = rate if self.running_rate is None else self.running_rate
        self.running_rate = RUNNING_RATE_DECAY * before + (1 - RUNNING_RATE_DECAY) * rate

    def loss(self, rollout: Rollout, outcomes: Tensor) -> Tensor:
        """Cross-entropy of each row's summed reward against its outcome, (B,)."""
        from rlhf_kit.credit.implicit import outcome_cross_entropy

        return outcome_cross_entropy(self._rewards(rollout), outcomes, self.offsets(rollout, outcomes))

    def reference_log_probs(self, rollout: Rollout) -> Tensor:
        """What the PRM is compared with, (B, T): the rollout's log-probabilities, or the PRM's own reference."""
        import torch

        if self._own_reference is None:
            return rollout.logprobs[self._reference_key]
        if self._own_reference_key in rollout.logprobs:
            return rollout.logprobs[self._own_reference_key]
        with torch.no_grad():
            return self._own_reference(rollout)

    def offsets(self, rollout: Rollout, outcomes: Tensor) -> Tensor:
        """The log-odds of success before a row is read, (B,)."""
        import torch

        from rlhf_kit.credit.implicit import log_odds

        if self.config.offset == "none":
            return torch.zeros_like(outcomes)
        if self.config.offset == "prompt":
            if rollout.peer_outcomes is None:
                raise ValueError("offset 'prompt' needs Rollout.peer_outcomes, which the trainer fills in")
            return log_odds(rollout.peer_outcomes)
        rate = outcomes.mean() if self.running_rate is None else outcomes.new_tensor(self.running_rate)
        return log_odds(rate).expand_as(outcomes)

    def trainable_parameters(self) -> list[Parameter]:
        return list(self.scorer.parameters()) if self.config.online is not None else []

    def save(self, folder: Path) -> None:
        """Write what is not a weight; the trainer saves `trainable_parameters`."""
        (folder / "implicit_prm.json").write_text(json.dumps({"running_rate": self.running_rate}))

    def load(self, folder: Path) -> None:
        self.running_rate = json.loads((folder / "implicit_prm.json").read_text())["running_rate"]

    def _rewards(self, rollout: Rollout) -> Tensor:
        from rlhf_kit.credit.implicit import implicit_rewards

        return implicit_rewards(
            self.scorer(rollout), self.reference_log_probs(rollout), rollout.action_mask, self.config.beta
        )


def read_prm_record(path: str, remote: bool = False) -> dict[str, Any] | None:
    """What a `reward` stage wrote beside a PRM: the `beta` it was trained with and its `reference`.

    With `remote`, that of a PRM on the hub as well.
    """
    record = Path(path) / PRM_RECORD
    if remote and not Path(path).exists():
        from transformers.utils.hub import cached_file

        found = cached_file(path, PRM_RECORD, _raise_exceptions_for_missing_entries=False)
        record = Path(found) if found is not None else record
    return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None


def _own_reference(config: ImplicitPrmConfig, context: BuildContext) -> Scorer | None:
    """The reference that a `reward` stage recorded, unless the policy's initial weights are the same model."""
    if config.path is None or config.reference != "initial":
        return None
    record = read_prm_record(config.path, remote=True)
    if record is None:
        return None
    path = record["reference"]
    if isinstance(context.policy_config, Pretrained) and same_model(path, context.policy_config.path):
        return None
    from rlhf_kit.rewards.scorers import whole_model

    return whole_model(path, config.source_name, context)
