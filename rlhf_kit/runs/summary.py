"""The key numbers of a run: a few large ones, and a table with a column for each stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rlhf_kit.runs.curves import Point, collect, source_names
from rlhf_kit.runs.formatting import format_duration, format_number, format_percent


class HasRows(Protocol):
    """A stage with the lines of its metrics file."""

    @property
    def rows(self) -> list[dict[str, Any]]: ...


def values(points: Sequence[Point]) -> list[float]:
    """The finite values of a series."""
    return [value for _, value in points if value is not None]


def tail_mean(points: Sequence[Point]) -> float:
    """Mean of the last tenth of a series: one batch says little about where a noisy curve ended."""
    finite = values(points)
    tail = finite[-max(1, len(finite) // 10) :]
    return sum(tail) / len(tail)


def elapsed(rows: Sequence[dict[str, Any]]) -> float | None:
    """Seconds between the first and the last line of a metrics file."""
    times = [row["time"] for row in rows if isinstance(row.get("time"), int | float)]
    return max(times) - min(times) if len(times) > 1 else None


def stage_numbers(rows: Sequence[dict[str, Any]], sources: Sequence[str]) -> dict[str, str]:
    """The key numbers of a stage, by what they are; empty where the stage does not have one."""
    points = collect(rows)
    numbers: dict[str, str] = {}

    def add(name: str, metric: str, show: Callable[[Sequence[Point]], str]) -> None:
        numbers[name] = show(points[metric]) if metric in points else ""

    add("Accuracy, held-out", "eval_accuracy", _from_to)
    add("Preference accuracy, held-out", "eval_preference_accuracy", _from_to)
    add("Preference accuracy of length alone", "eval_length_only_accuracy", lambda s: format_percent(values(s)[-1]))
    add("Accuracy, training", "accuracy", lambda series: format_percent(tail_mean(series)))
    add("Token accuracy, held-out", "eval_mean_token_accuracy", _from_to)
    add("Token accuracy, training", "mean_token_accuracy", lambda series: format_percent(tail_mean(series)))
    add("AUC, held-out", "eval_outcome_auc", lambda series: f"{values(series)[-1]:.3f}")
    add("Span F1 of characters, held-out", "eval_char_f1", lambda series: f"{values(series)[-1]:.3f}")
    add("Reward, all sources", "reward", _tail)
    for source in sources:
        add(f"Reward, {source}", f"rewards/{source}/mean", _tail)
    for source in sources:
        add(
            f"Step AUC of {source}, mean",
            f"prm/{source}/step_auc",
            lambda s: f"{sum(values(s)) / len(values(s)):.3f}",
        )
        add(f"Step AUC of {source}, lowest", f"prm/{source}/step_auc", lambda s: f"{min(values(s)):.3f}")
    add("KL from the reference", "kl", _tail)
    add("Entropy", "entropy", _tail)
    add("Loss", "loss", _tail)
    add("Skipped steps", "skipped_steps", lambda series: format_number(max(values(series))))
    steps = [row["step"] for row in rows if isinstance(row.get("step"), int)]
    numbers["Updates"] = format_number(max(steps)) if steps else ""
    seconds = elapsed(rows)
    numbers["Time"] = "" if seconds is None else format_duration(seconds)
    return numbers


def _from_to(series: Sequence[Point]) -> str:
    finite = values(series)
    end = format_percent(finite[-1])
    return f"{format_percent(finite[0])} → {end}" if len(finite) > 1 else end


def _tail(series: Sequence[Point]) -> str:
    return format_number(tail_mean(series), digits=3)


def summary_rows(stages: Sequence[HasRows]) -> list[tuple[str, list[str]]]:
    """Rows of the summary table: what, and its value in each stage; only rows that some stage fills."""
    sources = source_names(metric for stage in stages for metric in collect(stage.rows))
    numbers = [stage_numbers(stage.rows, sources) for stage in stages]
    rows = [(name, [stage[name] for stage in numbers]) for name in (numbers[0] if numbers else ())]
    return [(name, cells) for name, cells in rows if any(cells)]


def headline(stages: Sequence[HasRows]) -> list[tuple[str, str, str]]:
    """Up to four large numbers of the last stage with a reward or an accuracy: label, value, and a remark."""
    shown: list[tuple[str, str, str]] = []
    all_points = [collect(stage.rows) for stage in stages]
    points = next((p for p in reversed(all_points) if {"eval_accuracy", "accuracy", "reward"} & p.keys()), None)
    if points is None:
        return shown
    for metric, label in (("eval_accuracy", "held-out accuracy"), ("accuracy", "training accuracy")):
        if metric in points:
            finite = values(points[metric])
            end = finite[-1] if metric == "eval_accuracy" else tail_mean(points[metric])
            remark = f"from {format_percent(finite[0])}" if len(finite) > 1 else ""
            shown.append((label, format_percent(end), remark))
    for source in source_names(points):
        metric = f"prm/{source}/step_auc"
        if metric in points:
            finite = values(points[metric])
            remark = f"{source}, lowest {min(finite):.3f}"
            shown.append(("mean step AUC", f"{sum(finite) / len(finite):.3f}", remark))
    if "kl" in points:
        shown.append(("KL from the reference", _tail(points["kl"]), "nats"))
    if "reward" in points:
        start = format_number(values(points["reward"])[0], digits=3)
        shown.append(("mean reward", _tail(points["reward"]), f"from {start}"))
    return shown[:4]
