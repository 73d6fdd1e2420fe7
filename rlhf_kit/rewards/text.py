"""What sources that judge text share: how they cut a completion, and how their verdicts reach its tokens."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import PositiveInt

from rlhf_kit.config import Config
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.config import SourceConfig
from rlhf_kit.rollout import CharRange, RewardSource, Rollout, Span, Status, TokenRewards


class Segments(Config):
    """How a completion is cut into the parts that are judged one by one (`rlhf_kit.credit.segments`).

    `step` ends at blank lines and before "Step k" and list items, or where `pattern` matches; `subsentence` is cut at
    `, ; ! ?` with at least `min_words` words on both sides.
    """

    by: Literal["completion", "turn", "step", "sentence", "subsentence", "token"] = "completion"
    pattern: str | None = None
    min_words: PositiveInt = 5
    language: str = "en"

    def ranges(self, rollout: Rollout, row: int) -> list[CharRange]:
        """Character ranges of a row's parts within `rollout.texts[row]`."""
        from rlhf_kit.credit import segments

        text = rollout.texts[row]
        if self.by == "completion":
            return segments.completion(text)
        if self.by == "step":
            return segments.steps(text, self.pattern or segments.STEP_PATTERN)
        if self.by == "sentence":
            return segments.sentences(text, self.language)
        if self.by == "subsentence":
            return segments.subsentences(text, self.min_words, self.language)
        mask = rollout.action_mask[row].tolist()
        if self.by == "turn":
            return segments.turns(text, rollout.offsets[row], mask)
        return segments.tokens(rollout.offsets[row], mask)

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the pattern."""
        if self.pattern is None:
            return
        if self.by != "step":
            yield Problem(
                "pattern", f"is only for by: step, not {self.by}", self.pattern, "remove it or write by: step"
            )
        try:
            re.compile(self.pattern)
        except re.error as error:
            yield Problem("pattern", f"is no regular expression ({error})", self.pattern, r"escape it, as in \(")


class TextSourceConfig(SourceConfig):
    """Fields of sources that reward character spans.

    A span's reward lands on its last token (`placement: end`), its first (`start`), or in equal parts on all of them
    (`spread`). With `per_segment: mean` the rewards of a completion are divided by the number of its spans, so that
    more of them earn no more.
    """

    placement: Literal["end", "spread", "start"] = "end"
    per_segment: Literal["sum", "mean"] = "sum"

    @property
    def kind(self) -> Literal["outcome", "process"]:
        return "process"


@dataclass(frozen=True)
class Judged:
    """What a text source says of a rollout: for each row its spans, or the status of a row without a verdict."""

    rows: Sequence[Sequence[Span] | Status]
    metrics: Mapping[str, float] = field(default_factory=dict)


class TextSource(RewardSource):
    """A source that gives rewards to character spans of `rollout.texts`; `judge` is all that it defines."""

    def __init__(self, config: TextSourceConfig) -> None:
        self.name = config.source_name
        self._placement = config.placement
        self._per_segment: Literal["sum", "mean"] = config.per_segment

    @abstractmethod
    def judge(self, rollout: Rollout) -> Judged:
        """The spans of every row."""

    def score(self, rollout: Rollout) -> TokenRewards:
        """The spans' rewards on the tokens that they overlap."""
        return span_rewards(self.judge(rollout), rollout, self._placement, self._per_segment)


def span_rewards(
    judged: Judged, rollout: Rollout, placement: str = "end", per_segment: Literal["sum", "mean"] = "sum"
) -> TokenRewards:
    """Token rewards (B, T) of spans, and the status of the rows that have none.

    Raises:
        ValueError: a span does not lie within its completion.
    """
    import torch

    from rlhf_kit.credit.spans import spread_spans

    spans = [[] if isinstance(row, Status) else list(row) for row in judged.rows]
    if per_segment == "mean":
        spans = [[replace(span, reward=span.reward / len(row)) for span in row] for row in spans]
    device = rollout.action_mask.device
    status = [int(row if isinstance(row, Status) else Status.OK) for row in judged.rows]
    return TokenRewards(
        tokens=spread_spans(spans, rollout.offsets, rollout.action_mask, placement),
        status=torch.tensor(status, device=device),
        metrics=judged.metrics,
        spans=spans,
    )
