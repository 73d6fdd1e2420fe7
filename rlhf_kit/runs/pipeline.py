"""Running of a recipe: its stages in order, each left alone once it is done."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from rlhf_kit.errors import RunError
from rlhf_kit.runs.callbacks import MetricsCallback, ProgressCallback
from rlhf_kit.runs.config import Recipe
from rlhf_kit.runs.manifest import describe_run, read_manifest, write_manifest
from rlhf_kit.runs.metrics import write_samples
from rlhf_kit.runs.report import write_report
from rlhf_kit.trainers.config import StageConfig
from rlhf_kit.trainers.setup import StageRun

RESULT_FILE = "result.json"
RECIPE_FILE = "recipe.resolved.yaml"


def run_pipeline(recipe: Recipe, functions: Mapping[str, Callable[..., Any]] | None = None) -> dict[str, Any]:
    """Run every stage that is not yet done, write the report, and return the stages' results.

    The same command goes on where it was stopped. `functions` are reward functions by the names that the recipe
    uses.

    Raises:
        RunError: the run folder belongs to another recipe, or a stage cannot go on.
    """
    _quiet_libraries()
    folder = recipe.run_folder
    main = int(os.environ.get("RANK", "0")) == 0
    if main:
        _open_folder(recipe)
    results = {}
    try:
        for name, stage in recipe.stages.items():
            results[name] = _run_stage(recipe, name, stage, functions or {}, main)
        if main:
            write_manifest(folder, finished=time.time())
    finally:
        if main:
            report = write_report(folder)
    if main:
        _print_results(recipe, results, report)
    return results


def _run_stage(
    recipe: Recipe, name: str, stage: StageConfig, functions: Mapping[str, Callable[..., Any]], main: bool
) -> dict[str, Any]:
    folder = recipe.stage_folder(name)
    done = folder / RESULT_FILE
    if done.is_file():
        return json.loads(done.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    run = StageRun(
        folder=folder,
        seed=recipe.seed,
        callbacks=[MetricsCallback(folder), ProgressCallback(name)],
        functions=functions,
        log_samples=partial(write_samples, folder) if main else None,
    )
    started = time.time()
    results = _runner(stage)(stage, run)
    results["minutes"] = round((time.time() - started) / 60, 2)
    if main:
        partial_file = done.with_suffix(".partial")
        partial_file.write_text(json.dumps(results, indent=2))
        os.replace(partial_file, done)
    return results


def _runner(stage: StageConfig) -> Callable[[Any, StageRun], dict[str, Any]]:
    """Trainers are imported by the stage that needs them: TRL takes seconds to import."""
    if stage.type == "sft":
        from rlhf_kit.trainers.sft import run_sft

        return run_sft
    if stage.type == "reward":
        from rlhf_kit.trainers.reward import run_reward

        return run_reward
    from rlhf_kit.trainers.run_ppo import run_ppo

    return run_ppo


def _open_folder(recipe: Recipe) -> None:
    """Make the run folder, or make sure that it is this recipe's."""
    folder = recipe.run_folder
    written = folder / RECIPE_FILE
    if written.is_file():
        before, now = yaml.safe_load(written.read_text()), yaml.safe_load(recipe.to_yaml())
        changed = sorted(_differences(before, now))
        if changed:
            shown = ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else "")
            raise RunError(
                f"{folder} holds a run of another recipe (differs in {shown}); give this one another name "
                f"(name=...), or remove the folder"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty and holds no run; give this run another name (name=...)")
    recipe.write_resolved(folder)
    write_manifest(folder, **describe_run(recipe), **read_manifest(folder))


def _differences(before: Any, now: Any, path: str = "") -> set[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        found = set()
        for key in {*before, *now}:
            found |= _differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        return found
    return set() if before == now else {path}


def _print_results(recipe: Recipe, results: Mapping[str, Mapping[str, Any]], report: Path) -> None:
    console = Console()
    table = Table("stage", "updates", "held-out start", "held-out end", "step AUC", "minutes", box=None)
    for name, result in results.items():
        table.add_row(
            name,
            _shown(result.get("updates")),
            _shown(result.get("eval_accuracy_start")),
            _shown(result.get("eval_accuracy")),
            _shown(result.get("step_auc_min")),
            _shown(result.get("minutes")),
        )
    console.print(table)
    console.print(f"report: {report}", soft_wrap=True)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _quiet_libraries() -> None:
    """One progress display, the kit's; warnings of libraries about their own future are not the user's business."""
    import warnings

    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
