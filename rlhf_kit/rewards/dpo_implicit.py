"""The implicit reward of a model that was trained on preferences: how much likelier it finds a token than before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat

from rlhf_kit.config import Config, Location
from rlhf_kit.models.config import Pretrained, Scratch, same_model
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.config import BuildContext, SourceConfig
from rlhf_kit.rewards.implicit_prm import read_prm_record
from rlhf_kit.rewards.text import Segments
from rlhf_kit.rollout import CharRange, RewardSource, Rollout, TokenRewards

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_kit.models.scorer import Scorer

SENTENCES = Segments(by="sentence")


class LengthPenalty(Config):
    """`alpha` for each token, or for each character, of a completion (DICE, arXiv 2406.09760, section 3.1).

    The paper counts characters. A `pairs` stage can find alpha itself (`length_debias`).
    """

    alpha: float
    unit: Literal["tokens", "characters"] = "tokens"


class DpoImplicitConfig(SourceConfig):
    """`beta * (log pi - log ref)` of a DPO-, ORPO- or KTO-trained model pi (DPO, arXiv 2305.18290, section 4).

    `path` is pi: without it the policy as it starts. `reference` is what pi was trained from; without it, what the
    `preference` stage wrote down beside pi, or the base of an adapter. `per` says where it lies: on each token, summed
    on the last token of each of `segments` (sentences), or on the last token of the completion. beta only scales it.

    In PPO the logits of both models are divided by the temperature of sampling, as the policy's are; in `pairs` and
    `eval` they are as they come, as DPO has them.
    """

    type: Literal["dpo_implicit"]
    path: Location | None = None
    reference: Location | None = None
    beta: PositiveFloat = 1.0
    per: Literal["token", "segment", "completion"] = "token"
    segments: Segments | None = None
    length_penalty: LengthPenalty | None = None

    @property
    def kind(self) -> Literal["outcome", "process"]:
        return "outcome" if self.per == "completion" else "process"

    def problems(self, policy: Pretrained | Scratch, rewards: Sequence[SourceConfig]) -> Iterator[Problem]:
        yield from self._segments_problems()
        if isinstance(policy, Scratch):
            remedy = "train it first, and write model.path: ${stages.NAME.model}"
            yield Problem("", "an implicit reward needs a policy with weights to start from", remedy=remedy)
        if self.path is None and self.reference is None:
            remedy = "name the model that the policy was trained from"
            yield Problem("reference", "is missing: the policy against itself rewards nothing", remedy=remedy)
        whole = (
            self.path is not None and (Path(self.path) / "config.json").is_file()
        )  # else an adapter, or not yet there
        record = read_prm_record(self.path) if self.path is not None else None
        if whole and self.reference is None and record is None:
            remedy = "name the model that it was trained from"
            yield Problem("reference", f"is missing, and {self.path} has no record of it", remedy=remedy)
        model = self.path or getattr(policy, "path", None)
        reference = self.reference or (record["reference"] if record is not None else None)
        if model is not None and reference is not None and same_model(model, reference):
            what = "is the policy as it starts, which" if self.path is None else "is the model itself, and"
            remedy = "name the model that it was trained from" + (", or path" if self.path is None else "")
            yield Problem("reference", f"{what} rewards nothing", reference, remedy)

    def _segments_problems(self) -> Iterator[Problem]:
        if self.segments is None:
            return
        yield from (problem.under("segments") for problem in self.segments.problems())
        if self.per != "segment":
            remedy = "remove it, or write per: segment"
            yield Problem("segments", f"are only for per: segment, not {self.per}", remedy=remedy)

    def files(self) -> Iterator[tuple[str, str, bool]]:
        for field in ("path", "reference"):
            if (value := getattr(self, field)) is not None:
                yield field, value, True

    def build(self, context: BuildContext) -> DpoImplicit:
        """The source, its models beside the policy.

        Raises:
            ValueError: nothing says what the model was trained from, or a model has another vocabulary than the policy.
        """
        from rlhf_kit.rewards.scorers import compared_scorers, scorer_of

        name, start = self.source_name, getattr(context.policy_config, "path", None)
        path, reference = (
            None if model is None or (start is not None and same_model(model, start)) else model
            for model in (self.path, self._reference_of())
        )
        if path is not None and reference is not None:
            return DpoImplicit(self, *compared_scorers(path, reference, name, context))
        alone = next((scorer_of(model, name, context) for model in (path, reference) if model is not None), None)
        return DpoImplicit(self, None if path is None else alone, None if reference is None else alone)

    def _reference_of(self) -> str:
        if self.reference is not None:
            return self.reference
        assert self.path is not None
        record = read_prm_record(self.path, remote=True)
        if record is not None:
            return record["reference"]
        from peft import PeftConfig

        from rlhf_kit.models.loading import holds_adapter

        base = PeftConfig.from_pretrained(self.path).base_model_name_or_path if holds_adapter(self.path) else None
        if base is None:
            raise ValueError(f"'{self.source_name}': nothing says what {self.path} was trained from; set reference")
        return base


class DpoImplicit(RewardSource):
    """Rewards tokens, segments or completions by the log-ratio of a model and its reference, on the sampled ids.

    Args:
        config: the source's.
        trained: pi; None takes the policy's initial weights.
        reference: ref; None takes the policy's initial weights.
    """

    def __init__(self, config: DpoImplicitConfig, trained: Scorer | None, reference: Scorer | None) -> None:
        self.name = config.source_name
        self.kind = config.kind
        self._config = config
        self._trained = trained
        self._reference = reference
        self.needs = frozenset({"reference"}) if trained is None or reference is None else frozenset()

    def score(self, rollout: Rollout) -> TokenRewards:
        """See the configuration; every row is judged."""
        import torch

        from rlhf_kit.credit import place_at_last, place_at_step_ends, sum_by_step
        from rlhf_kit.rollout import Status

        tokens = self.token_rewards(rollout)
        if self._config.per == "completion":
            tokens = place_at_last(tokens.sum(dim=1), rollout.action_mask)
        elif self._config.per == "segment":
            steps = self._steps(rollout)
            count = int(steps.max()) + 1 if steps.numel() else 0
            tokens = place_at_step_ends(sum_by_step(tokens, steps, count), steps)
        return TokenRewards(tokens, torch.full((len(rollout),), int(Status.OK), device=tokens.device))

    def token_rewards(self, rollout: Rollout) -> Tensor:
        """`beta * (log pi - log ref)` less the penalty of each action token, (B, T)."""
        import torch

        from rlhf_kit.credit.implicit import implicit_rewards

        with torch.no_grad():
            trained = rollout.logprobs["reference"] if self._trained is None else self._trained(rollout)
            reference = rollout.logprobs["reference"] if self._reference is None else self._reference(rollout)
        rewards = implicit_rewards(trained, reference, rollout.action_mask, self._config.beta)
        penalty = self._config.length_penalty
        if penalty is None:
            return rewards
        lengths = rollout.action_mask if penalty.unit == "tokens" else new_characters(rollout)
        return torch.where(rollout.action_mask, rewards - penalty.alpha * lengths.to(rewards), 0.0)

    def _steps(self, rollout: Rollout) -> Tensor:
        """The number of the segment of each action token; what lies between two segments belongs to the first."""
        from rlhf_kit.credit.spans import step_ids

        segments = self._config.segments or SENTENCES
        rows: list[list[CharRange]] = []
        for row, text in enumerate(rollout.texts):
            starts = [start for start, _ in segments.ranges(rollout, row)][1:]
            borders = [0, *starts, len(text)]
            rows.append([(a, b) for a, b in pairwise(borders) if a < b])
        return step_ids(rollout.offsets, rows, rollout.action_mask)


def new_characters(rollout: Rollout) -> Tensor:
    """How many characters each token adds to its text, (B, T): a character of several tokens is that of the first."""
    import torch

    counts = torch.zeros(rollout.action_mask.shape, device=rollout.action_mask.device)
    for row, offsets in enumerate(rollout.offsets):
        known = 0
        for place, (_, end) in enumerate(offsets):
            counts[row, place] = max(end - known, 0)
            known = max(known, end)
    return counts
