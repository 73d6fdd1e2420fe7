"""The report of a run: one HTML file that opens offline, made from the run folder alone."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from rlhf_kit.data.files import SUPERSEDED
from rlhf_kit.errors import RunError
from rlhf_kit.redact import redact
from rlhf_kit.runs import curves, heatmap
from rlhf_kit.runs.evaluations import EVALS_FOLDER, evaluation_view, read_evaluations
from rlhf_kit.runs.formatting import format_duration, format_number, format_time, parse_time
from rlhf_kit.runs.metrics import METRICS_FILE, SAMPLES_FOLDER, read_metrics, read_samples
from rlhf_kit.runs.summary import headline, summary_rows

REPORT_FILE = "report.html"
RECIPE_FILE = "recipe.resolved.yaml"
MANIFEST_FILE = "manifest.json"
RESULT_FILE = "result.json"
STEPS = ("pairs", "preference", "evaluation")  # of a round of a bootstrap, in order
ROUND_STEP = re.compile(r"\bround-(\d+) (\w+)$")

MAX_SAMPLED_STEPS = 40
MAX_SAMPLED_TOKENS = 60_000
MAX_SAMPLES_A_STEP = 8
STILL_RUNNING_SECONDS = 600


@dataclass(frozen=True)
class Stage:
    """What the folder of one stage holds."""

    name: str
    type: str | None
    rows: list[dict[str, Any]]
    samples: dict[int, list[dict[str, Any]]]
    result: dict[str, Any] | None
    evaluations: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """What a run folder holds; every part may be missing, as after a kill in the first seconds."""

    name: str
    manifest: dict[str, Any]
    recipe_text: str
    stages: list[Stage]


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into `run_folder` and return its path.

    Raises:
        RunError: `run_folder` is not a run folder, or a file in it is damaged.
    """
    content = render_report(run_folder)
    path = Path(run_folder) / REPORT_FILE
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode("utf-8", errors="replace"))
    partial.replace(path)
    return path


def render_report(run_folder: Path) -> str:
    """The report as text; it asks for nothing outside itself, and runs no script but its own.

    Raises:
        RunError: `run_folder` is not a run folder, or a file in it is damaged.
    """
    run = read_run(run_folder)
    here = Path(__file__).parent
    script = (here / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    stages = [_stage_view(number, stage) for number, stage in enumerate(run.stages)]
    return environment.get_template("report_template.html").render(
        name=run.name,
        status=_status(run),
        facts=_facts(run),
        headline=headline(run.stages),
        summary=summary_rows(run.stages),
        stages=stages,
        curve_data={panel["id"]: panel["data"] for stage in stages for panel in stage["all_panels"]},
        heatmap_style=Markup(heatmap.STYLE),
        recipe=_highlight(redact(run.recipe_text)),
        versions=sorted((run.manifest.get("versions") or {}).items()),
        provenance=_provenance(run.manifest),
        style=Markup((here / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_digest=digest,
        written=format_time(time.time()),
    )


def read_run(run_folder: Path) -> Run:
    """Read a run folder.

    Raises:
        RunError: the folder is missing or holds nothing of a run, or a file in it is damaged.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder; give the folder of a run")
    recipe_path = folder / RECIPE_FILE
    recipe_text = recipe_path.read_text(encoding="utf-8", errors="replace") if recipe_path.exists() else ""
    types = _stage_types(recipe_path, recipe_text)
    stages = [_read_stage(path, path.name, types) for path in sorted(folder.iterdir()) if _is_stage(path)]
    steps = (path for pattern in ("round-*/*", "*/round-*/*") for path in folder.glob(pattern))  # of a bootstrap
    stages += [_read_stage(path, " ".join(path.relative_to(folder).parts), types) for path in steps if _is_stage(path)]
    if _is_stage(folder):
        only = next(iter(types), folder.name)
        stages.insert(0, _read_stage(folder, only, types))
    if not stages and not recipe_path.exists() and not (folder / MANIFEST_FILE).exists():
        raise RunError(
            f"{folder} is not a run folder: it has no {RECIPE_FILE}, {MANIFEST_FILE} or {METRICS_FILE}; "
            "give the folder that `train` made"
        )
    stages.sort(key=lambda stage: _place(stage, list(types)))
    return Run(folder.resolve().name, _read_json(folder / MANIFEST_FILE) or {}, recipe_text, stages)


def _place(stage: Stage, order: Sequence[str]) -> tuple[int, int, int, float]:
    """Stages stand in the recipe's order, others behind them as they began; a bootstrap before its rounds' steps."""
    name, *_ = stage.name.split(" ")
    match = ROUND_STEP.search(stage.name)
    number, step = (int(match[1]), STEPS.index(match[2])) if match and match[2] in STEPS else (-1, -1)
    owner = order.index(name) if name in order else 0 if match and len(order) == 1 else len(order)
    return owner, number, step, _began(stage)


def _is_stage(folder: Path) -> bool:
    return (
        SUPERSEDED not in folder.name
        and folder.is_dir()
        and any((folder / name).exists() for name in (METRICS_FILE, SAMPLES_FOLDER, RESULT_FILE, EVALS_FOLDER))
    )


def _read_stage(folder: Path, name: str, types: Mapping[str, Any]) -> Stage:
    recipe = types.get(name) or {}
    separator = (recipe.get("step_truth") or {}).get("separator")
    samples = read_samples(folder)
    if separator:
        samples = {step: [{"step_separator": separator, **sample} for sample in rows] for step, rows in samples.items()}
    result = _read_json(folder / RESULT_FILE)
    return Stage(name, recipe.get("type"), read_metrics(folder), samples, result, read_evaluations(folder))


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); delete it to go on without it") from error
    return content if isinstance(content, dict) else None


def _stage_types(path: Path, text: str) -> dict[str, dict[str, Any]]:
    """By name of a stage, its part of the recipe; a recipe of a single stage is named by its type."""
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RunError(f"{path} is damaged ({' '.join(str(error).split())}); delete it to go on without it") from error
    if not isinstance(recipe, dict):
        return {}
    stages = recipe.get("stages", recipe.get("pipeline"))
    if isinstance(stages, dict):
        return {str(name): part for name, part in stages.items() if isinstance(part, dict)}
    if isinstance(stages, list):
        parts = [part for part in stages if isinstance(part, dict)]
        return {str(part.get("name") or part.get("type")): part for part in parts}
    return {str(recipe["type"]): recipe} if "type" in recipe else {}


def _times(stage: Stage) -> list[float]:
    return [row["time"] for row in stage.rows if isinstance(row.get("time"), int | float)]


def _began(stage: Stage) -> float:
    return min(_times(stage), default=float("inf"))


def _status(run: Run) -> str:
    if parse_time(run.manifest.get("finished")) is not None:
        return "finished"
    if parse_time(run.manifest.get("interrupted")) is not None:
        return "interrupted"
    newest = max((moment for stage in run.stages for moment in _times(stage)), default=0.0)
    return "running" if time.time() - newest < STILL_RUNNING_SECONDS else "interrupted"


def _facts(run: Run) -> list[str]:
    """The line below the title: when, how long, which stages."""
    times = [moment for stage in run.stages for moment in _times(stage)]
    created = parse_time(run.manifest.get("created")) or min(times, default=None)
    ended = parse_time(run.manifest.get("finished")) or max(times, default=None)
    facts = [format_time(created)] if created else []
    if created and ended and ended > created:
        facts.append(format_duration(ended - created))
    if run.stages:
        facts.append(" → ".join(stage.name for stage in run.stages))
    return facts


def _stage_view(number: int, stage: Stage) -> dict[str, Any]:
    """What the template shows of a stage: drawn panels and the heat maps of its sampled steps."""
    known, other = curves.build_panels(stage.rows)
    steps = [row["step"] for row in stage.rows if isinstance(row.get("step"), int)]
    bounds = (min(steps), max(steps)) if steps else (0, 1)

    def draw(panels: Sequence[curves.Panel], kind: str) -> list[dict[str, Any]]:
        drawn = []
        for index, panel in enumerate(panels):
            view = curves.drawing(panel, bounds)
            view["id"] = f"s{number}{kind}{index}"
            view["data"] = {
                "x": view["steps"],
                "y": view["values"],
                "series": [c["points"] for c in view["curves"]],
            }
            drawn.append(view)
        return drawn

    panels, other_panels = draw(known, "p"), draw(other, "o")
    chosen = _choose_steps(stage.samples)
    return {
        "number": number,
        "name": stage.name,
        "type": stage.type,
        "updates": max(steps, default=0),
        "panels": panels,
        "other_panels": other_panels,
        "all_panels": panels + other_panels,
        "heatmaps": [
            (step, Markup(heatmap.heatmap_cards(stage.samples[step][:MAX_SAMPLES_A_STEP]))) for step in chosen
        ],
        "sampled_steps": len(stage.samples),
        "result": [(key, _plain(value)) for key, value in _flatten(stage.result or {}) if not _is_figure(key)],
        "evaluations": [
            evaluation_view(content, f"s{number}e{place}") for place, content in enumerate(stage.evaluations)
        ],
    }


def _is_figure(key: str) -> bool:
    """Whether a result is a figure of an evaluation, which stands in that evaluation's tables."""
    return key.startswith("evals.")


def _choose_steps(samples: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[int]:
    """Steps spread evenly from the first to the last, as many as a page can hold."""
    steps = [step for step, rows in samples.items() if rows]
    tokens = [
        min(len(row.get("tokens") or ()), heatmap.MAX_TOKENS)
        for step in steps
        for row in samples[step][:MAX_SAMPLES_A_STEP]
    ]
    a_step = max(1, sum(tokens) // max(1, len(steps)))
    count = max(2, min(MAX_SAMPLED_STEPS, MAX_SAMPLED_TOKENS // a_step))
    if len(steps) <= count:
        return steps
    return [steps[round(index * (len(steps) - 1) / (count - 1))] for index in range(count)]


def _provenance(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    rest = {key: value for key, value in manifest.items() if key != "versions"}
    rows = []
    for key, value in _flatten(rest):
        moment = parse_time(value) if key in ("created", "finished") else None
        rows.append((key, format_time(moment) if moment is not None else _plain(value)))
    # A name tells that its value is secret, so the two are looked at together.
    return [(key, redact(f"{key}: {value}").removeprefix(f"{key}: ")) for key, value in rows]


def _flatten(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for key, value in content.items():
        if isinstance(value, dict):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int | float):
        return format_number(value)
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return str(value)


def _highlight(recipe: str) -> Markup:
    """The recipe with its keys and comments set apart."""
    lines = []
    for line in recipe.splitlines():
        if line.lstrip().startswith("#"):
            lines.append(Markup("<i>{}</i>").format(line))
        elif match := re.match(r"(\s*(?:- )*)([^\s:#\"'][^:#\"']*)(:(?:\s.*)?)$", line):
            lines.append(Markup("{}<b>{}</b>{}").format(*match.groups()))
        else:
            lines.append(escape(line))
    return Markup("\n").join(lines)
