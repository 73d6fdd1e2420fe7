"""From the lines of a metrics file to a report's panels: which curves stand together, and their geometry."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_kit.runs.formatting import format_number

MAX_POINTS = 500
SMOOTH_FROM = 60  # shorter series are drawn as they are, with their points
WIDTH, HEIGHT = 1000.0, 300.0

Point = tuple[int, float | None]  # step, and the value, None where it was not finite


@dataclass(frozen=True)
class PanelKind:
    """Metrics that are drawn together.

    Attributes:
        group: small heading above the title.
        title: what the panel shows; `*` stands for the source's name.
        labels: by metric, its label; `*` in a metric matches a source's name, which is then the label.
        each_source: one panel for each source instead of one for all: their scales differ.
        baseline: a value to compare with, drawn dashed.
        floor: values below are cut off, so that a bad start does not flatten the rest.
        noisy: whether a smoothed curve says more than the values; of a schedule or counter it would be false.
    """

    group: str
    title: str
    labels: Mapping[str, str]
    each_source: bool = False
    baseline: float | None = None
    floor: float = -math.inf
    noisy: bool = True


KINDS = (
    PanelKind("Outcome", "Accuracy", {"accuracy": "training", "eval_accuracy": "held-out"}),
    PanelKind(
        "Outcome",
        "Preference accuracy",
        {"rewards/accuracies": "training", "eval_preference_accuracy": "held-out"},
        baseline=0.5,
    ),
    PanelKind(
        "Outcome",
        "Token accuracy",
        {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "held-out"},
    ),
    PanelKind("Outcome", "AUC", {"eval_outcome_auc": "held-out"}, baseline=0.5),
    PanelKind("Reward", "All sources, weighted", {"reward": "mean"}),
    PanelKind("Reward", "*", {"rewards/*/mean": ""}, each_source=True),
    PanelKind("Credit", "Share of each source in the advantage", {"credit/share/*": ""}, floor=0.0),
    PanelKind("Credit", "Spread of the advantage", {"credit/advantage_std": "standard deviation"}),
    PanelKind("Policy", "KL from the reference", {"kl": "nats"}),
    PanelKind("Policy", "Entropy", {"entropy": "nats per token"}),
    PanelKind("Policy", "Completion length", {"completions/mean_length": "tokens"}),
    PanelKind("Policy", "Cut off at the length limit", {"completions/clipped_ratio": "share"}),
    PanelKind(
        "Value",
        "Explained variance",
        {"value/explained_variance": "of the returns"},
        baseline=0.0,
        floor=-1.0,
    ),
    PanelKind("Value", "Value loss", {"value/loss": "loss"}),
    PanelKind("Process reward model", "Step AUC", {"prm/*/step_auc": ""}, baseline=0.5),
    PanelKind("Process reward model", "Outcome AUC", {"prm/*/outcome_auc": ""}, baseline=0.5),
    PanelKind("Process reward model", "Loss", {"prm/*/loss": ""}),
    PanelKind("Optimisation", "Loss", {"loss": "training", "eval_loss": "held-out"}),
    PanelKind("Optimisation", "Gradient norm", {"grad_norm": "norm"}),
    PanelKind("Optimisation", "Learning rate", {"learning_rate": "rate"}, noisy=False),
    PanelKind("Optimisation", "Skipped steps", {"skipped_steps": "steps"}, noisy=False),
)
_NOT_CURVES = {"step", "time", "epoch"}


@dataclass(frozen=True)
class Series:
    """One metric over steps: `colour` is an index of the palette, `spread` the standard deviation by step."""

    metric: str
    label: str
    points: list[Point]
    colour: int = 0
    spread: Mapping[int, float] | None = None


@dataclass(frozen=True)
class Panel:
    """Curves on common axes."""

    group: str
    title: str
    series: list[Series]
    baseline: float | None = None
    floor: float = -math.inf
    noisy: bool = True


def build_panels(rows: Iterable[Mapping[str, Any]]) -> tuple[list[Panel], list[Panel]]:
    """The panels of the known metrics that have data, and one panel for each of the other metrics."""
    points = collect(rows)
    sources = source_names(points)
    known, used = [], set()
    for kind in KINDS:
        found = _matching(kind, points, sources)
        used.update(series.metric for series in found)
        if not found:
            continue
        shared = (kind.baseline, kind.floor, kind.noisy)
        if kind.each_source:
            known += [Panel(kind.group, series.label, [series], *shared) for series in found]
        else:
            known.append(Panel(kind.group, kind.title, found, *shared))
    used.update(f"rewards/{source}/std" for source in sources)
    other = [
        Panel("", metric, [Series(metric, "", series)], noisy=False)
        for metric, series in sorted(points.items())
        if metric not in used and len(series) > 1
    ]
    return known, other


def collect(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Points by metric, in order of steps; a step's last line counts, a metric without values is left out."""
    found: dict[str, dict[int, float | None]] = {}
    for row in rows:
        step = row.get("step")
        if not isinstance(step, int):
            continue
        for metric, value in row.items():
            if metric in _NOT_CURVES or isinstance(value, bool):
                continue
            if value is None:
                found.setdefault(metric, {})[step] = None
            elif isinstance(value, int | float):
                found.setdefault(metric, {})[step] = float(value) if math.isfinite(value) else None
    return {
        metric: sorted(values.items())
        for metric, values in found.items()
        if any(value is not None for value in values.values())
    }


def source_names(metrics: Iterable[str]) -> list[str]:
    """Names of the reward sources, in the order in which their metrics appear."""
    names = [match[1] for metric in metrics if (match := re.fullmatch(r"(?:rewards|prm)/([^/]+)/\w+", metric))]
    return list(dict.fromkeys(names))


def _matching(kind: PanelKind, points: Mapping[str, list[Point]], sources: Sequence[str]) -> list[Series]:
    found = []
    for pattern, label in kind.labels.items():
        if "*" not in pattern and pattern in points:
            found.append(Series(pattern, label, points[pattern], colour=list(kind.labels).index(pattern)))
        for index, source in enumerate(sources if "*" in pattern else ()):
            metric = pattern.replace("*", source)
            if metric in points:
                spread = points.get(f"rewards/{source}/std") if kind.each_source else None
                known = {step: value for step, value in spread or () if value is not None}
                found.append(Series(metric, source, points[metric], colour=index, spread=known or None))
    return found


def downsample(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: both ends, and the lowest and highest of equal stretches: no spike is lost."""
    if len(points) <= limit:
        return list(points)
    stretches = limit // 2 - 1
    inner = points[1:-1]
    kept = [points[0]]
    for stretch in range(stretches):
        part = inner[stretch * len(inner) // stretches : (stretch + 1) * len(inner) // stretches]
        finite = [(value, step) for step, value in part if value is not None]
        if finite:
            kept += sorted((step, value) for value, step in {min(finite), max(finite)})
        elif part:
            kept.append(part[0])
    return [*kept, points[-1]]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential averages run forwards and backwards over about a thirtieth of the series: no lag.

    Each counts by the weight of what it has seen, so that the ends are as smooth as the middle.
    """
    span = max(3.0, len(points) / 30)
    forwards, backwards = _average(points, span), _average(points[::-1], span)[::-1]
    return [
        (step, None if value is None else (before + after) / (weight_before + weight_after))
        for (step, value), (before, weight_before), (after, weight_after) in zip(
            points, forwards, backwards, strict=True
        )
    ]


def _average(points: Sequence[Point], span: float) -> list[tuple[float, float]]:
    average, weight, averages = 0.0, 0.0, []
    for _, value in points:
        if value is not None:
            average += (value - average) / span
            weight += (1 - weight) / span
        averages.append((average, weight))
    return averages


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that lie within [low, high]."""
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    unit = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9)
    return [number * unit for number in range(first, last + 1)]


def value_range(panel: Panel) -> tuple[float, float]:
    """The values that the panel's axis spans: the data, its spread and its baseline, with some air."""
    values = [value for series in panel.series for _, value in series.points if value is not None]
    for series in panel.series:
        for step, value in series.points:
            if value is not None and series.spread and step in series.spread:
                values += [value - series.spread[step], value + series.spread[step]]
    if panel.baseline is not None:
        values.append(panel.baseline)
    low, high = max(panel.floor, min(values)), max(panel.floor, max(values))
    if high - low < 1e-12 * max(1.0, abs(high)) or high == low:
        air = abs(high) * 0.1 or 1.0
    else:
        air = 0.06 * (high - low)
    bounded_below = low >= 0 and low - air < 0  # an axis of counts, shares or losses does not go below 0
    return (0.0 if bounded_below else low - air), high + air


def drawing(panel: Panel, steps: tuple[int, int]) -> dict[str, Any]:
    """What the template draws: paths in a box of WIDTH x HEIGHT, and labels at percentages of it."""
    low, high = value_range(panel)
    first, last = steps if steps[1] > steps[0] else (steps[0] - 1, steps[1] + 1)

    def x(step: float) -> float:
        return WIDTH * (step - first) / (last - first)

    def y(value: float) -> float:
        return HEIGHT * (high - value) / (high - low)

    y_ticks = ticks(low, high)
    if all(value is None or value == int(value) for series in panel.series for _, value in series.points):
        y_ticks = [tick for tick in y_ticks if tick == int(tick)]  # half a step was never skipped
    curves = []
    for series in panel.series:
        points = downsample(series.points)
        final = next(value for _, value in reversed(series.points) if value is not None)
        few = len(series.points) < SMOOTH_FROM
        smoothed = downsample(smooth(series.points)) if panel.noisy and not few else None
        curves.append(
            {
                "label": f"{series.label} ± std" if series.spread else series.label,
                "metric": series.metric,
                "colour": series.colour % 6,
                "points": points,
                "final": format_number(final),
                "path": _path(points, x, y),
                "smooth": _path(smoothed, x, y) if smoothed else None,
                "dots": _dots(points, x, y) if few else None,
                "band": _band(points, series.spread, x, y),
            }
        )
    return {
        "group": panel.group,
        "title": panel.title,
        "curves": curves,
        "steps": (first, last),
        "values": (low, high),
        "y_ticks": [(100 * y(tick) / HEIGHT, format_number(tick)) for tick in y_ticks],
        "x_ticks": [(100 * x(tick) / WIDTH, format_number(tick)) for tick in ticks(first, last) if tick == int(tick)],
        "baseline": None if panel.baseline is None else y(panel.baseline),
    }


def _path(points: Sequence[Point], x: Any, y: Any) -> str:
    parts, pen_up = [], True
    for step, value in points:
        if value is not None:
            parts.append(f"{'M' if pen_up else 'L'}{x(step):.1f} {y(value):.1f}")
        pen_up = value is None
    return "".join(parts)


def _dots(points: Sequence[Point], x: Any, y: Any) -> str:
    # A line of no length with round ends stays round however the box is stretched.
    return "".join(f"M{x(step):.1f} {y(value):.1f}h0" for step, value in points if value is not None)


def _band(points: Sequence[Point], spread: Mapping[int, float] | None, x: Any, y: Any) -> str | None:
    ranges = [(step, value, spread[step]) for step, value in points if spread and value is not None and step in spread]
    if len(ranges) < 2:
        return None
    upper = [f"{x(step):.1f} {y(value + width):.1f}" for step, value, width in ranges]
    lower = [f"{x(step):.1f} {y(value - width):.1f}" for step, value, width in reversed(ranges)]
    return f"M{'L'.join(upper + lower)}Z"
