"""Quality gap: how much better a completion is than a reference response."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Literal

from rlhf_kit.config import Location
from rlhf_kit.data.messages import completion_text, dialogue_text, is_messages
from rlhf_kit.judges.base import Answer, Judge, Question
from rlhf_kit.judges.config import JudgeConfig
from rlhf_kit.judges.prompts import fenced, fill, read_prompt
from rlhf_kit.models.config import Pretrained, Scratch
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.asking import PROMPTS, Asking, judge_files, judge_problems, prompt_problems
from rlhf_kit.rewards.config import BuildContext, SourceConfig
from rlhf_kit.rollout import RewardSource, Rollout, TokenRewards

PLACEHOLDERS = ("prompt", "first", "second", "question")
LABELS = ("A", "B")


class GapConfig(SourceConfig):
    """`g(x, y, r)`, the judged gap in quality between a completion y and the row's reference r (PIT, arXiv 2310.00898).

    The judge sees the two in both orders: `g = (d(x, y, r) - d(x, r, y)) / 2`, where `d(x, a, b)` are its log-odds that
    the first is the better answer. So `g(x, y, r) = -g(x, r, y)`, and a judge that always prefers one place earns
    nothing. The paper trains a reward model for the gap; here any judge gives it. With `bounded` the reward is
    `tanh(g / 2)` in (-1, 1), twice the probability of being the better one, less 1. A `prompt` file holds `{{prompt}}`,
    `{{first}}`, `{{second}}` and `{{question}}`.
    """

    type: Literal["gap"]
    judge: JudgeConfig
    column: str = "reference"
    question: str = "Which of the two is the better completion?"
    bounded: bool = False
    prompt: Location | None = None

    @property
    def kind(self) -> Literal["outcome", "process"]:
        return "outcome"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def problems(self, policy: Pretrained | Scratch, rewards: Sequence[SourceConfig]) -> Iterator[Problem]:
        yield from judge_problems(self.judge)
        yield from prompt_problems(self.prompt, PLACEHOLDERS)

    def files(self) -> Iterator[tuple[str, str, bool]]:
        if self.prompt is not None:
            yield "prompt", self.prompt, False
        yield from judge_files(self.judge)

    def build(self, context: BuildContext) -> Gap:
        """The source and its judge.

        Raises:
            ValueError: the first token of an answer of a judge in this process does not tell the labels apart.
        """
        judge = self.judge.build(context)
        judge.check_choices(LABELS)
        return Gap(self, judge, read_prompt(self.prompt, PROMPTS, "gap.txt"))


class Gap(RewardSource):
    """Rewards a completion by its gap to the reference in a column; a row without one is not applicable."""

    kind = "outcome"

    def __init__(self, config: GapConfig, judge: Judge, prompt: str) -> None:
        self.name = config.source_name
        self._config = config
        self._prompt = prompt
        self._asking = Asking(judge, self._questions)

    def judges(self) -> Mapping[str, Judge]:
        return self._asking.judges()

    def begin(self, rollout: Rollout) -> None:
        self._asking.begin(rollout)

    def score(self, rollout: Rollout) -> TokenRewards:
        """The gap on the last action token.

        Raises:
            ValueError: the data has no such column.
        """
        from rlhf_kit.rewards.outcome import outcome_rewards

        answers = iter(self._asking.answers(rollout))
        scores: list[float | None] = []
        biases: list[float] = []
        for text, reference in zip(rollout.texts, self._references(rollout), strict=True):
            if reference is None or text == reference:
                scores.append(None if reference is None else 0.0)
                continue
            one, other = next(answers), next(answers)
            if one.error is not None or other.error is not None:
                scores.append(math.nan)
                continue
            ahead, behind = log_odds(one), log_odds(other)
            biases.append((ahead + behind) / 2)
            gap = (ahead - behind) / 2 * (1 if text < reference else -1)
            scores.append(math.tanh(gap / 2) if self._config.bounded else gap)
        return replace(outcome_rewards(scores, rollout), metrics=self._metrics(biases))

    def _references(self, rollout: Rollout) -> list[str | None]:
        """The reference of each row: text, or the last message of the assistant; None where there is none."""
        column = self._config.column
        if column not in rollout.columns:
            have = ", ".join(rollout.columns) or "none"
            raise ValueError(f"the data has no column {column!r} with references (it has: {have}): name the column")
        values = rollout.columns[column]
        return [
            (completion_text(value) if value and (isinstance(value, str) or is_messages(value)) else None)
            for value in values
        ]

    def _questions(self, rollout: Rollout) -> list[Question]:
        """Two questions a row, the text that sorts first in front in the first of them.

        So the same two texts make the same two questions in the same order, whichever of them is the reference: the
        answers agree to the last bit, and the gap is antisymmetric to the last bit. A text has no gap to itself.
        """
        asked = []
        for prompt, text, reference in zip(rollout.prompts, rollout.texts, self._references(rollout), strict=True):
            if reference is None or text == reference:
                continue
            low, high = sorted((text, reference))
            for first, second in ((low, high), (high, low)):
                content = fill(
                    self._prompt,
                    prompt=fenced(dialogue_text(prompt), "prompt"),
                    first=fenced(first, "first completion"),
                    second=fenced(second, "second completion"),
                    question=self._config.question,
                )
                asked.append(Question([{"role": "user", "content": content}], choices=LABELS))
        return asked

    def _metrics(self, biases: Sequence[float]) -> dict[str, float]:
        """`first_place`: how many log-odds the judge gives to whatever stands first."""
        return {"first_place": fmean(biases)} if biases else {}


def log_odds(answer: Answer) -> float:
    """The judge's log-odds of the first label against the second."""
    first, second = answer.log_probs
    return first - second
