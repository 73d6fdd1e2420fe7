"""What is asked of a judge, and what it answers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_kit.judges.parsing import has_whole_object
from rlhf_kit.rollout import Message

CUT_OFF = "the answer was cut off at its longest length: raise the judge's max_tokens"


@dataclass(frozen=True)
class Question:
    """Messages to a judge.

    Attributes:
        messages: the conversation that the judge answers.
        schema: JSON schema of the answer, for servers that can hold a model to one.
        choices: the words that the answer may begin with; the judge gives their log-probabilities instead of text.
    """

    messages: Sequence[Message]
    schema: Mapping[str, Any] | None = None
    choices: Sequence[str] = ()


@dataclass(frozen=True)
class Answer:
    """A judge's answer; with an `error` it failed, and there is nothing else in it.

    Attributes:
        text: what the judge wrote; empty for a question with choices.
        log_probs: for a question with choices, the log-probability of each: that the answer begins with it, summed over
            its surface forms ("Yes", " yes", ...).
        error: why there is no answer.
    """

    text: str = ""
    log_probs: Sequence[float] = ()
    error: str | None = None


def lead(log_odds: float) -> float:
    """`sigmoid(x) - 1/2 = tanh(x / 2) / 2`, which is exactly odd and cannot overflow."""
    return math.tanh(log_odds / 2) / 2


def cut_answer(text: str, question: Question) -> Answer:
    """An answer that ended at `max_tokens`: an error, unless JSON was asked for and an object of it is whole.

    Small models write on behind the object; what is cut of that is no part of the answer.
    """
    if question.schema is not None and has_whole_object(text):
        return Answer(text=text)
    return Answer(error=CUT_OFF)


class Judge(ABC):
    """Answers questions; a question that fails gets an `Answer` with an error, never an exception.

    Attributes:
        remote: it works in another process, from when it is asked.
    """

    remote = False

    @abstractmethod
    def ask(self, questions: Sequence[Question]) -> Callable[[], list[Answer]]:
        """Begin to answer; calling the result waits for the answers, in the order of the questions.

        A judge on a server works meanwhile; one in this process does all its work when it is waited for.
        """

    def check_choices(self, choices: Sequence[str]) -> None:
        """Refuse choices that it could never answer with, before anything is asked.

        Raises:
            ValueError: the first token of an answer would not tell them apart.
        """
        return

    def metrics(self) -> dict[str, float]:
        """Calls, tokens, cache hits and the like since this was asked last."""
        return {}

    def used(self) -> dict[str, float]:
        """What counts against its budget, in all."""
        return {}

    def resume(self, used: Mapping[str, float]) -> None:
        """Go on from what a run had used before it was stopped."""
        return
