"""Yes or no: how likely a judge finds the answer Yes to questions about a completion, or about its parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Annotated, Literal

from pydantic import Field, field_validator

from rlhf_kit.config import Location
from rlhf_kit.data.messages import dialogue_text
from rlhf_kit.judges.base import Answer, Judge, Question, lead
from rlhf_kit.judges.config import JudgeConfig
from rlhf_kit.judges.prompts import fenced, fill, read_prompt
from rlhf_kit.models.config import Pretrained, Scratch
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.asking import PROMPTS, Asking, judge_files, judge_problems, prompt_problems
from rlhf_kit.rewards.config import BuildContext, SourceConfig
from rlhf_kit.rewards.text import Judged, Segments, TextSource, TextSourceConfig
from rlhf_kit.rollout import CharRange, Rollout, Span, Status, TokenRewards

PLACEHOLDERS = ("prompt", "completion", "question", "answers")


class YesNoConfig(TextSourceConfig):
    """`scale * (p - center)`, p the judge's probability of `yes` against `no` (ZYN, arXiv 2308.06385).

    `p = sigmoid(l_yes - l_no)`, of several `questions` the mean. By default the reward is p itself, which is an outcome
    in [0, 1]; the paper's is `scale: 10, center: 0.5`. With `segments` every part of the completion is asked about, and
    its span rewarded. A `prompt` file holds `{{prompt}}`, `{{completion}}`, `{{question}}`, `{{answers}}` ("Yes or No")
    and, for segments, `{{segment}}`.
    """

    type: Literal["yes_no"]
    judge: JudgeConfig
    questions: Annotated[tuple[str, ...], Field(min_length=1)]
    yes: str = "Yes"
    no: str = "No"
    scale: float = 1.0
    center: float = 0.0
    segments: Segments = Segments()
    prompt: Location | None = None

    @field_validator("questions", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @property
    def kind(self) -> Literal["outcome", "process"]:
        return "outcome" if self.segments.by == "completion" else "process"

    @property
    def labels_outcomes(self) -> bool:
        return self.kind == "outcome" and self.scale == 1 and self.center == 0

    def problems(self, policy: Pretrained | Scratch, rewards: Sequence[SourceConfig]) -> Iterator[Problem]:
        if self.yes.strip().lower() == self.no.strip().lower():
            yield Problem("no", "is the same word as yes", self.no, "give two words that begin differently")
        for field in ("yes", "no"):
            if not getattr(self, field).strip():
                yield Problem(field, "is no word", getattr(self, field), "write what the answer may begin with")
        if not all(question.strip() for question in self.questions):
            yield Problem("questions", "asks nothing", list(self.questions), "write a question that yes or no answers")
        if self.kind == "outcome":
            yield from self.unused_problems("segments.by: completion")
        yield from judge_problems(self.judge)
        yield from (problem.under("segments") for problem in self.segments.problems())
        yield from prompt_problems(self.prompt, self.placeholders)

    def files(self) -> Iterator[tuple[str, str, bool]]:
        if self.prompt is not None:
            yield "prompt", self.prompt, False
        yield from judge_files(self.judge)

    @property
    def placeholders(self) -> tuple[str, ...]:
        """What a prompt file is filled with."""
        return PLACEHOLDERS if self.kind == "outcome" else (*PLACEHOLDERS, "segment")

    def build(self, context: BuildContext) -> YesNo:
        """The source and its judge.

        Raises:
            ValueError: the first token of an answer of a judge in this process does not tell yes from no.
        """
        judge = self.judge.build(context)
        judge.check_choices((self.yes, self.no))
        name = "yes_no.txt" if self.kind == "outcome" else "yes_no_segment.txt"
        return YesNo(self, judge, read_prompt(self.prompt, PROMPTS, name))


class YesNo(TextSource):
    """Rewards a completion, or each of its segments, by the judge's probability of a yes.

    A row with a question that failed is `FAILED`. The prompt names the two words in the same order whichever of them
    is `yes`, so that swapping them turns p into 1 - p.
    """

    def __init__(self, config: YesNoConfig, judge: Judge, prompt: str) -> None:
        super().__init__(config)
        self.kind = config.kind
        self._config = config
        self._prompt = prompt
        self._asking = Asking(judge, self._questions)

    def judges(self) -> Mapping[str, Judge]:
        return self._asking.judges()

    def begin(self, rollout: Rollout) -> None:
        self._asking.begin(rollout)

    def score(self, rollout: Rollout) -> TokenRewards:
        """The reward of each completion on its last action token, or of each segment on its span."""
        from dataclasses import replace

        from rlhf_kit.rewards.outcome import outcome_rewards

        if self.kind == "process":
            return super().score(rollout)
        margins = self._margins(rollout)
        scores = [math.nan if row is None else self._reward(row[0]) for row in margins]
        return replace(outcome_rewards(scores, rollout), metrics=self._metrics(margins))

    def judge(self, rollout: Rollout) -> Judged:
        """The spans of every row's segments."""
        margins = self._margins(rollout)
        rows: list[list[Span] | Status] = []
        for row, values in enumerate(margins):
            if values is None:
                rows.append(Status.FAILED)
                continue
            parts = zip(self._parts(rollout, row), values, strict=True)
            rows.append([Span(start, end, self._reward(value), self.name) for (start, end), value in parts])
        return Judged(rows, self._metrics(margins))

    def _reward(self, margin: float) -> float:
        return self._config.scale * (margin + (0.5 - self._config.center))

    def _margins(self, rollout: Rollout) -> list[list[float] | None]:
        """For each row the mean of `p - 1/2` over the questions, of each part; None where a question failed."""
        answers = iter(self._asking.answers(rollout))
        found: list[list[float] | None] = []
        for row in range(len(rollout)):
            given = [[next(answers) for _ in self._config.questions] for _ in self._parts(rollout, row)]
            failed = any(answer.error is not None for part in given for answer in part)
            found.append(None if failed else [fmean(map(margin_of, part)) for part in given])
        return found

    def _parts(self, rollout: Rollout, row: int) -> list[CharRange]:
        if self.kind == "outcome":  # an empty completion is asked about as well
            return [(0, len(rollout.texts[row]))]
        return self._config.segments.ranges(rollout, row)

    def _questions(self, rollout: Rollout) -> list[Question]:
        config = self._config
        answers = " or ".join(sorted((config.yes, config.no), reverse=True))
        asked = []
        for row, text in enumerate(rollout.texts):
            values = {
                "prompt": fenced(dialogue_text(rollout.prompts[row]), "prompt"),
                "completion": fenced(text, "completion"),
                "answers": answers,
            }
            for start, end in self._parts(rollout, row):
                part = {} if self.kind == "outcome" else {"segment": fenced(text[start:end], "part")}
                for question in config.questions:
                    content = fill(self._prompt, **values, **part, question=question)
                    asked.append(Question([{"role": "user", "content": content}], choices=(config.yes, config.no)))
        return asked

    def _metrics(self, margins: Sequence[Sequence[float] | None]) -> dict[str, float]:
        values = [value for row in margins if row is not None for value in row]
        return {"yes": 0.5 + fmean(values)} if values else {}


def margin_of(answer: Answer) -> float:
    """`sigmoid(l_yes - l_no) - 1/2`."""
    yes, no = answer.log_probs
    return lead(yes - no)
