"""How often a judge prefers one set of completions to another, asked in both orders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeFloat, PositiveInt

from rlhf_kit.config import Location
from rlhf_kit.data.config import DataConfig
from rlhf_kit.evals.base import Columns, EvaluationConfig, missing_text
from rlhf_kit.evals.result import Result, Table
from rlhf_kit.evals.verdicts import Compared, counts
from rlhf_kit.judges.config import JudgeConfig
from rlhf_kit.models.config import Pretrained
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.asking import PROMPTS, judge_files, judge_problems, prompt_problems
from rlhf_kit.rewards.gap import LABELS, PLACEHOLDERS

if TYPE_CHECKING:
    from rlhf_kit.evals.context import EvalContext
    from rlhf_kit.evals.stage import Eval


class WinRate(EvaluationConfig):
    """Win rate of the stage's model, or of a `column` of completions, against a `reference` column or an `opponent`.

    The judge sees the two completions in both orders. A win needs both; where they disagree it is a tie, and ties
    count half. How often the judge prefers what stands first is told as well. Completions are sampled at `temperature`
    (0 is greedy). A `prompt` file is one of the source `gap`: `{{prompt}}`, `{{first}}`, `{{second}}`, `{{question}}`.
    """

    type: Literal["win_rate"]
    data: DataConfig
    judge: JudgeConfig
    column: str | None = None
    reference: str = "reference"
    opponent: Pretrained | None = None
    question: str = "Which of the two is the better completion?"
    prompt: Location | None = None
    max_new_tokens: PositiveInt = 256
    temperature: NonNegativeFloat = 0.0
    batch_size: PositiveInt = 16

    @property
    def runs_model(self) -> bool:
        return self.column is None or self.judge.type == "policy"

    def data_sets(self) -> Iterator[tuple[str, DataConfig, Columns]]:
        names = [self.column] if self.column else []
        names += [] if self.opponent else [self.reference]
        yield "data", self.data, dict.fromkeys(names, self.type)

    def row_problem(self, field: str, row: Mapping[str, Any]) -> str | None:
        return missing_text(row, *(name for _, _, columns in self.data_sets() for name in columns))

    def files(self) -> Iterator[tuple[str, str, bool]]:
        if self.opponent is not None:
            yield "opponent.path", self.opponent.path, True
        if self.prompt is not None:
            yield "prompt", self.prompt, False
        yield from judge_files(self.judge)

    def problems(self, stage: Eval) -> Iterator[Problem]:
        yield from judge_problems(self.judge)
        yield from prompt_problems(self.prompt, PLACEHOLDERS)
        if self.opponent is not None and self.opponent.peft is not None:
            yield Problem("opponent.peft", "adds an adapter to train, and nothing trains here", remedy="remove it")

    def run(self, context: EvalContext) -> Result:
        """Sample what is not given, and ask.

        Raises:
            ValueError: the judge answers no question.
        """
        from rlhf_kit.data.messages import completion_text
        from rlhf_kit.evals.context import prompt_key

        rows = context.load(self.data)
        prompts = [row["prompt"] for row in rows]
        if self.column is not None:
            ours = [completion_text(row[self.column]) for row in rows]
        else:
            ours = self._sampled(context, prompts, None)
        if self.opponent is not None:
            theirs = self._sampled(context, prompts, self.opponent)
        else:
            theirs = [completion_text(row[self.reference]) for row in rows]
        compared, failed = self._compare(context, prompts, ours, theirs)
        kept = [row for row, item in enumerate(compared) if item is not None]
        if not kept:
            raise ValueError(f"the judge answered none of {2 * len(rows)} questions: {failed[0] if failed else ''}")
        result = Result()
        found = [item for item in compared if item is not None]
        lengths = [(len(ours[row].split()), len(theirs[row].split())) for row in kept]
        _report(result, found, lengths, [prompt_key(prompts[row]) for row in kept])
        equal = sum(ours[row] == theirs[row] for row in kept)
        result.notes.append(f"{len(kept)} prompts; intervals: bootstrap over prompts. {equal} pairs are equal: ties.")
        if failed:
            result.notes.append(f"{len(rows) - len(kept)} rows are left out, the judge failed: {failed[0]}")
        return result

    def _sampled(self, context: EvalContext, prompts: Sequence[Any], model: Pretrained | None) -> list[str]:
        from rlhf_kit.models.loading import load_tokenizer

        return [
            text
            for text, _ in context.sample(
                prompts,
                self.max_new_tokens,
                self.temperature or None,
                self.batch_size,
                model=None if model is None else context.load_model(model),
                tokenizer=None if model is None else load_tokenizer(model),
            )
        ]

    def _compare(
        self, context: EvalContext, prompts: Sequence[Any], ours: Sequence[str], theirs: Sequence[str]
    ) -> tuple[list[Compared | None], list[str]]:
        """What the judge says of each row, None where it failed, and why it did. Equal texts are a tie, unasked."""
        from rlhf_kit.data.messages import dialogue_text
        from rlhf_kit.judges.base import Question
        from rlhf_kit.judges.prompts import fenced, fill, read_prompt
        from rlhf_kit.rewards.gap import log_odds

        template = read_prompt(self.prompt, PROMPTS, "gap.txt")
        questions = []
        for prompt, own, other in zip(prompts, ours, theirs, strict=True):
            for first, second in ((own, other), (other, own)) if own != other else ():
                content = fill(
                    template,
                    prompt=fenced(dialogue_text(prompt), "prompt"),
                    first=fenced(first, "first completion"),
                    second=fenced(second, "second completion"),
                    question=self.question,
                )
                questions.append(Question([{"role": "user", "content": content}], choices=LABELS))
        judge = context.judge(self.judge)
        answers = iter(judge.ask(questions)() if questions else ())
        compared: list[Compared | None] = []
        errors: list[str] = []
        for own, other in zip(ours, theirs, strict=True):
            if own == other:
                compared.append(Compared(0.0, 0.0))
                continue
            pair = next(answers), next(answers)
            error = next((answer.error for answer in pair if answer.error is not None), None)
            errors += [] if error is None else [error]
            compared.append(None if error is not None else Compared(*(log_odds(answer) for answer in pair)))
        return compared, errors


def _report(
    result: Result, compared: Sequence[Compared], lengths: Sequence[tuple[int, int]], keys: Sequence[str]
) -> None:
    from rlhf_kit.evals.resampling import mean_estimate

    nan = float("nan")
    points = [item.points for item in compared]
    pairs = list(zip(points, lengths, strict=True))
    values = {
        "win_rate": points,
        "wins": [float(item.winner == "win") for item in compared],
        "ties": [float(item.winner == "tie") for item in compared],
        "losses": [float(item.winner == "loss") for item in compared],
        "first_place": [item.first_place if item.decided else nan for item in compared],
        "consistent": [float(item.consistent) if item.decided else nan for item in compared],
        "words": [float(own) for own, _ in lengths],
        "reference_words": [float(other) for _, other in lengths],
        "win_rate_where_longer": [p if own > other else nan for p, (own, other) in pairs],
        "win_rate_where_shorter": [p if own < other else nan for p, (own, other) in pairs],
    }
    for name, own in values.items():
        found = mean_estimate(own, keys)
        if found is not None:
            result.figures[name] = found
    names = {
        "win_rate": "win rate, ties half",
        "wins": "wins",
        "ties": "ties",
        "losses": "losses",
        "first_place": "what stands first is preferred",
        "consistent": "both orders agree",
        "words": "words",
        "reference_words": "words of the other",
        "win_rate_where_longer": "win rate where ours is longer",
        "win_rate_where_shorter": "win rate where ours is shorter",
    }
    number = counts(compared)
    rows = [[text, result.figures.get(name)] for name, text in names.items()]
    title = f"{number['win']} wins, {number['tie']} ties, {number['loss']} losses"
    result.tables.append(Table(title, ["", ""], rows))
