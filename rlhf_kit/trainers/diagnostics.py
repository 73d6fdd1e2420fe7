"""What is logged of a rollout: TRL's metrics by their own names, ours beside them, and samples for the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_kit.credit import masked_mean, masked_var
from rlhf_kit.credit.spans import step_ids
from rlhf_kit.data.messages import completion_text
from rlhf_kit.evals.steps import auc, step_labels
from rlhf_kit.rollout import Rollout, Status
from rlhf_kit.trainers.assign import Credited, Episode, WeightedRewards
from rlhf_kit.trainers.config import Ppo
from rlhf_kit.trainers.rollouts import Ranks
from rlhf_kit.trainers.scoring import Scores

if TYPE_CHECKING:
    from rlhf_kit.trainers.ppo import PpoTrainer

StepLabels = list[list[tuple[int, int, bool]]]


class RolloutLog:
    """Writes the metrics and samples of one rollout.

    Attributes:
        last_sampled: in which interval of `samples.every` steps samples were last kept.
    """

    def __init__(
        self,
        config: Ppo,
        tokenizer: PreTrainedTokenizerBase,
        ranks: Ranks,
        log_samples: Callable[[int, list[dict[str, Any]]], object] | None,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._ranks = ranks
        self._log_samples = log_samples
        self.last_sampled = -1

    def write(
        self,
        trainer: PpoTrainer,
        rollout: Rollout,
        scores: Scores,
        weighted: list[WeightedRewards],
        episode: Episode,
        credited: Credited,
    ) -> None:
        """Log this rollout through the trainer; `weighted`, `episode` and `credited` are those of all ranks."""
        metrics = self._common(scores)
        metrics |= self._credit_metrics(scores, episode, credited)
        truth = self._step_labels(rollout)
        metrics |= self._process_metrics(rollout, scores, truth)
        for name, value in metrics.items():
            trainer.log_metric(name, value)
        self._replace_trl(trainer, scores, weighted, episode, credited)
        every = self._config.samples.every
        if self._log_samples and rollout.step // every != self.last_sampled:
            self.last_sampled = rollout.step // every
            self._log_samples(rollout.step, self._samples(rollout, scores, episode, credited, truth))

    def _common(self, scores: Scores) -> dict[str, float]:
        """The sources' own numbers, each averaged over the ranks that have it, and amounts, added up over them."""
        by_rank = self._ranks.all_objects([(scores.metrics, scores.totals)])
        metrics = {name: fmean(values) for name, values in _by_name([own for own, _ in by_rank]).items()}
        return metrics | {name: sum(values) for name, values in _by_name([totals for _, totals in by_rank]).items()}

    def _credit_metrics(self, scores: Scores, episode: Episode, credited: Credited) -> dict[str, float]:
        live = episode.live
        metrics = {f"credit/share/{name}": share for name, share in credited.shares.items()}
        metrics["credit/advantage_std"] = masked_var(credited.advantages, live).sqrt().item()
        metrics["credit/dropped_rows"] = 1 - episode.valid.float().mean().item()
        if scores.outcomes is not None and scores.labelled is not None:
            labelled = self._ranks.all_rows(scores.labelled)
            metrics["accuracy"] = masked_mean(self._ranks.all_rows(scores.outcomes), labelled).item()
        if credited.returns is not None and episode.values is not None:
            variance = masked_var(credited.returns, live)
            residual = masked_var(credited.returns - episode.values, live)
            if variance > 0:
                metrics["value/explained_variance"] = (1 - residual / variance).item()
            metrics["value/mean"] = masked_mean(episode.values, live).item()
        return metrics

    def _step_labels(self, rollout: Rollout) -> StepLabels | None:
        truth = self._config.step_truth
        if truth is None:
            return None
        return [
            step_labels(completion_text(completion), gold, truth.separator)
            for completion, gold in zip(rollout.completions, rollout.columns[truth.column], strict=True)
        ]

    def _process_metrics(self, rollout: Rollout, scores: Scores, truth: StepLabels | None) -> dict[str, float]:
        """How well process rewards tell right from wrong: by completion, and by step where the truth is known."""
        metrics = {}
        for source in self._config.rewards:
            if source.kind != "process":
                continue
            name = source.source_name
            tokens = scores.rewards[name].tokens
            if scores.outcomes is not None and scores.labelled is not None:
                sums, outcomes = self._ranks.all_rows(tokens.sum(dim=1)), self._ranks.all_rows(scores.outcomes)
                labelled, right = self._ranks.all_rows(scores.labelled), outcomes >= 0.5
                area = auc(sums[labelled & right].tolist(), sums[labelled & ~right].tolist())
                if area is not None:
                    metrics[f"prm/{name}/outcome_auc"] = area
            if truth is not None:
                area = self._step_auc(rollout, tokens, truth)
                if area is not None:
                    metrics[f"prm/{name}/step_auc"] = area
        return metrics

    def _step_auc(self, rollout: Rollout, tokens: torch.Tensor, truth: StepLabels) -> float | None:
        texts = [completion_text(completion) for completion in rollout.completions]
        segments = [_cover(labels, text) for labels, text in zip(truth, texts, strict=True)]
        rows = step_ids(rollout.offsets, segments, rollout.action_mask)
        rewards: tuple[list[float], list[float]] = ([], [])
        for row, labels in enumerate(truth):
            for step, (_, _, correct) in enumerate(labels):
                rewards[correct].append(tokens[row][rows[row] == step].sum().item())
        wrong, right = (self._ranks.all_objects(values) for values in rewards)
        return auc(right, wrong)

    def _replace_trl(
        self,
        trainer: PpoTrainer,
        scores: Scores,
        weighted: list[WeightedRewards],
        episode: Episode,
        credited: Credited,
    ) -> None:
        """TRL logged zeros under its own names; put the numbers there. A reward that is missing is none of them."""
        by_source, statuses = {}, []
        for source in self._config.rewards:
            rewards = scores.rewards[source.source_name]
            statuses.append(self._ranks.all_rows(rewards.status))
            sums = self._ranks.all_rows(rewards.tokens.sum(dim=1))
            by_source[source.source_name] = torch.where(statuses[-1] == Status.OK, sums, torch.nan)
        for name, sums in by_source.items():
            trainer.replace_metric(f"rewards/{name}/mean", sums.nanmean().item())
            trainer.replace_metric(f"rewards/{name}/std", _deviation(sums).item())
        total = torch.stack([source.tokens.sum(dim=1) for source in weighted]).sum(dim=0)
        status = torch.stack(statuses)
        known = (status == Status.OK).any(dim=0) & (status != Status.FAILED).all(dim=0)
        total = torch.where(known, total, torch.nan)
        spread = _deviation(total.view(-1, episode.group_size)) if episode.group_size > 1 else torch.zeros(1)
        trainer.replace_metric("reward", total.nanmean().item())
        trainer.replace_metric("reward_std", _deviation(total).item())
        trainer.replace_metric("frac_reward_zero_std", (spread < 1e-8).float().mean().item())
        mean_advantage = credited.advantages.sum(dim=1) / episode.live.sum(dim=1).clamp(min=1)
        trainer.replace_completion_log(
            {name: sums.tolist() for name, sums in by_source.items()}, mean_advantage.tolist()
        )

    def _samples(
        self,
        rollout: Rollout,
        scores: Scores,
        episode: Episode,
        credited: Credited,
        truth: StepLabels | None,
    ) -> list[dict[str, Any]]:
        advantages = self._ranks.own_rows(credited.advantages, rollout.action_mask)
        values = None if episode.values is None else self._ranks.own_rows(episode.values, rollout.action_mask)
        samples = []
        for row in range(min(self._config.samples.count, len(rollout))):
            length = int(rollout.completion_mask[row].sum())
            ids = rollout.completion_ids[row, :length].tolist()
            text = rollout.texts[row]
            pieces = [
                text[start:end] or self._tokenizer.convert_ids_to_tokens(token)
                for token, (start, end) in zip(ids, rollout.offsets[row][:length], strict=True)
            ]
            samples.append(
                {
                    "step": rollout.step,
                    "prompt": _prompt_text(rollout.prompts[row]),
                    "completion": text,
                    "tokens": pieces,
                    "offsets": [list(place) for place in rollout.offsets[row][:length]],
                    "advantages": advantages[row, :length].tolist(),
                    "rewards": {k: v.tokens[row, :length].tolist() for k, v in scores.rewards.items()},
                    "spans": _spans(scores, row),
                    "values": None if values is None else values[row, :length].tolist(),
                    "kl": self._kl(rollout, row, length),
                    "action_mask": rollout.action_mask[row, :length].tolist(),
                    "outcome": None if scores.outcomes is None else scores.outcomes[row].item(),
                    "step_truth": None if truth is None else [correct for _, _, correct in truth[row]],
                }
            )
        return samples

    @staticmethod
    def _kl(rollout: Rollout, row: int, length: int) -> list[float] | None:
        if "reference" not in rollout.logprobs or "behaviour" not in rollout.logprobs:
            return None
        return (rollout.logprobs["behaviour"] - rollout.logprobs["reference"])[row, :length].tolist()


def _spans(scores: Scores, row: int) -> dict[str, list[list[float]]]:
    """`[start, end, reward]` of the spans that each source judged in a row."""
    return {
        name: [[span.start, span.end, span.reward] for span in rewards.spans[row]]
        for name, rewards in scores.rewards.items()
        if rewards.spans
    }


def _deviation(values: Tensor) -> Tensor:
    """Unbiased standard deviation along the last dimension, without NaN; NaN where fewer than two are left."""
    count = values.isfinite().sum(dim=-1, keepdim=True)
    squares = (values - values.nanmean(dim=-1, keepdim=True)).square().nansum(dim=-1, keepdim=True)
    return torch.where(count > 1, squares / (count - 1), torch.nan).sqrt().squeeze(-1)


def _cover(labels: list[tuple[int, int, bool]], text: str) -> list[tuple[int, int]]:
    """The labelled steps, each from the end of the one before, and what is left of the text as the last."""
    ends = [0, *(end for _, end, _ in labels)]
    steps = list(pairwise(ends))
    return steps if ends[-1] == len(text) else [*steps, (ends[-1], len(text))]


def _prompt_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message.get('content', '')}" for message in prompt)


def _by_name(metrics: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for of_rank in metrics for name in of_rank)
    return {name: [of_rank[name] for of_rank in metrics if name in of_rank] for name in names}
