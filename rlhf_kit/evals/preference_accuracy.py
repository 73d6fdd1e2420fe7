"""How often a source scores the preferred one of two completions higher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlhf_kit.data.config import DataConfig
from rlhf_kit.evals.base import Columns, EvaluationConfig, is_sampled
from rlhf_kit.evals.result import Estimate, Result, Table

if TYPE_CHECKING:
    from rlhf_kit.evals.context import EvalContext

LENGTH = "length only"


class PreferenceAccuracy(EvaluationConfig):
    """Accuracy of every source on rows `prompt, chosen, rejected` (RewardBench, arXiv 2403.13787), by `subset`.

    With `pairs: labelled` the rows are `prompt, completion, label`, and every right completion of a prompt is compared
    with every wrong one of it. A pair that a source scores equally counts half; a pair with a completion that it could
    not judge is left out. Beside the sources stands the rule to prefer the longer completion, counted in tokens.
    """

    type: Literal["preference_accuracy"]
    data: DataConfig
    pairs: Literal["given", "labelled"] = "given"
    subset: str = "subset"

    @property
    def asks_sources(self) -> bool:
        return True

    def data_sets(self) -> Iterator[tuple[str, DataConfig, Columns]]:
        names = ("chosen", "rejected") if self.pairs == "given" else ("completion", "label")
        yield "data", self.data, dict.fromkeys((() if is_sampled(self.data) else names), self.type)

    def run(self, context: EvalContext) -> Result:
        """Score both completions of every pair."""
        import numpy as np

        from rlhf_kit.evals.context import prompt_key

        rows = context.load(self.data)
        completions, pairs = _paired(rows, self.subset) if self.pairs == "given" else _labelled(rows, self.subset)
        if not pairs:
            raise ValueError("data: no prompt has both a right and a wrong completion, so there is nothing to compare")
        scored = context.score(completions)
        totals = {name: scores.totals for name, scores in scored.sources.items()}
        totals[LENGTH] = np.array(scored.lengths, dtype=np.float64)
        keys = [prompt_key(completions[pair.chosen]["prompt"]) for pair in pairs]
        result = Result()
        for name, own in totals.items():
            _of_source(result, name, [verdict(own[p.chosen], own[p.rejected]) for p in pairs], pairs, keys)
        _against_length(result, totals, pairs, keys)
        result.tables += _tables(result, list(totals), pairs)
        result.notes.append(f"{len(pairs)} pairs of {len(set(keys))} prompts; intervals: bootstrap over prompts.")
        if LENGTH in totals and all(p.subset == "" for p in pairs):
            result.notes.append("The rows have no subsets.")
        return result


@dataclass(frozen=True)
class Pair:
    """Places of two completions, and the pair's subset ("" without one)."""

    chosen: int
    rejected: int
    subset: str


def verdict(chosen: float, rejected: float) -> float:
    """1 where the chosen completion scores higher, 1/2 where they are equal, 0 otherwise; NaN where one is missing."""
    if chosen != chosen or rejected != rejected:
        return float("nan")
    return 0.5 if chosen == rejected else float(chosen > rejected)


def _paired(rows: Sequence[dict[str, Any]], subset: str) -> tuple[list[dict[str, Any]], list[Pair]]:
    """The completions of rows of two, and where each pair's are."""
    completions, pairs = [], []
    own = {side: f"{side}_ids" for side in ("chosen", "rejected")}  # the tokens that were sampled, where rows have them
    for row in rows:
        rest = {name: value for name, value in row.items() if name not in own and name not in own.values()}
        completions += [
            {**rest, "completion": row[side], **({"completion_ids": row[ids]} if ids in row else {})}
            for side, ids in own.items()
        ]
        pairs.append(Pair(len(completions) - 2, len(completions) - 1, str(row.get(subset) or "")))
    return completions, pairs


def _labelled(rows: Sequence[dict[str, Any]], subset: str) -> tuple[list[dict[str, Any]], list[Pair]]:
    from rlhf_kit.evals.context import prompt_key

    by_prompt: dict[str, tuple[list[int], list[int]]] = {}
    for place, row in enumerate(rows):
        by_prompt.setdefault(prompt_key(row["prompt"]), ([], []))[float(row["label"]) < 0.5].append(place)
    pairs = [
        Pair(chosen, rejected, str(rows[chosen].get(subset) or ""))
        for right, wrong in by_prompt.values()
        for chosen in right
        for rejected in wrong
    ]
    return list(rows), pairs


def _of_source(
    result: Result, name: str, verdicts: Sequence[float], pairs: Sequence[Pair], keys: Sequence[str]
) -> None:
    """The figures of one source: over all pairs, by subset, and by which completion is longer."""
    from rlhf_kit.evals.resampling import mean_estimate

    parts = {"": list(range(len(pairs)))}
    for place, pair in enumerate(pairs):
        if pair.subset:
            parts.setdefault(pair.subset, []).append(place)
    for subset, places in parts.items():
        found = mean_estimate([verdicts[place] for place in places], [keys[place] for place in places])
        if found is not None:
            result.figures[f"{name}.accuracy" + (f".{subset}" if subset else "")] = found
    ties = [float("nan") if value != value else float(value == 0.5) for value in verdicts]
    shares = {"ties": ties, "left_out": [float(value != value) for value in verdicts]}
    for what, values in shares.items():
        found = mean_estimate(values, keys)
        if found is not None:
            result.figures[f"{name}.{what}"] = found


def _against_length(result: Result, totals: Mapping[str, Any], pairs: Sequence[Pair], keys: Sequence[str]) -> None:
    """Each source's accuracy less that of the longer one, on the same pairs; and where the shorter one is preferred."""
    from rlhf_kit.evals.resampling import mean_estimate

    lengths = totals[LENGTH]
    for name, own in totals.items():
        if name == LENGTH:
            continue
        verdicts = [verdict(own[p.chosen], own[p.rejected]) for p in pairs]
        longer = [verdict(lengths[p.chosen], lengths[p.rejected]) for p in pairs]
        parts = {
            "minus_length": [ours - theirs for ours, theirs in zip(verdicts, longer, strict=True)],
            "longer_preferred": [v if w == 1.0 else float("nan") for v, w in zip(verdicts, longer, strict=True)],
            "shorter_preferred": [v if w == 0.0 else float("nan") for v, w in zip(verdicts, longer, strict=True)],
        }
        for what, values in parts.items():
            found = mean_estimate(values, keys)
            if found is not None:
                result.figures[f"{name}.{what}"] = found


def _tables(result: Result, names: Sequence[str], pairs: Sequence[Pair]) -> list[Table]:
    subsets = list(dict.fromkeys(pair.subset for pair in pairs if pair.subset))
    figures: dict[str, Estimate] = result.figures
    columns = ["accuracy", "ties", "left_out", "minus_length", "longer_preferred", "shorter_preferred"]
    rows = [[name, *(figures.get(f"{name}.{column}") for column in columns)] for name in names]
    heads = ["", "accuracy", "ties", "left out", "less length only", "the longer preferred", "the shorter preferred"]
    tables = [Table("Accuracy on pairs", heads, rows)]
    if subsets:
        rows = [[name, *(figures.get(f"{name}.accuracy.{subset}") for subset in subsets)] for name in names]
        tables.append(Table("Accuracy by subset", ["", *subsets], rows))
    return tables
