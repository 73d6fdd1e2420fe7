"""What users say about answers: the exchanges of a dialogue, and rules that read a user's next turn."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError, field_validator

from rlhf_kit.config import Config
from rlhf_kit.data.messages import completion_text, content_text, without_nulls
from rlhf_kit.redact import redact_personal
from rlhf_kit.rollout import Message

SATISFIED, DISSATISFIED, NEITHER = LABELS = ("satisfied", "dissatisfied", "neither")
RULES = "feedback_rules.json"
FIELDS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id")
_ANSWERING = ("assistant", "tool")


@dataclass(frozen=True)
class Exchange:
    """An answer within a dialogue.

    Attributes:
        prompt: the messages before it.
        completion: the assistant's messages up to the next turn, with what tools said.
        feedback: what the user says next; None where the dialogue ends.
    """

    prompt: list[Message]
    completion: list[Message]
    feedback: str | None

    @property
    def asked(self) -> str:
        """What the user said last before the answer."""
        return next(content_text(message) for message in reversed(self.prompt) if message["role"] == "user")


def exchanges(messages: Sequence[Message]) -> list[Exchange]:
    """Every answer of the assistant that says something after a turn of the user."""
    runs = [list(run) for _, run in groupby(messages, key=lambda message: message["role"] in _ANSWERING)]
    found: list[Exchange] = []
    before: list[Message] = []
    for run, later in zip(runs, [*runs[1:], []], strict=False):
        asked = any(message["role"] == "user" for message in before)
        if asked and run[0]["role"] in _ANSWERING and completion_text(run).strip():
            said = [content_text(message) for message in later if message["role"] == "user"]
            found.append(Exchange(before, run, "\n\n".join(said) if said else None))
        before = [*before, *run]
    return found


def redacted_message(message: Message) -> Message:
    """What a chat template shows of a message, without personal data; logs also tell addresses, times and places."""
    told = (*FIELDS, "name") if message["role"] == "tool" else FIELDS  # elsewhere a name is somebody's
    kept = {name: value for name, value in message.items() if name in told}
    return {name: value if name == "role" else _redacted(value) for name, value in without_nulls(kept).items()}


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact_personal(value)
    if isinstance(value, Mapping):
        return {name: _redacted(item) for name, item in value.items()}
    return [_redacted(item) for item in value] if isinstance(value, list) else value


class Rule(Config):
    """A turn that one of the patterns is found in has the label."""

    name: str
    label: Literal["satisfied", "dissatisfied", "neither"]
    patterns: Annotated[tuple[str, ...], Field(min_length=1)]


class FeedbackRules(Config):
    """The first rule that holds for the first `within` characters of a user's turn gives its label and its name.

    Patterns are regular expressions that know no case; `<name>` in one stands for a piece of that name. They see
    straight apostrophes, and single spaces for white space. Where none is found, a turn of at least `fewest_words`
    words that says what the user said before the answer, `repeated` of it, is dissatisfied.
    """

    within: PositiveInt = 200
    repeated: Annotated[float, Field(gt=0, le=1)] | None = None
    fewest_words: PositiveInt = 4
    pieces: dict[str, str] = Field(default_factory=dict)
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]
    apologies: tuple[str, ...] = ()

    @field_validator("rules")
    @classmethod
    def _different(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        names = [rule.name for rule in rules]
        if len(set(names)) < len(names):
            raise ValueError(f"two rules have one name, of {', '.join(names)}")
        return rules

    @cached_property
    def compiled(self) -> dict[str, list[re.Pattern[str]]]:
        """The patterns of each rule by its name; those of `apologies` under "".

        Raises:
            ValueError: one is no regular expression.
        """
        patterns = {"": self.apologies, **{rule.name: rule.patterns for rule in self.rules}}
        return {name: [self._compile(pattern) for pattern in own] for name, own in patterns.items()}

    def _compile(self, pattern: str) -> re.Pattern[str]:
        whole = pattern
        for _ in self.pieces:  # a piece may hold others
            for name, piece in self.pieces.items():
                whole = whole.replace(f"<{name}>", piece)
        try:
            return re.compile(whole, re.IGNORECASE)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error

    def classify(self, exchange: Exchange) -> tuple[str, str]:
        """The label of what the user says next, and the rule that gave it ("" where none holds)."""
        said = _plain(exchange.feedback or "")
        for rule in self.rules:
            if any(pattern.search(said[: self.within]) for pattern in self.compiled[rule.name]):
                return rule.label, rule.name
        if self.repeated is not None:
            now, before = (_words(text) for text in (said, exchange.asked))
            alike = SequenceMatcher(None, before, now, autojunk=False).ratio() >= self.repeated
            if alike and len(now) >= self.fewest_words:
                return DISSATISFIED, "repeated"
        return NEITHER, ""

    def apologises(self, text: str) -> bool:
        """Whether an answer opens with an apology, which makes sense only after a complaint."""
        return any(pattern.search(_plain(text)[: self.within]) for pattern in self.compiled[""])


def _plain(text: str) -> str:
    return " ".join(text.replace("\u2019", "'").split())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def read_rules(path: str | None) -> FeedbackRules:
    """The rules of a file, or the kit's.

    Raises:
        ValueError: the file does not hold rules.
    """
    source = files("rlhf_kit.pairs").joinpath(RULES) if path is None else Path(path)
    try:
        rules = FeedbackRules.model_validate(json.loads(source.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, ValidationError) as error:
        raise ValueError(f"holds no rules like {{rules: [{{name, label, patterns}}]}}: {error}") from error
    assert rules.compiled
    return rules
