"""What an evaluation gives back: figures with intervals, tables and plots, the same for all, as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval.

    Attributes:
        value: the figure.
        low, high: the interval; None where the data do not give one.
        count: how many independent units (prompts, rows) it rests on.
    """

    value: float
    low: float | None
    high: float | None
    count: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


Cell = str | int | float | Estimate | None


@dataclass(frozen=True)
class Table:
    """A table of the report."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Line:
    """A curve of a plot: where x is, the estimate of y."""

    label: str
    points: Sequence[tuple[float, Estimate]]


@dataclass(frozen=True)
class Plot:
    """Curves on common axes; with `diagonal` the line y = x is drawn beside them."""

    title: str
    x: str
    lines: Sequence[Line]
    diagonal: bool = False


@dataclass
class Result:
    """Everything that an evaluation found.

    Attributes:
        figures: by name, in dotted words (`prm.best_of.4`); they are the evaluation's part of `result.json`.
        tables, plots: for the report.
        notes: what a reader must know: rows left out, bins, what an interval is over.
    """

    figures: dict[str, Estimate] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not finite is null."""
        return plain(asdict(self))


def plain(value: Any) -> Any:
    """`value` for strict JSON."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
