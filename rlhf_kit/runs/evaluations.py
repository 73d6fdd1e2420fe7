"""Evaluations of a stage in the report: their tables, with intervals, and their plots."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_kit.errors import RunError
from rlhf_kit.runs.curves import HEIGHT, WIDTH, ticks
from rlhf_kit.runs.formatting import format_number

EVALS_FOLDER = "evals"
COLOURS = 6


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """What `eval` has written into a stage's folder, the first done first.

    Raises:
        RunError: a file is damaged.
    """
    found = []
    for path in sorted((Path(folder) / EVALS_FOLDER).glob("*.json"), key=lambda path: (path.stat().st_mtime, path)):
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise RunError(f"{path} is damaged ({error}); delete it to go on without it") from error
        if isinstance(content, dict):
            found.append(content)
    return found


def evaluation_view(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the template shows of an evaluation; its plots are called `name` and a number."""
    plots = [plot for plot in content.get("plots", ()) if any(line["points"] for line in plot["lines"])]
    return {
        "name": content.get("name", ""),
        "type": content.get("type", ""),
        "notes": content.get("notes", []),
        "tables": [
            {
                "title": table["title"],
                "columns": table["columns"],
                "rows": [[_cell(cell) for cell in row] for row in table["rows"]],
            }
            for table in content.get("tables", ())
        ],
        "plots": [{**plot_drawing(plot), "id": f"{name}-{number}"} for number, plot in enumerate(plots)],
    }


def shown(cell: Any) -> str:
    """A cell as one piece of text."""
    text, interval = _cell(cell).values()
    return f"{text} ({interval})" if interval else text


def _cell(cell: Any) -> dict[str, str]:
    if isinstance(cell, Mapping):
        low, high = cell.get("low"), cell.get("high")
        interval = "" if low is None or high is None else f"{_number(low)} to {_number(high)}"
        return {"text": _number(cell.get("value")), "interval": interval}
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        return {"text": format_number(cell), "interval": ""}
    return {"text": "–" if cell is None else str(cell), "interval": ""}


def _number(value: float | None) -> str:
    return format_number(None if value is None else round(value, 4), digits=3)


def plot_drawing(plot: Mapping[str, Any]) -> dict[str, Any]:
    """What the template draws of a plot whose x axis is any number: as `curves.drawing` does for steps."""
    lines = [(line["label"], _points(line["points"])) for line in plot["lines"]]
    lines = [(label, points) for label, points in lines if points]
    xs = [x for _, points in lines for x, _, _, _ in points]
    ys = [value for _, points in lines for _, *values in points for value in values if value is not None]
    (left, right), (low, high) = _range(xs), _range(ys)
    if plot.get("diagonal"):
        (left, right), (low, high) = (0.0, 1.0), (0.0, 1.0)

    def at(x: float, y: float) -> str:
        return f"{WIDTH * (x - left) / (right - left):.1f} {HEIGHT * (high - y) / (high - low):.1f}"

    drawn = []
    for number, (label, points) in enumerate(lines):
        middle = [at(x, y) for x, y, _, _ in points]
        inside = [(x, lower, upper) for x, _, lower, upper in points if lower is not None and upper is not None]
        upper = [at(x, edge) for x, _, edge in inside]
        lower = [at(x, edge) for x, edge, _ in reversed(inside)]
        drawn.append(
            {
                "label": label,
                "metric": label,
                "colour": number % COLOURS,
                "final": _number(points[-1][1]),
                "path": "M" + "L".join(middle),
                "smooth": None,
                "dots": "".join(f"M{place}h0" for place in middle),
                "band": f"M{'L'.join(upper + lower)}Z" if len(inside) > 1 else None,
            }
        )
    return {
        "group": f"against: {plot['x']}",
        "title": plot["title"],
        "curves": drawn,
        "y_ticks": [(100 * (high - tick) / (high - low), format_number(tick)) for tick in ticks(low, high)],
        "x_ticks": [(100 * (tick - left) / (right - left), format_number(tick)) for tick in ticks(left, right)],
        "baseline": None,
        "diagonal": bool(plot.get("diagonal")),
    }


def _points(points: Sequence[Any]) -> list[tuple[float, float, float | None, float | None]]:
    """x, y and the interval of y, in order of x; a point without a number is left out."""
    found = [
        (float(x), float(estimate["value"]), estimate.get("low"), estimate.get("high"))
        for x, estimate in points
        if x is not None and estimate["value"] is not None
    ]
    return sorted(found, key=lambda point: point[0])


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The values with some air around them."""
    low, high = min(values), max(values)
    air = 0.06 * (high - low) if not math.isclose(low, high) else (abs(high) * 0.1 or 1.0)
    return low - air, high + air
