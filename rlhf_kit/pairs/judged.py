"""What builders share that follow rules, unless the recipe names a language model to ask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from rlhf_kit.config import Location
from rlhf_kit.judges.config import JudgeConfig
from rlhf_kit.pairs.builder import BuilderBase
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.asking import judge_files, judge_problems, prompt_problems

if TYPE_CHECKING:
    from rlhf_kit.pairs.config import Pairs

PROMPTS = "rlhf_kit.pairs.prompts"


class MayAsk(BuilderBase):
    """Fields of a builder that samples nothing, and may ask a `judge` by a `prompt` of the recipe's own.

    Attributes:
        placeholders: what the prompt's file holds in braces.
    """

    may_use: ClassVar = frozenset({"model"})
    placeholders: ClassVar[tuple[str, ...]] = ()

    judge: JudgeConfig | None = None
    prompt: Location | None = None

    def problems(self, stage: Pairs) -> Iterator[Problem]:
        by_policy = self.judge is not None and self.judge.type == "policy"
        if by_policy and stage.model is None:
            yield Problem("model", "is missing, and is the judge", remedy="add model: {path: ...}")
        if stage.model is not None and not by_policy:
            yield Problem("model", "is never used: nothing is sampled", remedy="remove it, or write judge: policy")
        if self.judge is not None:
            yield from (problem.under("builder") for problem in judge_problems(self.judge))
        elif self.prompt is not None:
            yield Problem("builder.prompt", "is a judge's, and there is none", self.prompt, "add a judge")
        yield from prompt_problems(self.prompt, self.placeholders, "builder.prompt")

    def files(self) -> Iterator[tuple[str, str, bool]]:
        if self.prompt is not None:
            yield "prompt", self.prompt, False
        if self.judge is not None:
            yield from judge_files(self.judge)
