"""Whether a process source finds the first wrong step of a solution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from rlhf_kit.config import Location
from rlhf_kit.data.config import DataConfig
from rlhf_kit.evals.base import Columns, EvaluationConfig, is_sampled
from rlhf_kit.evals.config import PartShare, StepTruth
from rlhf_kit.evals.result import Estimate, Result, Table
from rlhf_kit.problems import Problem
from rlhf_kit.rollout import CharRange

if TYPE_CHECKING:
    from rlhf_kit.evals.context import EvalContext
    from rlhf_kit.evals.scoring import Scored
    from rlhf_kit.evals.stage import Eval
    from rlhf_kit.evals.steps import Solution


class FirstError(EvaluationConfig):
    """ProcessBench's accuracies on erroneous and on right solutions, and their F1 (arXiv 2412.06559).

    Every process source is judged. `path` is a ProcessBench file (`problem`, `steps`, `label`). Or `data` are rows
    `prompt, completion` whose steps have a known `truth`: steps behind the first wrong one are cut off. One solution a
    problem counts. A step scores the sum of its token rewards; it is called wrong below a threshold that is set on
    `threshold_fraction` of the problems and judged on the others. Beside the sources stand scores that need no model.
    F1 and AUC have intervals bootstrapped over problems; the accuracies, each a share of solutions of different
    problems, have Wilson's.
    """

    type: Literal["first_error"]
    path: Location | None = None
    data: DataConfig | None = None
    truth: StepTruth | None = None
    separator: str = "\n"
    prompt_template: str | None = None
    chat: bool = False
    system: str | None = None
    limit: PositiveInt | None = None
    threshold_fraction: PartShare = 0.5

    @property
    def asks_sources(self) -> bool:
        return True

    def data_sets(self) -> Iterator[tuple[str, DataConfig, Columns]]:
        if self.data is not None and self.truth is not None:
            names = () if is_sampled(self.data) else ("completion", self.truth.column)
            yield "data", self.data, dict.fromkeys(names, self.type)

    def row_problem(self, field: str, row: Mapping[str, Any]) -> str | None:
        assert self.truth is not None
        steps = row.get(self.truth.column)
        if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
            return f"{self.truth.column} is {steps!r}, and must be a list of steps"
        return None

    def files(self) -> Iterator[tuple[str, str, bool]]:
        if self.path is not None:
            yield "path", self.path, False

    def problems(self, stage: Eval) -> Iterator[Problem]:
        if (self.path is None) == (self.data is None):
            remedy = "give path (a ProcessBench file), or data and truth"
            yield Problem("", "needs one of path and data", remedy=remedy)
        if (self.data is None) != (self.truth is None):
            yield Problem("truth", "goes with data", remedy="write truth: {column: steps, separator: ' '}")
        if not self.separator or (self.truth is not None and not self.truth.separator):
            yield Problem("separator", "must not be empty", "", "write what stands between steps")
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            yield Problem("prompt_template", "does not say where the {prompt} goes", self.prompt_template)
        if stage.rewards and all(source.kind != "process" for source in stage.rewards):
            yield Problem(
                "", "needs a process source", remedy="add one to rewards, e.g. {type: implicit_prm, path: ...}"
            )

    def run(self, context: EvalContext) -> Result:
        """Score every step.

        Raises:
            ValueError: too few solutions, or a source judges none of them.
        """
        from rlhf_kit.data.files import local_file
        from rlhf_kit.evals.steps import baseline_scores, load_processbench

        if self.path is not None:
            solutions = load_processbench(local_file(self.path), self.limit)
            prompts: dict[str, Any] = {s.problem: self._prompt(s.problem) for s in solutions}
            separator = self.separator
        else:
            assert self.data is not None and self.truth is not None
            solutions, prompts = self._known(context.load(self.data))
            separator = self.truth.separator
        rows = [{"prompt": prompts[s.problem], "completion": separator.join(s.steps)} for s in solutions]
        scored = context.score(rows)
        result = Result()
        for name, source in scored.sources.items():
            if source.kind == "process":
                sums = [step_scores(scored, name, row, s.steps, separator) for row, s in enumerate(solutions)]
                kept = [row for row, own in enumerate(sums) if own is not None]
                if len(kept) < len(solutions):
                    result.notes.append(
                        f"{name}: {len(solutions) - len(kept)} of {len(solutions)} solutions are left out: the source "
                        "failed, or the tokenizer does not give their text back."
                    )
                self._add(result, name, [solutions[row] for row in kept], [sums[row] or [] for row in kept])
        for name, sums in baseline_scores(solutions).items():
            self._add(result, f"{name} alone", solutions, sums)
        heads = ["", "F1", "erroneous found", "right passed", "step AUC", "threshold"]
        names = list(dict.fromkeys(figure.rpartition(".")[0] for figure in result.figures))
        keys = ("f1", "erroneous", "correct", "step_auc", "threshold")
        table = [[name, *(result.figures.get(f"{name}.{key}") for key in keys)] for name in names]
        result.tables.append(Table("First wrong steps", heads, table))
        result.notes.append(
            f"{len(solutions)} solutions, one a problem; the threshold is set on {self.threshold_fraction:.0%} of the "
            "problems, everything is measured on the others. Intervals: bootstrap over problems for F1 and AUC, "
            "Wilson's for accuracies."
        )
        return result

    def _prompt(self, problem: str) -> Any:
        from rlhf_kit.data.messages import prompt_messages

        text = self.prompt_template.replace("{prompt}", problem) if self.prompt_template else problem
        return prompt_messages(text, self.system) if self.chat else text

    def _known(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Solution], dict[str, Any]]:
        """The first completion of each prompt as a solution, through its first wrong step, and the prompts."""
        from rlhf_kit.data.messages import completion_text
        from rlhf_kit.evals.context import prompt_key
        from rlhf_kit.evals.steps import Solution, step_labels

        assert self.truth is not None
        found: dict[str, Solution] = {}
        prompts: dict[str, Any] = {}
        for row in rows:
            key, text = prompt_key(row["prompt"]), completion_text(row["completion"])
            labels = step_labels(text, row[self.truth.column], self.truth.separator)
            if key in found or not labels:
                continue
            wrong = next((place for place, (_, _, right) in enumerate(labels) if not right), -1)
            found[key] = Solution(key, tuple(text[start:end] for start, end, _ in labels), wrong)
            prompts[key] = row["prompt"]
        return list(found.values())[: self.limit], prompts

    def _add(self, result: Result, name: str, solutions: Sequence[Solution], sums: Sequence[Sequence[float]]) -> None:
        from rlhf_kit.evals.steps import (
            accuracy_interval,
            bootstrap_interval,
            first_below,
            first_error_report,
            step_auc,
            threshold_split,
        )

        if not solutions:
            raise ValueError(f"source '{name}' could judge no solution")
        report = first_error_report(solutions, sums, self.threshold_fraction)
        fitted = threshold_split([solution.problem for solution in solutions], self.threshold_fraction)
        judged = [(s.label, own) for s, own, fit in zip(solutions, sums, fitted, strict=True) if not fit]
        hits = [(label, first_below(own, report.threshold) == label) for label, own in judged]
        low, high = report.interval or (None, None)
        result.figures[f"{name}.f1"] = Estimate(report.result.f1, low, high, report.count)
        for what, wanted in (("erroneous", True), ("correct", False)):
            own = [hit for label, hit in hits if (label >= 0) == wanted]
            result.figures[f"{name}.{what}"] = Estimate(sum(own) / len(own), *accuracy_interval(own), len(own))
        if report.step_auc is not None:

            def resampled(at: Any) -> float | None:
                return step_auc([judged[place][1] for place in at], [judged[place][0] for place in at])

            low, high = bootstrap_interval(resampled, len(judged), 200) or (None, None)
            result.figures[f"{name}.step_auc"] = Estimate(report.step_auc, low, high, report.count)
        result.figures[f"{name}.threshold"] = Estimate(report.threshold, None, None, len(solutions) - report.count)


def step_scores(scored: Scored, source: str, row: int, steps: Sequence[str], separator: str) -> list[float] | None:
    """Summed token reward of each step of a row; a separator belongs to the step that it ends.

    None where the source has no judgement, or the text that the tokens give back does not hold the steps as they are.
    """
    ranges = step_ranges(scored.texts[row], steps, separator)
    return None if ranges is None else scored.step_sums(source, row, ranges)


def step_ranges(text: str, steps: Sequence[str], separator: str) -> list[CharRange] | None:
    """Ranges that cover `text`, each through the end of a step and of its separator; None where it is another text."""
    whole = separator.join(steps)
    start = text.find(whole.strip())
    if start < 0:
        return None
    place = start - (len(whole) - len(whole.lstrip()))
    ends = []
    for step in steps[:-1]:
        place += len(step) + len(separator)
        ends.append(max(place, 0))
    ends.append(len(text))
    return list(zip([0, *ends], ends, strict=False))
