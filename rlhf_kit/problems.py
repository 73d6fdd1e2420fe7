"""What is wrong with a recipe, said so that the reader knows what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rlhf_kit.redact import REDACTED, is_secret, redact

LONGEST_VALUE = 60


class Unset(Enum):
    """Stands for a value that is not there, where `None` is a value like any other."""

    UNSET = "unset"


UNSET = Unset.UNSET


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong (or doubtful) in a recipe.

    Attributes:
        path: dotted path of the field (`stages.ppo.rewards.0.weight`); empty for the recipe as a whole.
        message: what is wrong.
        value: the value found there, `UNSET` where there is none to show.
        remedy: what to do about it.
    """

    path: str
    message: str
    value: Any = UNSET
    remedy: str = ""

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        shown = REDACTED if is_secret(self.path.rpartition(".")[2]) else show(self.value)
        value = "" if self.value is UNSET else f" (value {shown})"
        remedy = f"; {self.remedy}" if self.remedy else ""
        return " ".join(f"{where}{self.message}{value}{remedy}".split())

    def under(self, prefix: str) -> Problem:
        """The same problem, its path taken to start at `prefix`."""
        path = ".".join(part for part in (prefix, self.path) if part)
        return Problem(path, self.message, self.value, self.remedy)


class RecipeError(Exception):
    """A recipe that cannot be run; its text is one line for each of `problems`, opening with `source`."""

    def __init__(self, source: object, problems: Sequence[Problem]) -> None:
        self.source = str(source)
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{self.source}: {problem}" for problem in self.problems))


def show(value: object) -> str:
    """The value as one short piece of text, without secrets of well-known forms."""
    text = value if isinstance(value, str) else "null" if value is None else repr(value)
    text = redact(" ".join(text.split()))
    if len(text) > LONGEST_VALUE:
        text = text[: LONGEST_VALUE - 3] + "..."
    return f"'{text}'" if isinstance(value, str) else text


def did_you_mean(name: object, choices: Iterable[str], or_else: str = "") -> str:
    """`did you mean 'weight'?` where one of `choices` is close to `name`, otherwise `or_else`."""
    lowered = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.6)
    return f"did you mean '{lowered[close[0]]}'?" if close else or_else


def listed(choices: Iterable[object]) -> str:
    """`a, b, c`."""
    return ", ".join(str(choice) for choice in choices)
