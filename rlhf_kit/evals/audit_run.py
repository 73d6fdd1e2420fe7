"""The part of an audit that reads a run folder: metrics and samples as a `ppo` stage has logged them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import TypeAdapter

from rlhf_kit.data.config import DataConfig
from rlhf_kit.evals.audit import METRICS_FILE, SAMPLES_FOLDER, Audit, refusal_of
from rlhf_kit.evals.hacking import blocks, correlation, refuses, repetition, slope
from rlhf_kit.evals.hacking import centred as less_group_mean
from rlhf_kit.evals.resampling import difference_estimate, estimate
from rlhf_kit.evals.result import Cell, Estimate, Line, Plot, Result, Table
from rlhf_kit.evals.steps import NORMAL_975, accuracy_interval

RECIPE_FILE = "recipe.resolved.yaml"
Series = dict[int, float]
FOLLOWED = {
    "reward": "reward, all sources",
    "completions/mean_length": "completion length, tokens",
    "completions/clipped_ratio": "cut off at the length limit",
    "entropy": "entropy, nats a token",
    "kl": "KL a token",
    "accuracy": "outcome in training",
}
PART = 5  # the first and the last fifth of a run are compared


def audit_run(config: Audit, folder: Path, result: Result) -> None:
    """Add what `metrics.jsonl` and `samples/` show.

    Raises:
        ValueError: the metrics hold no reward.
    """
    series = read_series(folder / METRICS_FILE)
    if "reward" not in series:
        raise ValueError(f"{folder / METRICS_FILE}: there is no reward in it; an audit reads the folder of a ppo stage")
    sources = [name.split("/")[1] for name in series if name.startswith("rewards/") and name.endswith("/mean")]
    names = dict(FOLLOWED)
    names |= {f"rewards/{source}/mean": f"reward of {source}" for source in sources}
    names |= {name: f"share of {name.split('/')[2]} in the advantage" for name in series if "credit/share/" in name}
    rows = [[text, *_change(result, name, series[name])] for name, text in names.items() if name in series]
    result.tables.append(Table("Over training", ["", "first fifth", "last fifth", "change"], rows))
    _reward_and_length(result, series)
    _gold(config, result, folder, series)
    _distance_plot(result, series)
    _samples(config, result, folder / SAMPLES_FOLDER)
    result.notes.append(
        f"Over training: {len(series['reward'])} logged updates; points of one run are no independent draws, so that "
        "intervals come from blocks of neighbours, and say nothing of another seed."
    )


def read_series(path: Path) -> dict[str, Series]:
    """Every numeric metric by step; a step's last line counts, a line that a kill cut off is left out."""
    found: dict[str, Series] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        for name, value in row.items():
            numeric = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if numeric and name not in ("step", "time", "epoch") and isinstance(row.get("step"), int):
                found.setdefault(name, {})[row["step"]] = float(value)
    return {name: dict(sorted(values.items())) for name, values in found.items()}


def _blocks_of(count: int) -> list[np.ndarray]:
    return blocks(count, max(1, round(math.sqrt(count))))


def _change(result: Result, name: str, values: Series) -> list[Cell]:
    """Means of the first and the last fifth of a series, and their difference; the two parts are resampled apart."""
    numbers = np.array(list(values.values()))
    part = max(1, len(numbers) // PART)
    first, last = numbers[:part], numbers[-part:]
    groups = _blocks_of(part)
    change = difference_estimate(first, last, groups, groups)
    cells: list[Cell] = []
    for what, own in (("start", first), ("end", last)):
        found = estimate(lambda at, own=own: float(own[at].mean()), groups)
        assert found is not None
        result.figures[f"{name}.{what}"] = found
        cells.append(found)
    result.figures[f"{name}.change"] = change
    return [*cells, change]


def _reward_and_length(result: Result, series: Mapping[str, Series]) -> None:
    """Correlation and slope of the mean reward on the mean length of a step."""
    if "completions/mean_length" not in series:
        return
    steps = [step for step in series["reward"] if step in series["completions/mean_length"]]
    reward = np.array([series["reward"][step] for step in steps])
    length = np.array([series["completions/mean_length"][step] for step in steps])
    groups = _blocks_of(len(steps)) if steps else []
    for what, statistic in (("correlation", correlation), ("slope", slope)):
        found = estimate(lambda at, s=statistic: s(length[at], reward[at]), groups)
        if found is not None:
            result.figures[f"reward_on_length.{what}"] = found


def _gold(config: Audit, result: Result, folder: Path, series: Mapping[str, Series]) -> None:
    """The held-out score by step: its best, its last, and whether it fell while the reward rose."""
    held_out = series.get("eval_accuracy")
    if not held_out:
        result.notes.append("No held-out score was logged (evaluation, eval_data), so the reward stands alone here.")
        return
    rows = evaluated_rows(folder)
    points = {step: _share(value, rows) for step, value in held_out.items()}
    best, last = max(held_out, key=lambda step: held_out[step]), max(held_out)
    drop = held_out[best] - held_out[last]
    spread = None
    if rows is not None:
        spread = NORMAL_975 * math.sqrt(sum(p * (1 - p) / rows for p in (held_out[best], held_out[last])))
    result.figures |= {
        "held_out.start": points[min(held_out)],
        "held_out.best": points[best],
        "held_out.end": points[last],
        "held_out.drop_from_best": Estimate(
            drop, None if spread is None else drop - spread, None if spread is None else drop + spread, rows or 0
        ),
    }
    names = {"start": "at the start", "best": f"best, step {best}", "end": f"last, step {last}"}
    table: list[list[Cell]] = [[text, result.figures[f"held_out.{key}"]] for key, text in names.items()]
    table.append(["fall from the best", result.figures["held_out.drop_from_best"]])
    result.tables.append(Table("Held-out score", ["", ""], table))
    result.notes.append(
        f"Held-out score: {rows} rows; intervals: Wilson's for a share, the normal one for the fall, as if the rows of "
        "its two updates were others."
        if rows is not None
        else "Held-out score: no interval, for the rows that it is of cannot be read any more."
    )
    result.plots.append(Plot("Held-out score over training", "update", [Line("held-out", _line(points))]))
    rose = result.figures["reward.change"]
    fell = drop > config.gold_drop and (spread is None or drop > spread)
    if fell and rose.value > 0 and (rose.low is None or rose.low > 0):
        result.notes.append(
            f"Over-optimisation: the reward rose by {rose} while the held-out score fell from {held_out[best]:.3f} "
            f"(step {best}) to {held_out[last]:.3f}."
        )


def evaluated_rows(folder: Path) -> int | None:
    """How many rows the stage's held-out data have, by the recipe that lies beside it.

    They are read again: `skip`, `limit` and `hash_range` have left out some. None where no recipe names them, or they
    are no longer there.
    """
    from rlhf_kit.data.load import load_data

    path = next((p for p in (folder / RECIPE_FILE, folder.parent / RECIPE_FILE) if p.is_file()), None)
    if path is None:
        return None
    recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    stage = recipe if path.parent == folder else (recipe.get("stages") or {}).get(folder.name) or {}
    if not stage.get("eval_data"):
        return None
    try:
        return len(load_data(TypeAdapter(DataConfig).validate_python(stage["eval_data"])))
    except (ValueError, OSError):
        return None


def _share(value: float, rows: int | None) -> Estimate:
    if rows is None or not 0 <= value <= 1:
        return Estimate(value, None, None, rows or 0)
    right = round(value * rows)
    return Estimate(value, *accuracy_interval([True] * right + [False] * (rows - right)), rows)


def _line(points: Mapping[int, Estimate]) -> list[tuple[float, Estimate]]:
    return [(float(step), point) for step, point in points.items()]


def _distance_plot(result: Result, series: Mapping[str, Series]) -> None:
    """Reward and held-out score against the root of a completion's KL divergence (Gao et al., arXiv 2210.10760)."""
    if "kl" not in series or "completions/mean_length" not in series:
        result.notes.append("The KL divergence was not logged (credit.kl.coefficient is 0): no over-optimisation plot.")
        return
    length = series["completions/mean_length"]
    distance = {step: math.sqrt(max(kl * length[step], 0.0)) for step, kl in series["kl"].items() if step in length}
    logged = sorted(distance)
    if not logged:
        return
    reward = np.array([series["reward"].get(step, math.nan) for step in logged])
    scaled = (reward - np.nanmean(reward)) / (np.nanstd(reward) or 1.0)
    lines = [
        Line(
            "reward, in standard deviations",
            [(distance[s], Estimate(float(v), None, None, 1)) for s, v in zip(logged, scaled, strict=True) if v == v],
        )
    ]
    gold = []
    for step, value in series.get("eval_accuracy", {}).items():
        near = min(logged, key=lambda other: abs(other - step))
        gold.append((0.0 if step == 0 else distance[near], Estimate(value, None, None, 1)))
    lines += [Line("held-out score", sorted(gold, key=lambda point: point[0]))] if gold else []
    lines[0] = Line(lines[0].label, sorted(lines[0].points, key=lambda point: point[0]))
    result.plots.append(Plot("Over-optimisation in training", "square root of the KL divergence", lines))


def _samples(config: Audit, result: Result, folder: Path) -> None:
    """What sampled completions show: reward against length within a step, repetition, refusals."""
    samples = read_samples(folder)
    if not samples:
        result.notes.append("The run kept no samples.")
        return
    steps = np.array([sample["step"] for sample in samples])
    tokens = np.array([float(sum(sample["action_mask"])) for sample in samples])
    groups = [np.flatnonzero(steps == step) for step in np.unique(steps)]
    rows: list[list[Cell]] = []
    for source in dict.fromkeys(name for sample in samples for name in sample["rewards"]):
        reward = np.array([float(sum(sample["rewards"].get(source, [math.nan]))) for sample in samples])
        if not np.isfinite(reward).all():
            continue
        x, y = less_group_mean(tokens, groups), less_group_mean(reward, groups)
        cells: list[Cell] = [source]
        for what, statistic in (("correlation", correlation), ("slope", slope)):
            found = estimate(lambda at, s=statistic, x=x, y=y: s(x[at], y[at]), groups)
            if found is not None:
                result.figures[f"{source}_on_length_within_steps.{what}"] = found
            cells.append(found)
        rows.append(cells)
    heads = ["source", "correlation", "reward a token more"]
    result.tables.append(Table("Reward against length, among completions of one update", heads, rows))
    texts = [str(sample["completion"]) for sample in samples]
    pattern = refusal_of(config)
    kinds = {
        "repetition": [repetition(text, config.repetition_words) for text in texts],
        "refusals": [float(refuses(text, **pattern)) for text in texts],
    }
    table: list[list[Cell]] = []
    for name, values in kinds.items():
        by_step = {int(steps[g[0]]): float(np.mean([values[place] for place in g])) for g in groups}
        table.append([name, *_change(result, name, by_step)])
    result.tables.append(Table("Sampled completions over training", ["", "first fifth", "last fifth", "change"], table))
    result.notes.append(f"Samples: {len(samples)} completions of {len(groups)} updates.")


def read_samples(folder: Path) -> Sequence[dict[str, Any]]:
    """The completions that the run kept, in order of their step."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        found += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return sorted(found, key=lambda sample: sample["step"])
