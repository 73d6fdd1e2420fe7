"""What sources that ask a judge share: they ask at the beginning of a rollout's scoring, and read the answers later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from rlhf_kit.judges.base import Answer, Judge, Question
from rlhf_kit.judges.config import JudgeConfig
from rlhf_kit.judges.prompts import fill, read_prompt
from rlhf_kit.problems import Problem
from rlhf_kit.rollout import Rollout

PROMPTS = "rlhf_kit.rewards.prompts"


class Asking:
    """A judge with the questions that it is asked about a rollout.

    Args:
        judge: who answers.
        questions: what is asked about a rollout.
    """

    def __init__(self, judge: Judge, questions: Callable[[Rollout], list[Question]]) -> None:
        self.judge = judge
        self._questions = questions
        self._begun: tuple[Sequence[str], Callable[[], list[Answer]]] | None = None

    def begin(self, rollout: Rollout) -> None:
        """Ask, so that a server can work meanwhile."""
        try:
            self._begun = (rollout.texts, self.judge.ask(self._questions(rollout)))
        except Exception:  # it is raised again by `answers`, where the ranks agree on it
            self._begun = None

    def answers(self, rollout: Rollout) -> list[Answer]:
        """The answers to the rollout's questions; asks them unless `begin` has."""
        begun, self._begun = self._begun, None
        if begun is None or begun[0] is not rollout.texts:
            return self.judge.ask(self._questions(rollout))()
        return begun[1]()

    def judges(self) -> Mapping[str, Judge]:
        """See `RewardSource.judges`."""
        return {"judge": self.judge}


def judge_problems(judge: JudgeConfig) -> Iterator[Problem]:
    """What cannot work about a source's judge; paths start at the source."""
    return (problem.under("judge") for problem in judge.problems())


def judge_files(judge: JudgeConfig) -> Iterator[tuple[str, str, bool]]:
    """What a source's judge reads; fields start at the source."""
    return ((f"judge.{field}", value, is_model) for field, value, is_model in judge.files())


def prompt_problems(path: str | None, placeholders: Sequence[str], field: str = "prompt") -> Iterator[Problem]:
    """What is wrong with a prompt file of the recipe's own, which `field` names."""
    if path is None:
        return
    try:
        fill(read_prompt(path, PROMPTS, ""), **dict.fromkeys(placeholders, ""))
    except (OSError, ValueError) as error:
        remedy = "the placeholders are " + ", ".join(f"{{{{{p}}}}}" for p in placeholders)
        yield Problem(field, str(error), path, remedy)
