"""From the token rewards of every source to advantages: the estimators of a recipe's `credit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_kit.credit import (
    gae,
    group_centred,
    masked_mean,
    min_form_returns,
    prime_process_advantages,
    reinforce_returns,
    rloo,
    spread_to_tokens,
    sum_by_step,
    whiten,
)
from rlhf_kit.trainers.config import Credit


@dataclass(frozen=True)
class WeightedRewards:
    """Token rewards of one source after its normalisation and weight.

    Rows that it did not judge (not `present`; None: it judged all) are nobody's baseline, and get nothing from it.
    """

    name: str
    kind: Literal["outcome", "process"]
    tokens: Float[Tensor, "B T"]
    present: Bool[Tensor, "B"] | None = None


@dataclass(frozen=True)
class Episode:
    """The completions of all ranks that credit is assigned to.

    Attributes:
        mask: (B, T) action tokens.
        valid: (B,) rows that count; the others stay out of every baseline and statistic.
        group_size: completions per prompt; rows of a group are adjacent.
        values: (B, T) the critic's values, for `gae`.
        bootstrap: (B,) value behind the last action token (0 where the completion ended).
        step_ids: (B, T) index of the step that each action token belongs to, for `min_form`.
    """

    mask: Bool[Tensor, "B T"]
    valid: Bool[Tensor, "B"]
    group_size: int
    values: Float[Tensor, "B T"] | None = None
    bootstrap: Float[Tensor, "B"] | None = None
    step_ids: Int[Tensor, "B T"] | None = None

    @property
    def live(self) -> Bool[Tensor, "B T"]:
        """Action tokens of valid rows."""
        return self.mask & self.valid[:, None]

    def seen_by(self, source: WeightedRewards) -> Episode:
        """The episode with only the rows that a source judged."""
        return self if source.present is None else replace(self, valid=self.valid & source.present)


@dataclass(frozen=True)
class Credited:
    """Advantages (B, T), the critic's targets (B, T) and each source's share of the advantage."""

    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"] | None
    shares: Mapping[str, float] = field(default_factory=dict)


def assign_credit(config: Credit, sources: list[WeightedRewards], episode: Episode) -> Credited:
    """Advantages of every action token, by the configured estimator.

    Every estimator is a sum of one contribution a source (for `gae` also one of the critic, its baseline), so each
    source's share of the final advantage is known: `sum |A_k| / sum_j sum |A_j|` over the live tokens, where A_k is
    what the scale and the whitening (centring, and one factor for all) make of the contribution.
    """
    live = episode.live
    estimate = ESTIMATORS[config.estimator]
    contributions = {}
    for source in sources:
        seen = episode.seen_by(source)
        contributions[source.name] = torch.where(seen.live, estimate(config, source, seen), 0.0)
    advantages = torch.stack(list(contributions.values())).sum(dim=0)
    returns = None
    if config.estimator == "gae":
        baseline, _ = gae(
            torch.zeros_like(advantages), _values(episode), live, config.gamma, config.lam, episode.bootstrap
        )
        contributions["critic"] = torch.where(live, baseline, 0.0)
        advantages = advantages + baseline
        returns = torch.where(live, advantages + _values(episode), 0.0)
    if config.scale != "none":
        scale = _scale(config.scale, sources, episode)[:, None]
        advantages = advantages / scale
        contributions = {name: value / scale for name, value in contributions.items()}
    shares = _shares(contributions, live, config.whiten)
    if config.whiten:
        advantages = whiten(advantages, live)
    return Credited(torch.where(live, advantages, 0.0), returns, shares)


def _gae(config: Credit, source: WeightedRewards, episode: Episode) -> Float[Tensor, "B T"]:
    zeros = torch.zeros_like(source.tokens)
    return gae(source.tokens, zeros, episode.live, config.gamma, config.lam)[0]


def _rloo(config: Credit, source: WeightedRewards, episode: Episode) -> Float[Tensor, "B T"]:
    return _over_tokens(rloo(_scores(source, episode), episode.group_size, episode.valid), episode)


def _group(config: Credit, source: WeightedRewards, episode: Episode) -> Float[Tensor, "B T"]:
    return _over_tokens(group_centred(_scores(source, episode), episode.group_size, "none", episode.valid), episode)


def _reinforce(config: Credit, source: WeightedRewards, episode: Episode) -> Float[Tensor, "B T"]:
    gamma = 0.0 if config.horizon == "immediate" and source.kind == "process" else config.gamma
    returns = reinforce_returns(source.tokens, episode.live, gamma)
    return returns - masked_mean(returns, episode.live)


def _prime(config: Credit, source: WeightedRewards, episode: Episode) -> Float[Tensor, "B T"]:
    if source.kind == "outcome":
        return _rloo(config, source, episode)
    return prime_process_advantages(source.tokens, episode.mask, episode.group_size, episode.valid, config.horizon)


def _min_form(config: Credit, source: WeightedRewards, episode: Episode) -> Float[Tensor, "B T"]:
    if source.kind == "outcome":
        return _rloo(config, source, episode)
    assert episode.step_ids is not None, "min_form needs the steps of each completion"
    steps = int(episode.step_ids.max().item()) + 1
    step_rewards = sum_by_step(source.tokens, episode.step_ids, steps)
    step_mask = sum_by_step(episode.live.float(), episode.step_ids, steps) > 0
    returns = spread_to_tokens(min_form_returns(step_rewards, step_mask), episode.step_ids)
    return returns - masked_mean(returns, episode.live)


Estimator = Callable[[Credit, WeightedRewards, Episode], Tensor]
ESTIMATORS: dict[str, Estimator] = {
    "gae": _gae,
    "rloo": _rloo,
    "group": _group,
    "reinforce": _reinforce,
    "prime": _prime,
    "min_form": _min_form,
}


def _scores(source: WeightedRewards, episode: Episode) -> Float[Tensor, "B"]:
    return torch.where(episode.live, source.tokens, 0.0).sum(dim=1)


def _over_tokens(scores: Float[Tensor, "B"], episode: Episode) -> Float[Tensor, "B T"]:
    return scores[:, None].expand_as(episode.mask)


def _values(episode: Episode) -> Float[Tensor, "B T"]:
    assert episode.values is not None, "gae needs the critic's values"
    return episode.values


def _scale(scale: str, sources: list[WeightedRewards], episode: Episode) -> Float[Tensor, "B"]:
    """Standard deviation of the summed scores, of each group or of the batch (GRPO's, with its 1e-4)."""
    scores = torch.stack([_scores(source, episode) for source in sources]).sum(dim=0)
    groups = scores.view(-1, episode.group_size) if scale == "group" else scores.view(1, -1)
    valid = episode.valid.view_as(groups)
    count = valid.sum(dim=1, keepdim=True)
    mean = torch.where(valid, groups, 0.0).sum(dim=1, keepdim=True) / count.clamp(min=1)
    squares = torch.where(valid, (groups - mean) ** 2, 0.0).sum(dim=1, keepdim=True)
    deviation = (squares / (count - 1).clamp(min=1)).sqrt() + 1e-4
    return deviation.expand_as(groups).reshape(-1)


def _shares(contributions: Mapping[str, Tensor], live: Bool[Tensor, "B T"], centred: bool) -> dict[str, float]:
    means = {name: masked_mean(value, live) if centred else 0.0 for name, value in contributions.items()}
    sizes = {name: (value - means[name])[live].abs().sum().item() for name, value in contributions.items()}
    total = sum(sizes.values())
    return {name: size / total if total else 0.0 for name, size in sizes.items()}
