"""What every reward source's configuration shares: its name, weight, schedule and normalisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, StringConstraints

from rlhf_kit.config import Config
from rlhf_kit.problems import Problem
from rlhf_kit.rollout import RewardSource

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf_kit.models.config import Pretrained, Scratch


SourceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]


class Schedule(Config):
    """A weight that moves linearly from `start` to `end` over `steps` optimiser steps."""

    start: float
    end: float
    steps: PositiveInt

    def at(self, step: int) -> float:
        """The weight after `step` optimiser steps."""
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


class Learning(Config):
    """How a source learns from the outcomes of each rollout before it scores it: with an optimiser of its own."""

    learning_rate: PositiveFloat
    max_grad_norm: PositiveFloat = 10.0

    @property
    def in_policy_engine(self) -> bool:
        """Whether the policy's optimiser steps it instead."""
        return False


@dataclass(frozen=True)
class BuildContext:
    """What a source may use when it is built: the policy's weights, never the trainer.

    Attributes:
        policy: the policy before training; a source may add an adapter of its own to a PEFT model.
        policy_config: what the policy was loaded from, for a source that starts as its copy.
        temperature: what the policy's logits are divided by.
        device: where models of the source belong.
        functions: reward functions by name, beside those of the entry point group `rlhf_kit.rewards`.
        tokenizer: the policy's.
    """

    policy: PreTrainedModel | PeftModel
    policy_config: Pretrained | Scratch
    temperature: float
    device: torch.device
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None


class SourceConfig(Config):
    """Fields of every reward source.

    `normalize` divides the source's token rewards, over all ranks, by the standard deviation of its per-completion
    sums: of this rollout (`batch`) or of a running estimate (`running`); `none` leaves them as they are. A row in
    which a `required` source failed leaves the baseline, the whitening and every loss. The run stops when more than
    `max_failure_rate` of the rows fail in three rollouts in a row.
    """

    type: str
    name: SourceName | None = None
    weight: float | Schedule = 1.0
    normalize: Literal["none", "batch", "running"] = "none"
    required: bool = True
    max_failure_rate: Annotated[float, Field(ge=0, le=1)] = 0.5

    @property
    def kind(self) -> Literal["outcome", "process"]:
        """Whether it judges whole completions or parts of them."""
        raise NotImplementedError

    @property
    def labels_outcomes(self) -> bool:
        """Whether its scores are outcomes in [0, 1] that an online source may learn from."""
        return False

    @property
    def learning(self) -> Learning | None:
        """How it learns online; None where it does not."""
        return None

    def problems(self, policy: Pretrained | Scratch, rewards: Sequence[SourceConfig]) -> Iterator[Problem]:
        """What cannot work with this policy and beside these sources; paths start at the source."""
        return iter(())

    def files(self) -> Iterator[tuple[str, str, bool]]:
        """What it reads: the field, the file or model (a folder or a hub id), and whether it is a model."""
        return iter(())

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the data that it cannot do without."""
        return ()

    @property
    def source_name(self) -> str:
        """What the source is called in metrics: its name, or else its type."""
        return self.name or self.type

    def weight_at(self, step: int) -> float:
        """The weight after `step` optimiser steps."""
        return self.weight.at(step) if isinstance(self.weight, Schedule) else self.weight

    def build(self, context: BuildContext) -> RewardSource:
        """The source itself; torch and friends are imported here."""
        raise NotImplementedError


def source_problems(
    rewards: Sequence[SourceConfig], policy: Pretrained | Scratch | None, reserved: Mapping[str, str]
) -> Iterator[Problem]:
    """What cannot work about a stage's sources together, and of each with the policy; paths start at the stage.

    `reserved` says of names that are taken what they are.
    """
    names: dict[str, int] = {}
    for index, source in enumerate(rewards):
        path, name = f"rewards.{index}", source.source_name
        if name in names:
            twice = f"has the same name as rewards.{names[name]}"
            yield Problem(f"{path}.name", twice, name, "give one of them another name")
        if name in reserved:
            yield Problem(f"{path}.name", f"is {reserved[name]}", name, "give it another name")
        names.setdefault(name, index)
        if policy is not None:
            yield from (problem.under(path) for problem in source.problems(policy, rewards))
