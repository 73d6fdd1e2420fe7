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

    `turn` is what the policy said between two answers of tools. Each turn is cut for itself: `step` ends at blank lines
    and before "Step k" and list items, or where `pattern` matches; `subsentence` is cut behind `, ; ! ?`, each part
    with at least `min_words` words. Only `completion` holds what tools said.
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
        if self.by == "token":
            return segments.tokens(rollout.offsets[row], rollout.action_mask[row].tolist())
        turns = own_turns(rollout, row)
        return [(start + first, start + last) for start, end in turns for first, last in self.within(text[start:end])]

    def within(self, turn: str) -> list[CharRange]:
        """Character ranges of the parts of one turn, or of any text; not for `by: token`."""
        from rlhf_kit.credit import segments

        if self.by == "step":
            return segments.steps(turn, self.pattern or segments.STEP_PATTERN)
        if self.by == "sentence":
            return segments.sentences(turn, self.language)
        if self.by == "subsentence":
            return segments.subsentences(turn, self.min_words, self.language)
        return segments.completion(turn)

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the pattern."""
        if self.pattern is not None and self.by != "step":
            what = f"is only for by: step, not {self.by}"
            yield Problem("pattern", what, self.pattern, "remove it or write by: step")
        if self.pattern is not None:
            yield from pattern_problems(self.pattern)


def pattern_problems(pattern: str) -> Iterator[Problem]:
    """Why the field `pattern` cannot be used as a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        yield Problem("pattern", f"is no regular expression ({error})", pattern, r"escape what is meant literally: \(")


def own_turns(rollout: Rollout, row: int) -> list[CharRange]:
    """Character ranges of what the policy said in a row: all of its text, but what tools answered."""
    from rlhf_kit.credit import segments

    return segments.turns(rollout.texts[row], rollout.offsets[row], rollout.action_mask[row].tolist())


class TextSourceConfig(SourceConfig):
    """Fields of sources that reward character spans.

    A span's reward lands on its last token (`placement: end`), its first (`start`), in equal parts on all of them
    (`spread`), or whole on every one (`each`), so that long spans and fine tokenizers earn more. With `per_segment:
    mean` the rewards of a completion are divided by the number of its spans, so that more of them earn no more; those
    that lie on no token of the policy's neither count nor are kept.
    """

    placement: Literal["end", "spread", "start", "each"] = "end"
    per_segment: Literal["sum", "mean"] = "sum"

    @property
    def kind(self) -> Literal["outcome", "process"]:
        return "process"

    def unused_problems(self, measured: str, *fields: str) -> Iterator[Problem]:
        """Those of `fields` (all) that are set where whole completions are measured; `measured` says by what."""
        for name in fields or ("placement", "per_segment"):
            if getattr(self, name) != TextSourceConfig.model_fields[name].default:
                what = f"does nothing where whole completions are measured ({measured})"
                yield Problem(name, what, getattr(self, name), "remove it")


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

    from rlhf_kit.credit.spans import spans_on_actions, spread_spans

    given = [[] if isinstance(row, Status) else list(row) for row in judged.rows]
    tokens = spread_spans(given, rollout.offsets, rollout.action_mask, placement)
    spans = spans_on_actions(given, rollout.offsets, rollout.action_mask)
    device = rollout.action_mask.device
    if per_segment == "mean":
        tokens = tokens / torch.tensor([max(len(row), 1) for row in spans], device=device)[:, None]
        spans = [[replace(span, reward=span.reward / len(row)) for span in row] for row in spans]
    status = [int(row if isinstance(row, Status) else Status.OK) for row in judged.rows]
    return TokenRewards(tokens, torch.tensor(status, device=device), judged.metrics, spans)
