"""Running of the reward sources on a rollout: scores, failures, online learning, normalisation and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_kit.credit import rloo
from rlhf_kit.errors import RunError
from rlhf_kit.rewards.config import SourceConfig
from rlhf_kit.rollout import Metered, RewardSource, Rollout, Status, TokenRewards
from rlhf_kit.trainers.assign import WeightedRewards
from rlhf_kit.trainers.config import AccuracyBand
from rlhf_kit.trainers.online import OnlineUpdate
from rlhf_kit.trainers.rollouts import Ranks, masked_by


@dataclass
class Scores:
    """What the sources said of this rank's rows, growing while they are asked.

    Attributes:
        rewards: token rewards by source.
        valid: (B,) rows that count.
        outcomes: (B,) outcome labels in [0, 1], if a source gives them; 0 where not `labelled`.
        labelled: (B,) rows that have an outcome label.
        metrics: for the log.
        totals: for the log as well: amounts that are added up over ranks.
    """

    rewards: dict[str, TokenRewards]
    valid: Bool[Tensor, "B"]
    outcomes: Float[Tensor, "B"] | None = None
    labelled: Bool[Tensor, "B"] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)

    def given(self) -> dict[str, Float[Tensor, "B T"]]:
        """`Rollout.rewards`: NaN in a row that a source did not judge."""
        return {
            name: torch.where((rewards.status == Status.OK)[:, None], rewards.tokens, torch.nan)
            for name, rewards in self.rewards.items()
        }


RowScores = Mapping[str, TokenRewards]  # of one row, by source


class RunningScale:
    """Standard deviation of everything seen so far (Welford's method, merged by batch)."""

    def __init__(self) -> None:
        self.count = 0.0
        self.mean = 0.0
        self.squares = 0.0

    def update(self, values: Float[Tensor, "N"]) -> float:
        """Take the values in; returns the standard deviation, or 1 while it is 0."""
        if len(values) > 0:
            values = values.double()  # squares of large rewards overflow float32, and would stay in the estimate
            mean, size = values.mean().item(), len(values)
            total = self.count + size
            delta = mean - self.mean
            self.squares += ((values - mean) ** 2).sum().item() + delta**2 * self.count * size / total
            self.mean += delta * size / total
            self.count = total
        deviation = (self.squares / max(self.count - 1, 1)) ** 0.5
        return deviation if deviation > 0 else 1.0

    def state_dict(self) -> dict[str, float]:
        """Plain numbers for a checkpoint."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over the numbers of `state_dict`."""
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


FAILURE_LIMIT = 3  # rollouts in a row


class Scoring:
    """Asks every source, in the order in which they depend on each other.

    Outcome sources first: their labels drop prompts outside the accuracy band and teach the online sources, which
    then score, with the others. Among the outcome sources, and among the others, those that only wait for a server come
    last; what they all say is taken down in the order of the recipe.

    Attributes:
        failures: by source, the rollouts in a row in which too many of its rows failed; by "" those in which nothing
            was judged.
    """

    def __init__(
        self,
        configs: Sequence[SourceConfig],
        sources: Sequence[RewardSource],
        band: AccuracyBand | None,
        ranks: Ranks,
    ) -> None:
        self.configs = list(configs)
        self.sources = list(sources)
        self.scales = {source.name: RunningScale() for source in sources}
        self.online = {
            source.name: OnlineUpdate(source, learning.learning_rate, learning.max_grad_norm, ranks)
            for config, source in zip(self.configs, self.sources, strict=True)
            if (learning := config.learning) is not None and not learning.in_policy_engine
        }
        self._learns = any(config.learning is not None for config in self.configs)
        self.failures: dict[str, int] = {}
        self._band = band
        self._ranks = ranks

    def begin(self, rollout: Rollout, judged: Sequence[RowScores] = ()) -> None:
        """Let sources start what needs neither log-probabilities nor, before they are known, outcomes.

        Those that have `judged` the rows have nothing left to do.
        """
        at_work = [source for source in self.sources if not judged or source.name not in judged[0]]
        ready = [source for source in at_work if source.needs_outcomes == (rollout.outcomes is not None)]
        if ready:
            self._ranks.agreed("a reward source", lambda: [source.begin(rollout) for source in ready])

    def score_outcomes(self, rollout: Rollout, judged: Sequence[RowScores] = ()) -> Scores:
        """Outcome sources, the labels they give, and the rows that are left.

        A source that has `judged` the rows before, for the accuracy band, is not asked again.
        """
        scores = Scores({}, valid=rollout.action_mask.any(dim=1))
        labels = []
        found = {}
        for _, source in self._in_turn("outcome"):
            if judged and source.name in judged[0]:
                whole = joined_rows([row[source.name] for row in judged], rollout)
                found[source.name] = self._without_broken_rows(whole, rollout)
            else:
                found[source.name] = self._score(source, rollout)
        for config, source in self._of_kind("outcome"):
            rewards = found[source.name]
            self._record(config, source, rewards, scores)
            if config.labels_outcomes:
                labels.append((rewards.tokens.sum(dim=1), rewards.status == Status.OK))
        if labels:
            scores.outcomes, scores.labelled = _mean_label(labels)
            if self._band is not None or self._learns:
                scores.valid &= scores.labelled
            self._apply_band(rollout, scores)
        return scores

    def local_band(self, rollout: Rollout) -> tuple[Bool[Tensor, "B"], list[RowScores]]:
        """Rows of this rank whose group's accuracy lies in the band, judged by the labelling sources alone.

        Gives what these said of each row as well, for `score_outcomes`.
        """
        assert self._band is not None
        labelling = [(config, source) for config, source in self._in_turn("outcome") if config.labels_outcomes]
        self._ranks.agreed("a reward source", lambda: [source.begin(rollout) for _, source in labelling])
        found = {source.name: self._score(source, rollout) for _, source in labelling}
        given = [found[source.name] for config, source in self._of_kind("outcome") if config.labels_outcomes]
        labels = [(rewards.tokens.sum(dim=1), rewards.status == Status.OK) for rewards in given]
        outcomes, labelled = _mean_label(labels)
        judged: list[RowScores] = [
            {name: rewards.row(row) for name, rewards in found.items()} for row in range(len(rollout))
        ]
        return in_band(outcomes, labelled, rollout.group_size, self._band), judged

    def learn_and_score(self, rollout: Rollout, scores: Scores) -> Rollout:
        """Online sources learn from the outcomes; then every process source scores.

        A row that no source has judged is left out. Gives the rollout with what the sources have computed for it.
        """
        if scores.outcomes is not None and scores.labelled is not None:
            rollout = replace(rollout, outcomes=torch.where(scores.labelled, scores.outcomes, torch.nan))
            self.begin(rollout)
        own = {name: value for source in self.sources for name, value in source.log_probs(rollout).items()}
        rollout = replace(self.with_peers(rollout, scores), logprobs={**rollout.logprobs, **own})
        learnt: dict[str, dict[str, float]] = {}
        found: dict[str, TokenRewards] = {}
        for config, source in self._in_turn("process"):
            learnt[source.name] = self._teach(source, rollout, scores, found)
            found[source.name] = self._score(source, rollout)
            if config.required:  # the next that learns leaves the row out
                scores.valid &= found[source.name].status != Status.FAILED
        for config, source in self._of_kind("process"):
            scores.metrics.update({f"prm/{source.name}/{key}": value for key, value in learnt[source.name].items()})
            self._record(config, source, found[source.name], scores)
        judged = torch.stack([rewards.status == Status.OK for rewards in scores.rewards.values()]).any(dim=0)
        scores.valid &= judged
        self._stop_if_judging_fails(scores, judged)
        return rollout

    def _stop_if_judging_fails(self, scores: Scores, judged: Bool[Tensor, "B"]) -> None:
        """Stops a run whose sources have nothing to say: it would end without an error and without a change.

        Raises:
            RunError: in `FAILURE_LIMIT` rollouts in a row, no source judged a single completion, or one failed in more
                than its `max_failure_rate` of the rows.
        """
        failed = [(scores.rewards[source.name].status == Status.FAILED).sum() for source in self.sources]
        here = torch.stack([torch.ones_like(judged).sum(), judged.sum(), *failed])
        rows, anything, *failures = (int(count) for count in self._ranks.sum(here.float()).tolist())
        if self._count("", not anything) >= FAILURE_LIMIT:
            raise RunError(
                f"no reward source judged any completion of the last {FAILURE_LIMIT} rollouts ("
                f"{', '.join(source.name for source in self.sources)}): look whether the data have the columns that "
                "they read, such as answer, and at rewards/*/failed in metrics.jsonl"
            )
        for config, source, count in zip(self.configs, self.sources, failures, strict=True):
            if self._count(source.name, count / rows > config.max_failure_rate) >= FAILURE_LIMIT:
                raise RunError(
                    f"reward source '{source.name}' failed in more than {config.max_failure_rate:.0%} of the "
                    f"completions of {FAILURE_LIMIT} rollouts in a row ({count} of {rows} in the last): see the "
                    "warnings above for why; mend its server or its model and start the same command again, or raise "
                    "max_failure_rate"
                )

    def _count(self, name: str, failing: bool) -> int:
        self.failures[name] = self.failures.get(name, 0) + 1 if failing else 0
        return self.failures[name]

    def weighted(self, rollout: Rollout, scores: Scores) -> list[WeightedRewards]:
        """Rewards of all ranks after each source's normalisation and weight."""
        valid = self._ranks.all_rows(scores.valid)
        weighted = []
        for config, source in zip(self.configs, self.sources, strict=True):
            tokens = self._ranks.all_rows(scores.rewards[source.name].tokens)
            present = self._ranks.all_rows(scores.rewards[source.name].status) == Status.OK
            if config.normalize != "none":
                sums = tokens.sum(dim=1)[valid & present]
                scale = self.scales[source.name] if config.normalize == "running" else RunningScale()
                tokens = tokens / scale.update(sums)
            tokens = tokens * config.weight_at(rollout.step)
            weighted.append(WeightedRewards(source.name, source.kind, tokens, present))
        return weighted

    def used_by_judges(self) -> dict[str, dict[str, float]]:
        """What each judge has used of its budget on this rank, by `source/role`."""
        return {key: dict(judge.used()) for key, judge in self._judges()}

    def resume_judges(self, used: Mapping[str, Mapping[str, float]]) -> None:
        """Let the judges go on from what they had used."""
        for key, judge in self._judges():
            judge.resume(used[key])

    def _judges(self) -> list[tuple[str, Metered]]:
        return [(f"{s.name}/{role}", judge) for s in self.sources for role, judge in s.judges().items()]

    def _of_kind(self, kind: str) -> list[tuple[SourceConfig, RewardSource]]:
        return [(c, s) for c, s in zip(self.configs, self.sources, strict=True) if s.kind == kind]

    def _in_turn(self, kind: str) -> list[tuple[SourceConfig, RewardSource]]:
        """The sources of a kind in the order in which they are asked.

        It is the recipe's, but that those that only wait for a server come last: behind all others, or before the next
        that reads what they gave.
        """
        order: list[tuple[SourceConfig, RewardSource]] = []
        waiting: list[tuple[SourceConfig, RewardSource]] = []
        for config, source in self._of_kind(kind):
            if source.only_waits:
                waiting.append((config, source))
                continue
            if source.reads_rewards:
                order, waiting = order + waiting, []
            order.append((config, source))
        return order + waiting

    def _teach(
        self, source: RewardSource, rollout: Rollout, scores: Scores, found: Mapping[str, TokenRewards]
    ) -> dict[str, float]:
        """Let a source learn from the outcomes; gives what there is to log."""
        if scores.outcomes is None:
            return {}
        valid = self._ranks.all_rows(scores.valid)
        if valid.any():
            source.observe(self._ranks.all_rows(scores.outcomes)[valid])
        update = self.online.get(source.name)
        if update is None:
            return {}
        known = replace(scores, rewards={**scores.rewards, **found})
        return update.step(replace(rollout, rewards=known.given()), scores.outcomes, scores.valid)

    def _record(self, config: SourceConfig, source: RewardSource, rewards: TokenRewards, scores: Scores) -> None:
        scores.rewards[source.name] = rewards
        if config.required:
            scores.valid &= rewards.status != Status.FAILED
        failed = (rewards.status == Status.FAILED).float().mean().item()
        scores.metrics[f"rewards/{source.name}/failed"] = failed
        scores.metrics.update({f"rewards/{source.name}/{key}": value for key, value in rewards.metrics.items()})
        for role, judge in source.judges().items():
            scores.totals.update({f"rewards/{source.name}/{role}/{key}": v for key, v in judge.metrics().items()})

    def _score(self, source: RewardSource, rollout: Rollout) -> TokenRewards:
        rewards = self._ranks.agreed(f"reward source '{source.name}'", lambda: source.score(rollout))
        return self._without_broken_rows(rewards, rollout)

    @staticmethod
    def _without_broken_rows(rewards: TokenRewards, rollout: Rollout) -> TokenRewards:
        """A row whose rewards are not all finite has failed; nothing lies outside the action mask."""
        tokens = masked_by(rollout.action_mask, rewards.tokens.float())
        broken = ~tokens.isfinite().all(dim=1)
        status = torch.where(broken, int(Status.FAILED), rewards.status.to(broken.device))
        return replace(rewards, tokens=masked_by((status == Status.OK)[:, None], tokens), status=status)

    def _apply_band(self, rollout: Rollout, scores: Scores) -> None:
        if self._band is None or scores.outcomes is None:
            return
        outcomes, valid = self._ranks.all_rows(scores.outcomes), self._ranks.all_rows(scores.valid)
        inside = in_band(outcomes, valid, rollout.group_size, self._band)
        scores.metrics["credit/in_band"] = inside.float().mean().item()
        scores.valid &= self._ranks.own_rows(inside, scores.valid)

    def with_peers(self, rollout: Rollout, scores: Scores) -> Rollout:
        """The rollout with `peer_outcomes`, if its outcomes are known."""
        if scores.outcomes is None:
            return rollout
        return replace(rollout, peer_outcomes=self._peer_outcomes(rollout, scores))

    def _peer_outcomes(self, rollout: Rollout, scores: Scores) -> Float[Tensor, "B"]:
        assert scores.outcomes is not None
        outcomes, valid = self._ranks.all_rows(scores.outcomes), self._ranks.all_rows(scores.valid)
        groups = valid.view(-1, rollout.group_size).sum(dim=1).repeat_interleave(rollout.group_size)
        peers = torch.where(valid & (groups > 1), outcomes - rloo(outcomes, rollout.group_size, valid), 0.5)
        return self._ranks.own_rows(peers, scores.valid)


def _mean_label(labels: Sequence[tuple[Tensor, Tensor]]) -> tuple[Float[Tensor, "B"], Bool[Tensor, "B"]]:
    """The mean of the labels that each row was given, and which rows were given any."""
    values, given = (torch.stack(column) for column in zip(*labels, strict=True))
    return torch.where(given, values, 0.0).sum(dim=0) / given.sum(dim=0).clamp(min=1), given.any(dim=0)


def joined_rows(rows: Sequence[TokenRewards], rollout: Rollout) -> TokenRewards:
    """Rows that were scored apart, as those of one rollout; of the metrics that come with each, the mean."""
    device = rollout.action_mask.device
    tokens = torch.zeros_like(rollout.action_mask, dtype=torch.float32)
    for place, row in enumerate(rows):
        width = min(row.tokens.shape[1], tokens.shape[1])  # rollouts are padded to different lengths
        tokens[place, :width] = row.tokens[0, :width].to(device)
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    metrics = {name: fmean(row.metrics[name] for row in rows if name in row.metrics) for name in names}
    spans = [row.spans[0] for row in rows] if all(row.spans for row in rows) else ()
    return TokenRewards(tokens, torch.cat([row.status for row in rows]).to(device), metrics, spans)


def in_band(
    outcomes: Float[Tensor, "B"], valid: Bool[Tensor, "B"], group_size: int, band: AccuracyBand
) -> Bool[Tensor, "B"]:
    """Rows of the groups whose mean outcome, over their valid rows, lies in [low, high]."""
    groups, live = outcomes.view(-1, group_size), valid.view(-1, group_size)
    mean = torch.where(live, groups, 0.0).sum(dim=1) / live.sum(dim=1).clamp(min=1)
    inside = (mean >= band.low) & (mean <= band.high) & live.any(dim=1)
    return inside.repeat_interleave(group_size)
