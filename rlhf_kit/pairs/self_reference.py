"""Builder of pairs by self-reference: the judge answers the prompt itself before it compares two completions of it.

The judge answers, criticises each completion with its own answer as the reference, and says which of two is better
(arXiv 2406.11190). Departures: the strength of a preference is its probability, not a ratio of perplexities; position
bias is met by both orders of presentation, and criticism looks at one completion alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_kit.config import Config, Location
from rlhf_kit.data.messages import dialogue_text, prompt_messages
from rlhf_kit.judges.base import Answer, Judge, Question
from rlhf_kit.judges.config import JudgeConfig
from rlhf_kit.judges.prompts import fenced, fill, read_prompt
from rlhf_kit.pairs.builder import Row
from rlhf_kit.pairs.compared import ComparedPairs, Comparing, Judged, judged
from rlhf_kit.pairs.judged import PROMPTS
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.asking import judge_files, judge_problems, prompt_problems
from rlhf_kit.rewards.gap import LABELS, log_odds

if TYPE_CHECKING:
    from rlhf_kit.pairs.config import Pairs
    from rlhf_kit.pairs.context import PairsContext

PLACEHOLDERS = {
    "criticism": ("prompt", "answer", "completion"),
    "preference": ("prompt", "answer", "first", "second", "question"),
}


class SelfReferencePrompts(Config):
    """Files in the place of the kit's own prompts.

    They hold `{{prompt}}`, `{{answer}}` and `{{completion}}` (criticism), `{{prompt}}`, `{{answer}}`, `{{first}}`,
    `{{second}}` and `{{question}}` (preference).
    """

    criticism: Location | None = None
    preference: Location | None = None


class SelfReference(Comparing):
    """Of every two completions of a prompt, the one that a judge prefers who has answered the prompt before.

    The judge is asked the prompt as it stands, then with `criticise` for a criticism of each completion beside its own
    answer, then which of two is the better one, in both orders; a side's score is the probability of being preferred,
    the mean over the orders. `judge.max_tokens` must hold its answers: one that is cut off or empty has failed, and so
    have the pairs that need it. The rows tell the answer (`judge_answer`) and the criticisms.
    """

    type: Literal["self_reference"]
    judge: JudgeConfig
    criticise: bool = True
    question: str = "Which of the two is the better completion?"
    prompts: SelfReferencePrompts = SelfReferencePrompts()

    @property
    def judged_by(self) -> tuple[JudgeConfig, ...]:
        return (self.judge,)

    def problems(self, stage: Pairs) -> Iterator[Problem]:
        yield from super().problems(stage)
        yield from (problem.under("builder") for problem in judge_problems(self.judge))
        for name, path in self.prompts:
            yield from prompt_problems(path, PLACEHOLDERS[name], f"builder.prompts.{name}")
        if self.prompts.criticism is not None and not self.criticise:
            yield Problem("builder.prompts.criticism", "is never used without criticise", remedy="remove it")

    def files(self) -> Iterator[tuple[str, str, bool]]:
        for name, path in self.prompts:
            if path is not None:
                yield f"prompts.{name}", path, False
        yield from judge_files(self.judge)

    def build(self, context: PairsContext) -> SelfReferencePairs:
        return SelfReferencePairs(context, self)


class SelfReferencePairs(ComparedPairs):
    """See `SelfReference`."""

    facts_of_pairs: ClassVar = ("judge_answer",)
    facts_of_sides: ClassVar = ("criticism",)

    def __init__(self, context: PairsContext, config: SelfReference) -> None:
        super().__init__(context, config)
        self._config = config
        own = dict(config.prompts)
        self._prompts = {name: read_prompt(own[name], PROMPTS, f"self_reference_{name}.txt") for name in PLACEHOLDERS}

    @cached_property
    def judge(self) -> Judge:
        """Who answers, criticises and compares."""
        judge = self.context.judge(self._config.judge)
        judge.check_choices(LABELS)
        return judge

    def compare(self, rows: Sequence[Row], pairs: Sequence[tuple[int, int]]) -> list[Judged]:
        """A prompt is answered once, and a completion criticised once, whatever the number of its pairs."""
        own = self._answers(rows, sorted({place for pair in pairs for place in pair}))
        criticisms = self._criticisms(rows, own)
        asked = [pair for pair in pairs if set(pair) <= set(criticisms)]
        questions = [
            self._question(
                "preference",
                rows[first],
                own[first],
                LABELS,
                first=_shown("first completion", rows[first], criticisms[first]),
                second=_shown("second completion", rows[second], criticisms[second]),
                question=self._config.question,
            )
            for pair in asked
            for first, second in (pair, pair[::-1])
        ]
        given = [None if answer.error is not None else log_odds(answer) for answer in self.judge.ask(questions)()]
        odds = dict(zip(asked, zip(given[::2], given[1::2], strict=True), strict=True))
        found = []
        for pair in pairs:
            straight, swapped = odds.get(pair, (None, None))
            both = None if straight is None or swapped is None else (straight, swapped)
            one, other = ({"criticism": criticisms.get(place)} for place in pair)
            found.append(judged(both, (one, other), {"judge_answer": own.get(pair[0])}))
        return found

    def _answers(self, rows: Sequence[Row], places: Sequence[int]) -> dict[int, str]:
        """The judge's own answer to the prompt of each row; those that failed are missing."""
        prompts = {rows[place]["prompt_index"]: rows[place]["prompt"] for place in places}
        given = self.judge.ask([Question(prompt_messages(prompt, None)) for prompt in prompts.values()])()
        answers = dict(zip(prompts, map(_said, given), strict=True))
        return {place: answer for place in places if (answer := answers[rows[place]["prompt_index"]])}

    def _criticisms(self, rows: Sequence[Row], own: Mapping[int, str]) -> dict[int, str | None]:
        """What the judge says of each completion, None where it is not to; those that failed are missing."""
        if not self._config.criticise:
            return dict.fromkeys(own)
        questions = [
            self._question("criticism", rows[place], answer, completion=fenced(rows[place]["text"], "completion"))
            for place, answer in own.items()
        ]
        given = map(_said, self.judge.ask(questions)())
        return {place: said for place, said in zip(own, given, strict=True) if said}

    def _question(self, name: str, row: Row, answer: str, choices: Sequence[str] = (), **values: str) -> Question:
        own = {"prompt": fenced(dialogue_text(row["prompt"]), "prompt"), "answer": fenced(answer, "answer")}
        content = fill(self._prompts[name], **own, **values)
        return Question([{"role": "user", "content": content}], choices=tuple(choices))


def _said(answer: Answer) -> str:
    """What a judge wrote; nothing where it failed."""
    return "" if answer.error is not None else answer.text.strip()


def _shown(what: str, row: Row, criticism: str | None) -> str:
    """A completion, with what the judge said of it."""
    completion = fenced(row["text"], what)
    return completion if criticism is None else f"{completion}\n\nYou said of it:\n\n{fenced(criticism, 'criticism')}"
