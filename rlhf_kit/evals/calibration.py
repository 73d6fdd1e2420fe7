"""Whether a source's probability of success is the share of successes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from rlhf_kit.data.config import DataConfig
from rlhf_kit.evals.base import Columns, EvaluationConfig, is_sampled
from rlhf_kit.evals.result import Line, Plot, Result, Table
from rlhf_kit.problems import Problem, listed

if TYPE_CHECKING:
    import numpy as np

    from rlhf_kit.evals.context import EvalContext
    from rlhf_kit.evals.stage import Eval


class Calibration(EvaluationConfig):
    """ECE, Brier score and a reliability table of sources on rows `prompt, completion, label`.

    A completion's summed reward is the logit of its success (`scores: logit`, as an implicit PRM's is) or a
    probability. `offset: base_rate` adds the log-odds of the share of successes in the data to the logit, which a
    PRM trained with an offset needs; a number is added as it is. ECE is given with `bins` bins of equal mass and of
    equal width. `sources` are the sources to look at; without them all. A label is right from 0.5 on. Every interval is
    bootstrapped over prompts, that of a bin's share over the prompts that it holds rows of.
    """

    type: Literal["calibration"]
    data: DataConfig
    scores: Literal["logit", "probability"] = "logit"
    offset: Literal["none", "base_rate"] | float = "none"
    bins: PositiveInt = 10
    sources: tuple[str, ...] = ()

    @property
    def asks_sources(self) -> bool:
        return True

    def data_sets(self) -> Iterator[tuple[str, DataConfig, Columns]]:
        names = () if is_sampled(self.data) else ("completion", "label")
        yield "data", self.data, dict.fromkeys(names, self.type)

    def problems(self, stage: Eval) -> Iterator[Problem]:
        known = [source.source_name for source in stage.rewards]
        for index, name in enumerate(self.sources):
            if name not in known:
                yield Problem(f"sources.{index}", "there is no such source", name, f"the sources are {listed(known)}")
        if self.scores == "probability" and self.offset != "none":
            yield Problem("offset", "is added to a logit, and the scores are probabilities", self.offset, "write none")

    def run(self, context: EvalContext) -> Result:
        """Score every row, and compare with its label.

        Raises:
            ValueError: a source's scores are no probabilities.
        """
        import numpy as np

        from rlhf_kit.evals.context import prompt_key

        rows = context.load(self.data)
        labels = np.array([float(row["label"]) >= 0.5 for row in rows], dtype=np.float64)
        keys = [prompt_key(row["prompt"]) for row in rows]
        configs = [s for s in context.stage.rewards if not self.sources or s.source_name in self.sources]
        scored = context.scorer_of(configs)(rows, context.progress("scoring"))
        result = Result()
        table: list[list[Any]] = []
        for config in configs:
            name = config.source_name
            totals = scored.sources[name].totals
            kept = np.flatnonzero(np.isfinite(totals))
            if not len(kept):
                raise ValueError(f"source '{name}' could judge no row of data")
            if len(kept) < len(rows):
                result.notes.append(f"{name}: {len(rows) - len(kept)} of {len(rows)} rows could not be judged.")
            given = self._probabilities(name, totals[kept], labels)
            table.append(self._of_source(result, name, given, labels[kept], [keys[place] for place in kept]))
        columns = ["", "ECE, equal mass", "ECE, equal width", "Brier", "Brier of the base rate", "log loss", "mean"]
        result.tables.insert(0, Table("Calibration", columns, table))
        result.notes += [
            f"{len(rows)} rows, {labels.mean():.1%} right; intervals: bootstrap over prompts. ECE is biased upwards "
            f"where bins hold few rows, and so is its interval. A bin of one prompt has no interval, and one "
            "that is all right or all wrong has one without width.",
        ]
        if self.offset == "base_rate":
            result.notes.append("The log-odds of the base rate of these rows are added to the logits.")
        return result

    def _probabilities(self, name: str, totals: np.ndarray, labels: np.ndarray) -> np.ndarray:
        import numpy as np

        if self.scores == "probability":
            if totals.min() < 0 or totals.max() > 1:
                raise ValueError(
                    f"source '{name}' gives scores from {totals.min():g} to {totals.max():g}, which are no "
                    "probabilities: write scores: logit"
                )
            return totals
        rate = float(np.clip(labels.mean(), 1e-3, 1 - 1e-3))
        given = {"none": 0.0, "base_rate": float(np.log(rate / (1 - rate)))}
        offset = given[self.offset] if isinstance(self.offset, str) else self.offset
        return np.exp(-np.logaddexp(0.0, -(totals + offset)))  # never overflows

    def _of_source(
        self, result: Result, name: str, probabilities: np.ndarray, labels: np.ndarray, keys: list[str]
    ) -> list[Any]:
        """The figures, the reliability table and the plot of one source; gives its line of the first table."""
        import numpy as np

        from rlhf_kit.evals.reliability import bin_places, brier, calibration_error, log_loss, reliability
        from rlhf_kit.evals.resampling import estimate, groups_of, mean_estimate

        groups = groups_of(keys)
        rate = float(labels.mean())
        statistics = {
            "ece_mass": lambda at: calibration_error(probabilities[at], labels[at], self.bins, "mass"),
            "ece_width": lambda at: calibration_error(probabilities[at], labels[at], self.bins, "width"),
            "brier": lambda at: brier(probabilities[at], labels[at]),
            "brier_base_rate": lambda at: brier(labels[at] * 0 + labels[at].mean(), labels[at]),
            "log_loss": lambda at: log_loss(probabilities[at], labels[at]),
        }
        line: list[Any] = [name]
        for what, statistic in statistics.items():
            found = estimate(statistic, groups)
            assert found is not None
            result.figures[f"{name}.{what}"] = found
            line.append(found)
        mean = mean_estimate(probabilities, keys)
        assert mean is not None
        result.figures[f"{name}.mean_probability"] = mean
        rows, points = [], []
        places = bin_places(probabilities, self.bins, "mass")
        bins = zip(np.unique(places), reliability(probabilities, labels, self.bins, "mass"), strict=True)
        for place, bin_ in bins:
            inside = np.flatnonzero(places == place)
            share = mean_estimate(labels[inside], [keys[row] for row in inside])
            assert share is not None
            rows.append([f"{bin_.low:.3f} to {bin_.high:.3f}", bin_.count, bin_.confidence, share])
            points.append((bin_.confidence, share))
        heads = ["probability", "rows", "mean probability", "share right"]
        result.tables.append(Table(f"Reliability of {name}, {self.bins} bins of equal mass", heads, rows))
        title = f"Reliability of {name} (base rate {rate:.3f})"
        result.plots.append(Plot(title, "probability", [Line("share right", points)], diagonal=True))
        return [*line, mean]
