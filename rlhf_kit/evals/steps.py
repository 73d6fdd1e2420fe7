"""How well step scores find wrong steps: labels against known steps, AUC, and first-error F1 on ProcessBench.

A step score is high where the step looks right. All functions are pure; models are scored elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

StepScores = Sequence[Sequence[float]]
Interval = tuple[float, float]

NORMAL_975 = 1.959963984540054


def step_labels(completion: str, gold_steps: Sequence[str], separator: str) -> list[tuple[int, int, bool]]:
    """The steps of `completion` as `(start, end, right)`, through the first wrong one.

    The text is cut at `separator`; the characters `[start, end)` hold a step without its separator and the
    whitespace around it, and empty steps are passed over. The k-th step is right while it equals the k-th of
    `gold_steps`; a step beyond the last of those is wrong.

    Raises:
        ValueError: the separator is empty.
    """
    labels: list[tuple[int, int, bool]] = []
    position = 0
    for piece in completion.split(separator):
        step = piece.strip()
        start = position + len(piece) - len(piece.lstrip())
        position += len(piece) + len(separator)
        if not step:
            continue
        right = len(labels) < len(gold_steps) and step == gold_steps[len(labels)].strip()
        labels.append((start, start + len(step), right))
        if not right:
            break
    return labels


def auc(positives: Sequence[float], negatives: Sequence[float]) -> float | None:
    """Probability that a positive outscores a negative, ties counted half; None where either is missing.

    `mean_{p, n} ( 1[p > n] + 0.5 * 1[p = n] )`, the Mann-Whitney statistic over the number of pairs.
    """
    if not len(positives) or not len(negatives):
        return None
    ranked = np.sort(np.asarray(negatives, dtype=np.float64))
    scores = np.asarray(positives, dtype=np.float64)
    below = np.searchsorted(ranked, scores, side="left")
    not_above = np.searchsorted(ranked, scores, side="right")
    return float((below + not_above).mean() / 2 / len(ranked))


def accuracy_interval(correct: Sequence[float]) -> Interval:
    """The 95 % interval of a share of successes (Wilson, *Probable Inference*, 1927); a success is 1, half of one 0.5.

    With n trials, share p and z = 1.96: `( p + z^2/2n +- z*sqrt(p(1-p)/n + z^2/4n^2) ) / (1 + z^2/n)`.

    Raises:
        ValueError: there are no trials.
    """
    count = len(correct)
    if count == 0:
        raise ValueError("an accuracy of no trials has no interval")
    share = sum(correct) / count
    square = NORMAL_975**2
    middle = share + square / (2 * count)
    spread = NORMAL_975 * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    scale = 1 + square / count
    return max((middle - spread) / scale, 0.0), min((middle + spread) / scale, 1.0)


@dataclass(frozen=True)
class Solution:
    """A solution in steps; `label` is the first wrong step, from 0, or -1 where none is wrong."""

    problem: str
    steps: tuple[str, ...]
    label: int


def load_processbench(path: str | Path, limit: int | None = None) -> list[Solution]:
    """The rows of a ProcessBench file (arXiv 2412.06559), one solution a problem, at most `limit`.

    Solutions of one problem are not independent, so of several the one with the least hash stays; `limit`
    keeps the problems with the least hashes. Neither depends on the order of the file.

    Raises:
        ValueError: the file is no JSON list, or a row lacks a field or has an impossible label.
    """
    rows = json.loads(Path(path).read_text("utf-8"))
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: a ProcessBench file is a list of rows, and this is {type(rows).__name__}")
    chosen: dict[str, Solution] = {}
    for number, row in enumerate(rows, start=1):
        solution = _solution(row, f"{path}, row {number}")
        known = chosen.get(solution.problem)
        if known is None or _hash(*solution.steps) < _hash(*known.steps):
            chosen[solution.problem] = solution
    return sorted(chosen.values(), key=lambda solution: _hash(solution.problem))[:limit]


def _solution(row: Mapping[str, Any], where: str) -> Solution:
    missing = [name for name in ("problem", "steps", "label") if row.get(name) is None]
    if missing:
        raise ValueError(f"{where}: there is no {' and no '.join(missing)}")
    steps, label = tuple(row["steps"]), row["label"]
    if not -1 <= label < len(steps):
        raise ValueError(f"{where}: label {label} is no step of {len(steps)} and not -1 (no wrong step)")
    return Solution(row["problem"], steps, label)


def _hash(*texts: str) -> bytes:
    return hashlib.sha256("\0".join(texts).encode()).digest()


@dataclass(frozen=True)
class FirstErrorF1:
    """Share of erroneous solutions whose first wrong step was found, of right ones passed, and their F1."""

    error_accuracy: float
    correct_accuracy: float

    @property
    def f1(self) -> float:
        """The harmonic mean of the two; 0 where both are 0."""
        total = self.error_accuracy + self.correct_accuracy
        return 2 * self.error_accuracy * self.correct_accuracy / total if total else 0.0


def first_error_f1(predicted: Sequence[int], labels: Sequence[int]) -> FirstErrorF1 | None:
    """ProcessBench's metric (arXiv 2412.06559) of predicted first wrong steps, -1 meaning none.

    None where no solution is erroneous, or none is right.
    """
    hits = np.asarray(predicted) == np.asarray(labels)
    wrong = np.asarray(labels) >= 0
    if wrong.all() or not wrong.any():
        return None
    return FirstErrorF1(float(hits[wrong].mean()), float(hits[~wrong].mean()))


def first_below(scores: Sequence[float], threshold: float) -> int:
    """The first step that scores below `threshold`, from 0, or -1."""
    return next((step for step, score in enumerate(scores) if score < threshold), -1)


def best_threshold(step_scores: StepScores, labels: Sequence[int]) -> float:
    """The threshold with the highest first-error F1: between two neighbouring scores, or beyond them all.

    Raises:
        ValueError: there are not both erroneous and right solutions to choose on.
    """
    if first_error_f1([-1] * len(labels), labels) is None:
        raise ValueError(
            f"a threshold needs both erroneous and right solutions, and {len(labels)} have "
            f"{sum(label >= 0 for label in labels)} erroneous ones: use more solutions"
        )
    levels = np.unique([score for scores in step_scores for score in scores])
    candidates = [levels[0] - 1, *((levels[:-1] + levels[1:]) / 2), levels[-1] + 1]
    values: list[float] = []
    for candidate in candidates:
        result = first_error_f1([first_below(scores, candidate) for scores in step_scores], labels)
        assert result is not None
        values.append(result.f1)
    return float(candidates[int(np.argmax(values))])


def step_auc(step_scores: StepScores, labels: Sequence[int]) -> float | None:
    """AUC of right steps against first wrong ones; the steps behind a wrong one are left out."""
    right: list[float] = []
    wrong: list[float] = []
    for scores, label in zip(step_scores, labels, strict=True):
        right += scores if label < 0 else scores[:label]
        wrong += [] if label < 0 else [scores[label]]
    return auc(right, wrong)


def threshold_split(problems: Sequence[str], fraction: float) -> list[bool]:
    """True for the `fraction` of the problems, chosen by hash, on which the threshold is set."""
    ordered = sorted(set(problems), key=_hash)
    chosen = set(ordered[: round(fraction * len(ordered))])
    return [problem in chosen for problem in problems]


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float | None], count: int, resamples: int = 1000, seed: int = 0
) -> Interval | None:
    """The 95 % percentile interval of `statistic(indices)` over resampled sets of `count` indices.

    Resamples for which it is undefined (None) are left out; None where all are.
    """
    generator = np.random.default_rng(seed)
    draws = (statistic(generator.integers(count, size=count)) for _ in range(resamples))
    values = [value for value in draws if value is not None]
    if not values:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class FirstErrorReport:
    """First-error detection on problems that the threshold was not set on.

    Attributes:
        threshold: a step that scores below it is called wrong.
        result: both accuracies and their F1.
        interval: 95 % interval of the F1, over problems.
        step_auc: of right steps against first wrong ones, on the same problems.
        count: solutions evaluated.
    """

    threshold: float
    result: FirstErrorF1
    interval: Interval | None
    step_auc: float | None
    count: int


def first_error_report(
    solutions: Sequence[Solution],
    step_scores: StepScores,
    threshold_fraction: float = 0.5,
    resamples: int = 1000,
    seed: int = 0,
) -> FirstErrorReport:
    """Sets the threshold on a `threshold_fraction` of the problems and evaluates it on the others.

    Raises:
        ValueError: scores and steps differ in number or are not finite, or one part of the split lacks
            erroneous or right solutions.
    """
    for number, (solution, scores) in enumerate(zip(solutions, step_scores, strict=True), start=1):
        if len(scores) != len(solution.steps) or not np.isfinite(scores).all():
            raise ValueError(
                f"solution {number} has {len(solution.steps)} steps, whose scores are {list(scores)}: "
                "each step needs one finite score"
            )
    for_threshold = threshold_split([solution.problem for solution in solutions], threshold_fraction)
    scored = list(zip(solutions, step_scores, for_threshold, strict=True))
    fitted = [(solution.label, scores) for solution, scores, fit in scored if fit]
    held_out = [(solution.label, scores) for solution, scores, fit in scored if not fit]
    threshold = best_threshold([scores for _, scores in fitted], [label for label, _ in fitted])
    labels = np.array([label for label, _ in held_out])
    predicted = np.array([first_below(scores, threshold) for _, scores in held_out])
    result = first_error_f1(predicted.tolist(), labels.tolist())
    if result is None:
        raise ValueError(f"the {len(labels)} held-out solutions are all erroneous or all right: use more")

    def resampled(indices: np.ndarray) -> float | None:
        drawn = first_error_f1(predicted[indices].tolist(), labels[indices].tolist())
        return None if drawn is None else drawn.f1

    interval = bootstrap_interval(resampled, len(labels), resamples, seed)
    discrimination = step_auc([scores for _, scores in held_out], labels.tolist())
    return FirstErrorReport(threshold, result, interval, discrimination, len(labels))


def baseline_scores(solutions: Sequence[Solution], seed: int = 0) -> dict[str, list[list[float]]]:
    """Step scores that need no model, for `first_error_report`.

    `chance` draws them at random; `length` calls long steps wrong; `position` calls late steps wrong.
    """
    generator = np.random.default_rng(seed)
    return {
        "chance": [generator.random(len(solution.steps)).tolist() for solution in solutions],
        "length": [[-float(len(step)) for step in solution.steps] for solution in solutions],
        "position": [[-float(step) for step in range(len(solution.steps))] for solution in solutions],
    }
