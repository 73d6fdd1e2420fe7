"""Given completions as reward sources see them, and what the sources say of them, outside a trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf_kit.credit.spans import segment, step_ids, token_offsets
from rlhf_kit.data.messages import completion_like
from rlhf_kit.data.outcomes import RowEncoder, collate_outcomes
from rlhf_kit.models.scorer import rollout_outputs
from rlhf_kit.rewards.config import SourceConfig
from rlhf_kit.rollout import CharRange, RewardSource, Rollout, Status

Row = Mapping[str, Any]
NOT_COLUMNS = ("prompt", "completion", "completion_ids")
SUM = "sum"


@dataclass(frozen=True)
class SourceScores:
    """What one source gave to N completions.

    Attributes:
        kind: `outcome` or `process`.
        totals: (N,) summed reward, NaN where the source failed or a row was not its own.
        tokens: each completion's token rewards, empty where there is no judgement.
        failed: rows that could not be judged.
        not_applicable: rows of another task.
        status: (N,) of `Status` codes.
    """

    kind: Literal["outcome", "process"]
    totals: np.ndarray
    tokens: Sequence[np.ndarray]
    failed: int
    not_applicable: int
    status: np.ndarray


@dataclass(frozen=True)
class Scored:
    """N completions with their scores by source; with several sources also their weighted `sum`.

    Attributes:
        texts: as they were read back from the tokens.
        offsets: the character range of each token.
        lengths: tokens of each completion.
        sources: scores by source.
    """

    texts: list[str]
    offsets: list[list[CharRange]]
    lengths: list[int]
    sources: dict[str, SourceScores]

    def step_sums(self, source: str, row: int, steps: Sequence[CharRange]) -> list[float] | None:
        """Summed token rewards of each of the steps, which cover a row's text in order; None without a judgement.

        A token belongs to the step that holds its last character (`credit.spans.step_ids`).
        """
        tokens = self.sources[source].tokens[row]
        if not len(tokens):
            return None
        (places,) = step_ids([self.offsets[row]], [steps], torch.ones(1, len(tokens), dtype=torch.bool)).numpy()
        return np.bincount(places, tokens, minlength=max(len(steps), 1)).tolist()

    def least_step(self, source: str, pattern: str) -> np.ndarray:
        """(N,) the least step reward, steps ending where `pattern` matches (arXiv 2412.01981, section 4.1)."""
        values = []
        for row, text in enumerate(self.texts):
            sums = self.step_sums(source, row, segment(text, pattern))
            values.append(np.nan if sums is None else min(sums))
        return np.array(values)


class GivenScorer:
    """Asks sources about completions that somebody else has written or sampled.

    A completion's tokens are its `completion_ids` where these spell its text (`encode_row`), else those of its text
    behind the prompt. Nothing trains here, so that the policy that sampled, its initial weights and its moving average
    are all `policy`, unless another model is said to have sampled (`sampled_by`).

    Args:
        policy: the model with the head of `add_log_prob_head`.
        tokenizer: its own.
        configs, sources: the sources, as configured and as built.
        batch_size: rows of a forward pass, and of a question to the sources.
        behaviour: the model that sampled the completions, where it is not the policy.
    """

    def __init__(
        self,
        policy: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        configs: Sequence[SourceConfig],
        sources: Sequence[RewardSource],
        batch_size: int,
        behaviour: nn.Module | None = None,
    ) -> None:
        self._policy = policy
        self._behaviour = policy if behaviour is None else behaviour
        self._tokenizer = tokenizer
        self._configs = list(configs)
        self._sources = list(sources)
        self._batch_size = batch_size

    def sampled_by(self, model: nn.Module) -> GivenScorer:
        """The same sources for completions that another model has sampled."""
        return GivenScorer(self._policy, self._tokenizer, self._configs, self._sources, self._batch_size, model)

    @torch.no_grad()
    def __call__(
        self, rows: Sequence[Row], on_batch: Callable[[int, int], object] = lambda done, total: None
    ) -> Scored:
        """The scores of every row (`prompt`, `completion`, and the columns that the sources read)."""
        texts: list[str] = []
        offsets: list[list[CharRange]] = []
        tokens: dict[str, list[np.ndarray]] = {source.name: [] for source in self._sources}
        status: dict[str, list[int]] = {source.name: [] for source in self._sources}
        encoder = RowEncoder(self._tokenizer)
        for start in range(0, len(rows), self._batch_size):
            on_batch(start, len(rows))
            rollout = given_rollout(rows[start : start + self._batch_size], self._tokenizer, self._device, encoder)
            lengths = rollout.completion_mask.sum(dim=1).tolist()
            texts += rollout.texts
            offsets += [list(own[:length]) for own, length in zip(rollout.offsets, lengths, strict=True)]
            for name, (values, codes) in self._scores(rollout).items():
                tokens[name] += [row[:length] for row, length in zip(values, lengths, strict=True)]
                status[name] += codes
        on_batch(len(rows), len(rows))
        encoder.warn("completions to score")
        found = {
            source.name: _of_source(source.kind, tokens[source.name], status[source.name]) for source in self._sources
        }
        if len(found) > 1:
            found[SUM] = self._sum(found)
        return Scored(texts, offsets, [len(own) for own in offsets], found)

    @property
    def _device(self) -> torch.device:
        return next(self._policy.parameters()).device

    def _scores(self, rollout: Rollout) -> dict[str, tuple[np.ndarray, list[int]]]:
        """Token rewards (B, T) and status (B,) by source; those that judge outcomes score first, as in training."""
        for source in self._sources:
            if not source.needs_outcomes:
                source.begin(rollout)
        rollout = replace(rollout, logprobs=self._log_probs(rollout))
        found: dict[str, tuple[np.ndarray, list[int]]] = {}
        labels = []
        for config, source in zip(self._configs, self._sources, strict=True):
            if source.kind == "outcome" and not source.needs_outcomes:
                found[source.name] = _checked(source, rollout)
                if config.labels_outcomes:
                    values, codes = found[source.name]
                    labels.append(np.where(np.array(codes) == Status.OK, values.sum(axis=1), np.nan))
        if labels:
            outcomes = torch.tensor(np.stack(labels), dtype=torch.float32).nanmean(dim=0).to(self._device)
            rollout = replace(rollout, outcomes=outcomes)
        for source in self._sources:
            if source.needs_outcomes:
                source.begin(rollout)
        own = {name: value for source in self._sources for name, value in source.log_probs(rollout).items()}
        rollout = replace(rollout, logprobs={**rollout.logprobs, **own})
        return found | {s.name: _checked(s, rollout) for s in self._sources if s.name not in found}

    def _log_probs(self, rollout: Rollout) -> dict[str, torch.Tensor]:
        needed = frozenset().union(*(source.needs for source in self._sources))
        found: dict[str, torch.Tensor] = {}
        if needed & {"behaviour"}:
            (found["behaviour"],) = rollout_outputs(self._behaviour, rollout)
        if needed - {"behaviour"}:
            same = self._behaviour is self._policy and "behaviour" in found
            own = found["behaviour"] if same else rollout_outputs(self._policy, rollout)[0]
            found |= dict.fromkeys(sorted(needed - {"behaviour"}), own)
        return found

    def _sum(self, found: Mapping[str, SourceScores]) -> SourceScores:
        """The weighted sum: a row that a required source failed on has none; one of another task gets nothing of it.

        With `normalize` a source is divided by the standard deviation of its sums over all rows.
        """
        rows = len(next(iter(found.values())).totals)
        tokens: list[np.ndarray] = [np.zeros(0) for _ in range(rows)]
        missing = np.zeros(rows, dtype=bool)
        for config in self._configs:
            scores = found[config.source_name]
            deviation = float(np.nanstd(scores.totals)) if config.normalize != "none" else 1.0
            weight = config.weight_at(0) / (deviation or 1.0)
            for row, own in enumerate(scores.tokens):
                if len(own):
                    tokens[row] = weight * own + (tokens[row] if len(tokens[row]) else 0.0)
            if config.required:
                missing |= scores.status == Status.FAILED
        tokens = [np.zeros(0) if gone else own for own, gone in zip(tokens, missing, strict=True)]
        totals = np.array([own.sum() if len(own) else np.nan for own in tokens])
        kind = "process" if any(scores.kind == "process" for scores in found.values()) else "outcome"
        status = np.where(missing, int(Status.FAILED), np.where(np.isnan(totals), int(Status.NOT_APPLICABLE), 0))
        return SourceScores(kind, totals, tokens, int(missing.sum()), 0, status)


def given_rollout(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    encoder: RowEncoder | None = None,
) -> Rollout:
    """Rows of `prompt` and `completion` as a rollout, without log-probabilities; `encoder` counts foreign ids.

    Raises:
        ValueError: the chat template renders a prompt differently once an answer follows.
    """
    encode = encoder or RowEncoder(tokenizer)
    encoded = [encode(row["prompt"], row["completion"], row.get("completion_ids")) for row in rows]
    batch = {name: value.to(device) for name, value in collate_outcomes(encoded, _pad_id(tokenizer)).items()}
    width = batch["completion_ids"].shape[1]
    texts, offsets = [], []
    for ids in encoded:
        texts.append(tokenizer.decode(ids["completion_ids"], skip_special_tokens=True))
        ranges = token_offsets(tokenizer, ids["completion_ids"])
        end = len(texts[-1])
        offsets.append(ranges + [(end, end)] * (width - len(ranges)))
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name not in NOT_COLUMNS}
    return Rollout(
        prompts=[row["prompt"] for row in rows],
        completions=[completion_like(row["prompt"], row["completion"]) for row in rows],
        prompt_ids=batch["prompt_ids"],
        prompt_mask=batch["prompt_mask"],
        completion_ids=batch["completion_ids"],
        completion_mask=batch["completion_mask"],
        action_mask=batch["completion_mask"],
        texts=texts,
        offsets=offsets,
        columns=columns,
        micro_batch_size=len(rows),
    )


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]


def _checked(source: RewardSource, rollout: Rollout) -> tuple[np.ndarray, list[int]]:
    """A source's token rewards and status; a row whose rewards are not all finite has failed."""
    rewards = source.score(rollout)
    tokens = torch.where(rollout.action_mask, rewards.tokens.float(), 0.0).cpu()
    broken = ~tokens.isfinite().all(dim=1)
    status = torch.where(broken, int(Status.FAILED), rewards.status.cpu())
    return tokens.double().numpy(), [int(code) for code in status]


def _of_source(kind: Literal["outcome", "process"], tokens: list[np.ndarray], status: list[int]) -> SourceScores:
    judged = [code == Status.OK for code in status]
    kept = [row if ok else np.zeros(0) for row, ok in zip(tokens, judged, strict=True)]
    totals = np.array([row.sum() if ok else np.nan for row, ok in zip(kept, judged, strict=True)])
    failed, other = (status.count(int(code)) for code in (Status.FAILED, Status.NOT_APPLICABLE))
    return SourceScores(kind, totals, kept, failed, other, np.array(status, dtype=int))
