"""What choosing among n completions gives: by each source, by votes, and by an oracle."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rlhf_kit.data.config import DataConfig, Sampled
from rlhf_kit.evals.base import Columns, EvaluationConfig, is_sampled
from rlhf_kit.evals.config import VERIFIER_COLUMN
from rlhf_kit.evals.result import Estimate, Line, Plot, Result, Table
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.text import pattern_problems

if TYPE_CHECKING:
    import numpy as np

    from rlhf_kit.evals.context import EvalContext
    from rlhf_kit.evals.stage import Eval


class BestOfN(EvaluationConfig):
    """Accuracy of best-of-n for n = 1, 2, 4, ..., K on rows `prompt, completion`, K of each prompt.

    What is right is told by the rows' `label` or by a `verifier`. For each n the expectation is over all subsets of n
    of the K completions. Each source chooses by its summed reward, a process source also by its least step reward
    (steps end where `step_pattern` matches). Votes are for the final answer: the last match of `answer_pattern` (its
    first group, if it has one), or else what the completion marks as its answer, or its last word. A weighted vote adds
    up the rewards, or their sigmoids, of the completions with one answer. Prompts with fewer than `num_completions` (by
    default the largest number that a prompt has) are left out. Without `rewards` there are votes alone, and no model is
    needed.
    """

    type: Literal["best_of_n"]
    data: DataConfig
    verifier: Literal["exact", "math", "reasoning_gym", "marketplace"] | None = None
    num_completions: int | None = Field(default=None, ge=2)
    step_pattern: str = r"\n"
    answer_pattern: str | None = None

    @property
    def may_ask_sources(self) -> bool:
        return True

    def data_sets(self) -> Iterator[tuple[str, DataConfig, Columns]]:
        names = ("completion", VERIFIER_COLUMN[self.verifier]) if self.verifier else ("completion", "label")
        yield "data", self.data, dict.fromkeys((() if is_sampled(self.data) else names), self.type)

    def problems(self, stage: Eval) -> Iterator[Problem]:
        for field in ("step_pattern", "answer_pattern"):
            pattern = getattr(self, field)
            found = pattern_problems(pattern) if pattern is not None else ()
            yield from (Problem(field, p.message, p.value, p.remedy) for p in found)
        if isinstance(self.data, Sampled) and self.data.num_generations < (self.num_completions or 2):
            what = f"is less than the {self.num_completions or 2} completions that best_of_n chooses among"
            yield Problem("data.num_generations", what, self.data.num_generations, "sample more")

    def rows_problem(self, rows: Sequence[Mapping[str, Any]]) -> str | None:
        largest = max(Counter(_key(row) for row in rows).values(), default=0)
        if largest >= (self.num_completions or 2):
            return None
        return (
            f"best_of_n chooses among several completions of a prompt, and no prompt has {self.num_completions or 2} "
            f"(the most is {largest}): write one row a completion, or lower num_completions"
        )

    def run(self, context: EvalContext) -> Result:
        """Score all completions, then choose.

        Raises:
            ValueError: no prompt has several completions, or the verifier or a source can judge none of them.
        """
        import numpy as np

        from rlhf_kit.data.messages import completion_text

        rows = context.load(self.data)
        problem = self.rows_problem(rows)
        if problem is not None:
            raise ValueError(f"data: {problem}")
        places = self._groups(rows)
        size, left_out = len(places[0]), len({_key(row) for row in rows}) - len(places)
        texts = [completion_text(row["completion"]) for row in rows]
        labels = np.array(
            [self._label(number, row, text) for number, (row, text) in enumerate(zip(rows, texts, strict=True), 1)]
        )
        answers = [final_answer(text, self.answer_pattern) for text in texts]
        scores = self._scores(context, rows)
        result = Result()
        curves = selection_curves(labels, answers, scores, places)
        _report(result, curves, size)
        if scores:
            result.plots.append(_over_optimisation(labels, scores, places))
        result.notes.append(
            f"{len(places)} prompts, {size} completions each; every figure is an expectation over subsets of them; "
            "intervals: bootstrap over prompts."
        )
        if left_out:
            result.notes.append(f"{left_out} prompts have fewer completions and are left out.")
        for name, own in scores.items():
            missing = int(np.isnan(own).sum())
            if missing:
                result.notes.append(f"{name}: {missing} completions have no score; they are chosen last.")
        return result

    def _groups(self, rows: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
        from rlhf_kit.evals.resampling import groups_of

        groups = groups_of([_key(row) for row in rows])
        size = self.num_completions or max(len(group) for group in groups)
        return [group[:size] for group in groups if len(group) >= size]

    def _label(self, number: int, row: Mapping[str, Any], text: str) -> float:
        from rlhf_kit.data.verifiers import verify

        if self.verifier is None:
            return float(row["label"])
        score = verify(self.verifier, text, row)
        if score is None:
            raise ValueError(
                f"data, row {number}: verifier {self.verifier!r} cannot judge it, having only the columns "
                f"{', '.join(row)}"
            )
        return score

    def _scores(self, context: EvalContext, rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        """Scores (N,) by way of choosing: each source's sum, and a process source's least step."""
        import numpy as np

        if not context.stage.rewards:
            return {}
        scored = context.score(rows)
        found: dict[str, Any] = {}
        for name, source in scored.sources.items():
            if np.isnan(source.totals).all():
                raise ValueError(f"source '{name}' could judge no completion")
            found[name] = source.totals
            if source.kind == "process":
                found[f"{name}, least step"] = scored.least_step(name, self.step_pattern)
        return found


def final_answer(text: str, pattern: str | None) -> str:
    """A completion's final answer in one form: equal numbers are equal text."""
    from rlhf_kit.data.verifiers import marked_answer

    found: str | None
    if pattern is not None:
        matches = list(re.finditer(pattern, text))
        found = matches[-1][1 if matches[-1].re.groups else 0] if matches else ""
    else:
        found = marked_answer(text)
        if found is None:
            found = (text.split() or [""])[-1]
    found = (found or "").replace("$", "").strip().removesuffix(".").strip()
    try:
        return f"{Decimal(found.replace(',', '')).normalize():f}"
    except InvalidOperation:
        return found


Curves = dict[str, dict[int, "np.ndarray"]]


def selection_curves(
    labels: np.ndarray, answers: Sequence[str], scores: Mapping[str, np.ndarray], places: Sequence[np.ndarray]
) -> Curves:
    """By way of choosing and by n, the expected label for each prompt (`places` are its completions)."""
    import numpy as np

    from rlhf_kit.evals.selection import any_right, best_of, sizes, subsets, vote

    count = len(places[0])
    curves: dict[str, dict[int, list[float]]] = {}
    for size in sizes(count):
        chosen = subsets(count, size)
        for group in places:
            own, said = labels[group], [answers[place] for place in group]
            values = {"any right (oracle)": any_right(own, size), "majority vote": vote(said, own, chosen)}
            for name, score in scores.items():
                values[f"best by {name}"] = best_of(score[group], own, size)
                if "," not in name:
                    values[f"vote weighted by {name}"] = vote(said, own, chosen, score[group])
                    weights = np.exp(-np.logaddexp(0.0, -score[group]))
                    values[f"vote weighted by sigmoid of {name}"] = vote(said, own, chosen, weights)
            for name, value in values.items():
                curves.setdefault(name, {}).setdefault(size, []).append(value)
    return {name: {size: np.array(values) for size, values in curve.items()} for name, curve in curves.items()}


def _report(result: Result, curves: Curves, count: int) -> None:
    """Figures, table and plot of the curves, and what each gains over one completion."""
    from rlhf_kit.evals.resampling import mean_estimate

    rows: list[list[Any]] = []
    lines = []
    for name, curve in curves.items():
        found: dict[int, Estimate] = {}
        for size, values in curve.items():
            estimated = mean_estimate(values)
            assert estimated is not None
            found[size] = estimated
            result.figures[f"{name}.{size}"] = estimated
        gain = mean_estimate(curve[count] - curve[1])
        assert gain is not None
        result.figures[f"{name}.gain"] = gain
        rows.append([name, *found.values(), gain])
        lines.append(Line(name, [(float(size), value) for size, value in found.items()]))
    heads = ["", *(f"n = {size}" for size in next(iter(curves.values()))), f"gain of {count}"]
    result.tables.append(Table("Accuracy of the chosen completion", heads, rows))
    result.plots.append(Plot("Accuracy of the chosen completion", "completions", lines))


def _over_optimisation(labels: np.ndarray, scores: Mapping[str, np.ndarray], places: Sequence[np.ndarray]) -> Plot:
    """What is right, and the score that it was chosen by, against how far best-of-n moves from the policy.

    Gao et al. (arXiv 2210.10760): the distance is the root of the KL divergence. Scores are in standard deviations from
    their mean; a completion without one has the mean.
    """
    from math import sqrt

    import numpy as np

    from rlhf_kit.evals.resampling import mean_estimate
    from rlhf_kit.evals.selection import best_of, best_of_n_kl, sizes

    lines = []
    for name, own in scores.items():
        proxy = np.nan_to_num((own - np.nanmean(own)) / (np.nanstd(own) or 1.0))
        for label, values in ((f"right, by {name}", labels), (f"score of {name}", proxy)):
            points = []
            for size in sizes(len(places[0])):
                found = mean_estimate([best_of(own[group], values[group], size) for group in places])
                assert found is not None
                points.append((sqrt(best_of_n_kl(size)), found))
            lines.append(Line(label, points))
    return Plot("Score and accuracy against the distance of best-of-n", "square root of the KL divergence", lines)


def _key(row: Mapping[str, Any]) -> str:
    from rlhf_kit.evals.context import prompt_key

    return prompt_key(row["prompt"])
