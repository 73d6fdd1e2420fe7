"""Running of a recipe: its stages in order, each left alone once it is done."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf_kit.runs.callbacks import MetricsCallback, ProgressCallback
from rlhf_kit.runs.config import Recipe
from rlhf_kit.runs.folder import RESULT_FILE, opened, record_stage
from rlhf_kit.runs.manifest import read_manifest, write_manifest, write_whole
from rlhf_kit.runs.metrics import METRICS_FILE, SAMPLES_FOLDER, write_samples
from rlhf_kit.runs.report import REPORT_FILE, write_report
from rlhf_kit.runs.trackers import TENSORBOARD_FOLDER, show_samples, tracked
from rlhf_kit.trainers.config import StageConfig
from rlhf_kit.trainers.setup import StageRun


def run_pipeline(recipe: Recipe, functions: Mapping[str, Callable[..., Any]] | None = None) -> dict[str, Any]:
    """Run every stage that is not yet done, write the report, and return the stages' results.

    The same command goes on where it was stopped, and leaves a run that is done as it is. `functions` are reward
    functions by the names that the recipe uses.

    Raises:
        RunError: the run folder belongs to another recipe, or a stage cannot go on.
    """
    _quiet_libraries()
    main = int(os.environ.get("RANK", "0")) == 0
    with opened(recipe) if main else nullcontext():
        return _run_stages(recipe, functions or {}, main)


def _run_stages(recipe: Recipe, functions: Mapping[str, Callable[..., Any]], main: bool) -> dict[str, Any]:
    folder = recipe.run_folder
    results = {}
    finished = "finished" in read_manifest(folder)
    if main and not finished:
        write_manifest(folder, interrupted=None)
    try:
        for name, stage in recipe.stages.items():
            results[name] = _run_stage(recipe, name, stage, functions, main)
        if main and not finished:
            write_manifest(folder, finished=time.time())
    except BaseException:
        if main:
            write_manifest(folder, interrupted=time.time())
        raise
    finally:
        if main and not (finished and (folder / REPORT_FILE).is_file()):
            write_report(folder)
    if main:
        _print_results(recipe, results)
    return results


def _run_stage(
    recipe: Recipe, name: str, stage: StageConfig, functions: Mapping[str, Callable[..., Any]], main: bool
) -> dict[str, Any]:
    folder = recipe.stage_folder(name)
    done = folder / RESULT_FILE
    if done.is_file():
        return json.loads(done.read_text())
    watchers = _watchers(folder, name) if main else ()
    run = StageRun(
        folder=folder,
        seed=recipe.seed,
        callbacks=watchers,
        functions=functions,
        log_samples=partial(_log_samples, folder) if main else None,
        progress=watchers[1].show_work if watchers else None,
    )
    if main:
        record_stage(recipe, name, begun=run.last_checkpoint() is not None)
    started = time.time()
    with tracked(recipe, name, folder) if main else nullcontext(), ExitStack() as stack:
        for watcher in watchers:
            stack.enter_context(closing(watcher))
        results = _runner(stage)(stage, run)
        results["minutes"] = round((time.time() - started) / 60, 2)
        if main:  # before a tracker is waited for
            write_whole(done, json.dumps(results, indent=2))
    return results


def _watchers(folder: Path, name: str) -> tuple[MetricsCallback, ProgressCallback]:
    """The callbacks of a stage; what an attempt without a checkpoint has logged will be logged again."""
    folder.mkdir(parents=True, exist_ok=True)
    if StageRun(folder).last_checkpoint() is None:
        (folder / METRICS_FILE).unlink(missing_ok=True)
        for logged in (SAMPLES_FOLDER, TENSORBOARD_FOLDER):
            shutil.rmtree(folder / logged, ignore_errors=True)
    return MetricsCallback(folder), ProgressCallback(name)


def _log_samples(folder: Path, step: int, samples: list[dict[str, Any]]) -> None:
    """Keep samples in the run folder, and show them where the stage is tracked."""
    write_samples(folder, step, samples)
    show_samples(samples)


def _runner(stage: StageConfig) -> Callable[[Any, StageRun], dict[str, Any]]:
    """Trainers are imported by the stage that needs them: TRL takes seconds to import."""
    if stage.type == "sft":
        from rlhf_kit.trainers.sft import run_sft

        return run_sft
    if stage.type == "reward":
        from rlhf_kit.trainers.reward import run_reward

        return run_reward
    if stage.type == "segment":
        from rlhf_kit.trainers.segment import run_segment

        return run_segment
    if stage.type == "preference":
        from rlhf_kit.trainers.preference import run_preference

        return run_preference
    from rlhf_kit.trainers.run_ppo import run_ppo

    return run_ppo


def _print_results(recipe: Recipe, results: Mapping[str, Mapping[str, Any]]) -> None:
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
    console.print(f"report: {recipe.run_folder / REPORT_FILE}", soft_wrap=True, markup=False)


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
