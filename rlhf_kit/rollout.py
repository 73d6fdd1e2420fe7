"""The types that everything shares: what a reward source sees, and what it gives back.

This module imports without torch, so that recipes are checked in a fraction of a second.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from torch.nn import Parameter

Message = Mapping[str, Any]
Text = str | Sequence[Message]
CharRange = tuple[int, int]


class Status(IntEnum):
    """Outcome of scoring one row. A failure is missing, never a reward of 0."""

    OK = 0
    FAILED = 1
    NOT_APPLICABLE = 2


@dataclass(frozen=True)
class Span:
    """A reward on the characters `[start, end)` of a completion's text."""

    start: int
    end: int
    reward: float
    source: str


@dataclass(frozen=True)
class Rollout:
    """Completions of a batch as the policy sampled them.

    Attributes:
        prompts: B prompts, text or messages, as TRL has them.
        completions: B completions in the same form.
        prompt_ids: (B, P), left-padded.
        prompt_mask: (B, P), True on prompt tokens.
        completion_ids: (B, T), right-padded; the sampled ids, never re-tokenised text.
        completion_mask: (B, T), True through the end-of-sequence token.
        action_mask: (B, T), True where the policy chose the token (False on padding, tool and environment text).
        logprobs: log-probabilities (B, T) of the sampled tokens by model: `behaviour` (the policy that sampled),
            `reference` (the policy's initial weights), `ema` (its moving average). Only those that a source or
            the KL asked for are there.
        temperature: what the logits were divided by before those log-probabilities were taken.
        texts: the decoded completions, without special tokens; with tools, their answers included. Spans count their
            characters.
        offsets: per completion, the character range of each token in its text.
        columns: the data set's other columns, each a list of B values.
        outcomes: (B,), mean label in [0, 1] that the outcome sources gave, NaN in a row that none labelled; None before
            they have scored, and where none gives labels.
        rewards: token rewards (B, T) of the sources that have scored, before their weights, NaN in a row that a source
            did not judge; only there for `RewardSource.loss`, and only those written before it in the recipe.
        peer_outcomes: (B,), mean outcome of the other completions of the same prompt over all ranks, 1/2 where there
            is none; only there for `RewardSource.loss`.
        group_size: completions per prompt.
        micro_batch_size: rows per forward pass, the same for every model that scores this rollout (two models
            with equal weights then give bit-equal log-probabilities).
        step: optimiser steps taken so far.
    """

    prompts: Sequence[Text]
    completions: Sequence[Text]
    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    completion_ids: Int[Tensor, "B T"]
    completion_mask: Bool[Tensor, "B T"]
    action_mask: Bool[Tensor, "B T"]
    logprobs: Mapping[str, Float[Tensor, "B T"]] = field(default_factory=dict)
    temperature: float = 1.0
    texts: Sequence[str] = ()
    offsets: Sequence[Sequence[CharRange]] = ()
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    outcomes: Float[Tensor, "B"] | None = None
    rewards: Mapping[str, Float[Tensor, "B T"]] = field(default_factory=dict)
    peer_outcomes: Float[Tensor, "B"] | None = None
    group_size: int = 1
    micro_batch_size: int = 1
    step: int = 0

    def __len__(self) -> int:
        return len(self.completions)

    def rows(self, start: int, stop: int) -> Rollout:
        """The rollout restricted to rows `[start, stop)`."""
        part = slice(start, stop)
        return replace(
            self,
            prompts=self.prompts[part],
            completions=self.completions[part],
            prompt_ids=self.prompt_ids[part],
            prompt_mask=self.prompt_mask[part],
            completion_ids=self.completion_ids[part],
            completion_mask=self.completion_mask[part],
            action_mask=self.action_mask[part],
            logprobs={name: value[part] for name, value in self.logprobs.items()},
            texts=self.texts[part],
            offsets=self.offsets[part],
            columns={name: values[part] for name, values in self.columns.items()},
            outcomes=None if self.outcomes is None else self.outcomes[part],
            rewards={name: value[part] for name, value in self.rewards.items()},
            peer_outcomes=None if self.peer_outcomes is None else self.peer_outcomes[part],
        )


@dataclass(frozen=True)
class TokenRewards:
    """What a source gave to each token.

    Attributes:
        tokens: (B, T) float32, exactly 0 outside the rollout's `action_mask`.
        status: (B,) of `Status` codes.
        metrics: scalars for the log, already named relative to the source (`loss`, `step_auc`).
        spans: per completion, the spans that made the rewards, for the heat map.
    """

    tokens: Float[Tensor, "B T"]
    status: Int[Tensor, "B"]
    metrics: Mapping[str, float] = field(default_factory=dict)
    spans: Sequence[Sequence[Span]] = ()

    def row(self, index: int) -> TokenRewards:
        """What was given to one row; the metrics stay those of all."""
        part = slice(index, index + 1)
        return replace(self, tokens=self.tokens[part], status=self.status[part], spans=self.spans[part])


class Metered(Protocol):
    """A judge that counts what it uses: requests, tokens, money.

    Attributes:
        remote: it works in another process, and a question that was asked goes on without this one.
    """

    remote: bool

    def metrics(self) -> Mapping[str, float]:
        """Amounts used since this was asked last."""
        ...

    def used(self) -> Mapping[str, float]:
        """Amounts used in all, by this process."""
        ...

    def resume(self, used: Mapping[str, float]) -> None:
        """Go on from what was used before this process began."""
        ...


class RewardSource(ABC):
    """Anything that gives rewards to the tokens of a rollout.

    Attributes:
        name: what its metrics and heat map rows are called.
        kind: `outcome` judges the whole completion (its reward lies on the last action token), `process` judges
            its parts. Estimators that treat the two differently (PRIME, Eq. 5) ask for this.
        needs: the log-probabilities that must be in `Rollout.logprobs`.
        needs_outcomes: it looks at `Rollout.outcomes`, so that it cannot begin before the outcome sources have scored.
        reads_rewards: its `loss` reads `Rollout.rewards`, so that the sources before it must have scored.
    """

    name: str
    kind: Literal["outcome", "process"] = "process"
    needs: frozenset[str] = frozenset()
    needs_outcomes: bool = False
    reads_rewards: bool = False

    @property
    def only_waits(self) -> bool:
        """Whether others work for it, so that what this process computes for other sources comes first."""
        judges = self.judges().values()
        return bool(judges) and all(judge.remote for judge in judges)

    def begin(self, rollout: Rollout) -> None:
        """Start what can go on while models score, such as requests to a server; `score` waits for it.

        Log-probabilities are not there yet.
        """
        return

    @abstractmethod
    def score(self, rollout: Rollout) -> TokenRewards:
        """Rewards of every token of `rollout`."""

    def loss(self, rollout: Rollout, outcomes: Float[Tensor, "B"]) -> Tensor | None:
        """Loss (B,) of a source that learns online from outcome labels in [0, 1]; the trainer steps it."""
        return None

    def log_probs(self, rollout: Rollout) -> Mapping[str, Float[Tensor, "B T"]]:
        """Log-probabilities that `loss` and `score` both read; they are put into `Rollout.logprobs`."""
        return {}

    def observe(self, outcomes: Float[Tensor, "N"]) -> None:
        """Take note of the outcomes of all ranks, before `loss` is asked for."""
        return

    def judges(self) -> Mapping[str, Metered]:
        """The judges that it asks, by what their amounts are called in the log; those are added up over ranks."""
        return {}

    def trainable_parameters(self) -> list[Parameter]:
        """The parameters that `loss` trains."""
        return []

    def save(self, folder: Path) -> None:
        """Write what the source has learnt into `folder`."""
        return

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote."""
        return
