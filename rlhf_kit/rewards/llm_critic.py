"""Rewards on the passages that a language model quotes as good or bad (DRLC, arXiv 2401.07382)."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonPositiveFloat

from rlhf_kit.config import Location
from rlhf_kit.data.messages import dialogue_text, is_messages
from rlhf_kit.judges.base import Answer, Judge, Question
from rlhf_kit.judges.config import JudgeConfig
from rlhf_kit.judges.prompts import fenced, fill, read_prompt
from rlhf_kit.problems import Problem
from rlhf_kit.redact import redact
from rlhf_kit.rewards.asking import PROMPTS, Asking, judge_files, judge_problems
from rlhf_kit.rewards.config import BuildContext, SourceConfig
from rlhf_kit.rewards.quotes import VERDICTS, Reading, read_answer
from rlhf_kit.rewards.text import Judged, TextSource, TextSourceConfig
from rlhf_kit.rollout import Message, Rollout, Span, Status, Text

if TYPE_CHECKING:
    from rlhf_kit.models.config import Pretrained, Scratch

logger = logging.getLogger(__name__)

LONGEST_SHOWN = 200  # characters of an answer in a warning
_PROMPT = re.compile(r"\{\{\s*prompt\s*\}\}")
# Every field is required, as servers that hold a model to a schema want it: null says nothing.
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "spans": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "quote": {"type": "string"},
                    "verdict": {"type": "string", "enum": list(VERDICTS)},
                    "occurrence": {"type": ["integer", "null"]},
                },
                "required": ["quote", "verdict", "occurrence"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["spans"],
    "additionalProperties": False,
}


class LlmCriticConfig(TextSourceConfig):
    """`good` or `bad` on each passage that the `judge` quotes (DRLC, arXiv 2401.07382, where they are alpha_2).

    Departure: the paper pays alpha_2 to every token of a passage, which here is `placement: each`. Elsewhere a passage
    earns it once, wherever `placement` puts it, so that neither long passages nor fine tokenizers earn more.

    The critic reads `task`, the prompt, the completion and, with `show_outcome`, its outcome. With `ask: below` it is
    asked only about completions whose outcome lies below `threshold`; the others earn 0. Outcomes are those of the
    sources that label them. A judge of type `policy` is the paper's self-critique.

    `prompt` is a file in the place of the source's own; it holds `{{completion}}`, `{{task}}` where there is a `task`,
    `{{outcome}}` with `show_outcome` and, unless the critic need not know it, `{{prompt}}`, and asks for `{"spans":
    [{"quote": ..., "verdict": "good" | "bad", "occurrence": number or null}]}`. `examples` is a file of JSON lines with
    `prompt`, `completion`, `spans` of that form and, with `show_outcome`, `outcome`: the critic reads them as questions
    that it has answered before. A small model answers in that form only after some.
    """

    type: Literal["llm_critic"]
    judge: JudgeConfig
    task: str | None = None
    prompt: Location | None = None
    examples: Location | None = None
    good: NonNegativeFloat = 0.5
    bad: NonPositiveFloat = -0.5
    ask: Literal["always", "below"] = "always"
    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    show_outcome: bool = False

    @property
    def needs_outcomes(self) -> bool:
        """Whether the critic cannot be asked before the outcome is known."""
        return self.ask == "below" or self.show_outcome

    def problems(self, policy: Pretrained | Scratch, rewards: Sequence[SourceConfig]) -> Iterator[Problem]:
        if self.needs_outcomes and not any(source.labels_outcomes for source in rewards):
            path, value = ("ask", "below") if self.ask == "below" else ("show_outcome", True)
            remedy = "add a verifier, or a function with bounded: true, to rewards"
            yield Problem(path, "looks at outcomes, and no source gives them", value, remedy)
        if self.ask == "below" and self.threshold is None:
            yield Problem("threshold", "ask: below needs it", remedy="write an outcome between 0 and 1, such as 0.5")
        if self.ask == "always" and self.threshold is not None:
            yield Problem("threshold", "is never used by ask: always", self.threshold, "remove it, or write ask: below")
        if self.good == 0 and self.bad == 0:
            yield Problem("good", "with bad: 0 every reward is 0", self.good, "give one of them a value")
        if self.prompt is None and not self.task:
            yield Problem("task", "the critic's prompt says what the task is", self.task, "say it in a sentence or two")
        else:
            yield from self._prompt_problems()
        yield from judge_problems(self.judge)

    def _prompt_problems(self) -> Iterator[Problem]:
        if any(not Path(path).exists() for _, path, _ in self._own_files()):
            return  # which is said of all files
        try:
            prompt = self.critic_prompt()
        except (OSError, ValueError) as error:
            yield Problem("prompt", str(error), self.prompt)
            return
        try:
            self.worked_examples(prompt)
        except (OSError, ValueError) as error:
            yield Problem("examples", str(error), self.examples)

    def files(self) -> Iterator[tuple[str, str, bool]]:
        yield from self._own_files()
        yield from judge_files(self.judge)

    def _own_files(self) -> Iterator[tuple[str, str, bool]]:
        for name, path in (("prompt", self.prompt), ("examples", self.examples)):
            if path is not None:
                yield name, path, False

    def critic_prompt(self) -> CriticPrompt:
        """The question to the critic.

        Raises:
            ValueError: the prompt lacks a placeholder, or has one that nothing is known for.
        """
        own = "llm_critic_outcome.txt" if self.show_outcome else "llm_critic.txt"
        prompt = CriticPrompt(read_prompt(self.prompt, PROMPTS, own), self.task, self.show_outcome)
        prompt.question("", "")
        return prompt

    def worked_examples(self, prompt: CriticPrompt) -> list[Message]:
        """The questions of `examples`, asked as `prompt` asks, and the answers to them.

        Raises:
            ValueError: a line is no example, or quotes what does not stand in its completion; it says which line.
        """
        lines = [] if self.examples is None else Path(self.examples).read_text(encoding="utf-8").split("\n")
        numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        return [message for number, line in numbered for message in prompt.worked_example(line, number)]

    def build(self, context: BuildContext) -> LlmCritic:
        """The source; a judge in this process loads its model."""
        return LlmCritic(self, self.judge.build(context))


@dataclass(frozen=True)
class CriticPrompt:
    """What a critic is asked about a completion.

    Attributes:
        template: the question, with placeholders.
        task: what the completion was to do.
        show_outcome: the critic is told the completion's outcome.
    """

    template: str
    task: str | None = None
    show_outcome: bool = False

    def question(self, prompt: Text, completion: str, outcome: float = math.nan) -> str:
        """The template with the completion and the prompt in it, both fenced as data; NaN is an unknown outcome."""
        values = {"completion": fenced(completion, "completion")}
        if _PROMPT.search(self.template):
            values["prompt"] = fenced(dialogue_text(prompt), "prompt")
        if self.task:
            values["task"] = self.task
        if self.show_outcome:
            values["outcome"] = "unknown" if math.isnan(outcome) else f"{outcome:.2f}"
        return fill(self.template, **values)

    def worked_example(self, line: str, number: int) -> list[Message]:
        """A line of examples as a question and its answer.

        Raises:
            ValueError: it is no example.
        """
        fields = ["prompt", "completion", "spans", *(["outcome"] if self.show_outcome else [])]
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: broken JSON: {error.msg}") from error
        if not isinstance(row, dict) or not set(fields) <= set(row):
            raise ValueError(f"line {number}: an example is an object with the fields {', '.join(fields)}")
        prompt, outcome = row["prompt"], row.get("outcome", math.nan)
        texts = isinstance(row["completion"], str) and (isinstance(prompt, str) or is_messages(prompt))
        if not texts or not isinstance(outcome, int | float):
            what = "prompt is text or messages, completion is text, and an outcome is a number"
            raise ValueError(f"line {number}: {what}")
        answer = json.dumps({"spans": row["spans"]}, ensure_ascii=False)
        reading = read_answer(answer, row["completion"])
        if reading is None or reading.dropped:
            what = "each span of an example has a quote that stands in its completion, and a verdict, good or bad"
            raise ValueError(f"line {number}: {what}")
        question = self.question(prompt, row["completion"], outcome)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class LlmCritic(TextSource):
    """Asks a critic for the good and the bad passages of each completion.

    A completion that the critic is not asked about, for its outcome is not below the threshold or it has no text, is
    judged, and earns 0: the reward of every completion is then defined, and a baseline over a group is one over all of
    it. A row without an outcome is not applicable where that decides whether to ask. An answer that cannot be read is
    a failure, as one that did not come is.
    """

    kind = "process"

    def __init__(self, config: LlmCriticConfig, judge: Judge) -> None:
        super().__init__(config)
        self.needs_outcomes = config.needs_outcomes
        self._config = config
        self._prompt = config.critic_prompt()
        self._examples = config.worked_examples(self._prompt)
        self._asking = Asking(judge, self._questions)

    def judges(self) -> Mapping[str, Judge]:
        return self._asking.judges()

    def begin(self, rollout: Rollout) -> None:
        """Send the questions; a judge on a server answers while models score."""
        self._asking.begin(rollout)

    def judge(self, rollout: Rollout) -> Judged:
        """The passages that the critic names, in the order of its answer.

        Raises:
            ValueError: it looks at outcomes, and the rollout has none.
        """
        entries = self._entries(rollout)
        answers = iter(self._asking.answers(rollout))
        rows: list[list[Span] | Status] = []
        readings: list[Reading] = []
        unreadable: list[Answer] = []
        for prompt, text, entry in zip(rollout.prompts, rollout.texts, entries, strict=True):
            if not isinstance(entry, Question):
                rows.append([] if entry is Status.OK else entry)
                continue
            answer = next(answers)
            reading = None if answer.error is not None else read_answer(answer.text, text, prompt)
            rows.append(Status.FAILED if reading is None else self._spans(reading))
            readings += [] if reading is None else [reading]
            unreadable += [answer] if reading is None and answer.error is None else []
        self._warn(unreadable)
        asked = sum(isinstance(entry, Question) for entry in entries)
        return Judged(rows, self._metrics(len(entries), asked, len(unreadable), readings))

    def _questions(self, rollout: Rollout) -> list[Question]:
        return [entry for entry in self._entries(rollout) if isinstance(entry, Question)]

    def _entries(self, rollout: Rollout) -> list[Question | Status]:
        """For each row what is asked about it, or else its status."""
        outcomes = [math.nan] * len(rollout)
        if self.needs_outcomes:
            if rollout.outcomes is None:
                raise ValueError(
                    f"'{self.name}' looks at outcomes, and no source has given any; add a verifier, or a function with "
                    "bounded: true, or write ask: always and show_outcome: false"
                )
            outcomes = rollout.outcomes.tolist()
        return [self._entry(rollout, row, outcome) for row, outcome in enumerate(outcomes)]

    def _entry(self, rollout: Rollout, row: int, outcome: float) -> Question | Status:
        text, config = rollout.texts[row], self._config
        if not text.strip():
            return Status.OK
        if config.ask == "below":
            assert config.threshold is not None
            if math.isnan(outcome):
                return Status.NOT_APPLICABLE
            if outcome >= config.threshold:
                return Status.OK
        content = self._prompt.question(rollout.prompts[row], text, outcome)
        return Question([*self._examples, {"role": "user", "content": content}], SCHEMA)

    def _spans(self, reading: Reading) -> list[Span]:
        rewards = {True: self._config.good, False: self._config.bad}
        return [Span(start, end, rewards[good], self.name) for (start, end), good in reading.spans]

    def _warn(self, unreadable: Sequence[Answer]) -> None:
        if unreadable:
            logger.warning(
                "%s: %d answers of the critic are not the JSON that was asked for, such as %r",
                self.name,
                len(unreadable),
                redact(unreadable[0].text)[:LONGEST_SHOWN],
            )

    def _metrics(self, rows: int, asked: int, unreadable: int, readings: Sequence[Reading]) -> dict[str, float]:
        """The share of rows that were `asked` about and, of their answers, the share `unreadable`; passages an answer
        that could be read: `quotes` named, of these the share `dropped`, and those that are `good` and `bad`."""
        metrics = {"asked": asked / rows} if rows else {}
        if asked:
            metrics["unreadable"] = unreadable / asked
        if readings:
            placed = [good for reading in readings for _, good in reading.spans]
            dropped = sum(reading.dropped for reading in readings)
            quotes = len(placed) + dropped
            metrics |= {"quotes": quotes / len(readings), "dropped": dropped / quotes if quotes else 0.0}
            metrics |= {"good": sum(placed) / len(readings), "bad": (len(placed) - sum(placed)) / len(readings)}
        return metrics
