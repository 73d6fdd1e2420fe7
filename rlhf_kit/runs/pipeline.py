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

from rlhf_kit.data.files import put_aside, write_whole
from rlhf_kit.errors import RunError
from rlhf_kit.evals.stage import Eval
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.processes import processes
from rlhf_kit.runs.callbacks import MetricsCallback, ProgressCallback
from rlhf_kit.runs.config import Recipe
from rlhf_kit.runs.evaluations import read_evaluations, shown
from rlhf_kit.runs.folder import RESULT_FILE, opened, record_stage, recorded, this_launch
from rlhf_kit.runs.manifest import behind_bootstrap, is_outdated, read_manifest, write_manifest
from rlhf_kit.runs.metrics import METRICS_FILE, SAMPLES_FOLDER, write_samples
from rlhf_kit.runs.report import REPORT_FILE, write_report
from rlhf_kit.runs.trackers import TENSORBOARD_FOLDER, show_samples, tracked
from rlhf_kit.trainers.config import Bootstrap, StageConfig
from rlhf_kit.trainers.setup import StageRun


def run_pipeline(
    recipe: Recipe, functions: Mapping[str, Callable[..., Any]] | None = None, evaluations_alone: bool = False
) -> dict[str, Any]:
    """Run every stage that is not yet done, write the report, and return the stages' results.

    The same command goes on where it was stopped, and leaves a run that is done as it is. `functions` are reward
    functions by the names that the recipe uses. With `evaluations_alone` only `eval` stages run, and every
    other stage is taken as it is.

    Raises:
        RunError: the run folder belongs to another recipe, a stage cannot go on, or, with `evaluations_alone`, a stage
            that trains is not done.
    """
    if evaluations_alone:
        _refuse_what_is_not_trained(recipe)
    _quiet_libraries()
    main = int(os.environ.get("RANK", "0")) == 0
    with opened(recipe) if main else nullcontext():
        return _run_stages(recipe, functions or {}, main, evaluations_alone)


def _refuse_what_is_not_trained(recipe: Recipe) -> None:
    if not any(isinstance(stage, Eval) for stage in recipe.stages.values()):
        raise RunError("the recipe has no stage of type eval: add one, or run it with `rlhf-kit train`")
    for name, stage in recipe.stages.items():
        if not isinstance(stage, Eval) and not (recipe.stage_folder(name) / RESULT_FILE).is_file():
            raise RunError(
                f"stage '{name}' is not done in {recipe.run_folder}: run `rlhf-kit train` with this recipe first, or "
                "take it out ('~stages." + name + "') and write the folders that the evaluations read"
            )


def _run_stages(
    recipe: Recipe, functions: Mapping[str, Callable[..., Any]], main: bool, evaluations_alone: bool
) -> dict[str, Any]:
    folder = recipe.run_folder
    results = {}
    finished = _is_finished(folder)
    if main and not finished:
        write_manifest(folder, interrupted=None)
    try:
        for name, stage in recipe.stages.items():
            if evaluations_alone and not isinstance(stage, Eval):
                results[name] = json.loads((recipe.stage_folder(name) / RESULT_FILE).read_text())
            else:
                results[name] = _run_stage(recipe, name, stage, functions, main)
        if main and not _is_finished(folder):
            write_manifest(folder, finished=time.time())
    except BaseException:
        if main:
            write_manifest(folder, interrupted=time.time())
        raise
    finally:
        may_repeat = any(isinstance(stage, Eval | Bootstrap) for stage in recipe.stages.values())
        if main and (may_repeat or not (finished and (folder / REPORT_FILE).is_file())):
            write_report(folder)
    if main:
        _print_results(recipe, results)
    return results


def _is_finished(folder: Path) -> bool:
    return read_manifest(folder).get("finished") is not None


def _run_stage(
    recipe: Recipe, name: str, stage: StageConfig, functions: Mapping[str, Callable[..., Any]], main: bool
) -> dict[str, Any]:
    folder = recipe.stage_folder(name)
    done = folder / RESULT_FILE
    if not isinstance(stage, Eval | Bootstrap):  # which know themselves what has to be repeated
        _put_aside_if_outdated(recipe, name, main)
        if done.is_file():
            return json.loads(done.read_text())
    if main:
        record_stage(recipe, name, begun=StageRun(folder).last_checkpoint() is not None)
    if isinstance(stage, Bootstrap):
        return _run_bootstrap(recipe, stage, folder, functions, main)
    return _run_in(recipe, name, stage, folder, functions, main)


def _put_aside_if_outdated(recipe: Recipe, name: str, main: bool) -> None:
    """Let a stage behind a bootstrap begin anew where it has read what the bootstrap has changed since."""
    if name not in behind_bootstrap(recipe):
        return
    folder = recipe.stage_folder(name)
    if main and folder.exists() and is_outdated(recipe, name):
        put_aside(folder)
    processes().wait_for_everyone()


def _run_bootstrap(
    recipe: Recipe, stage: Bootstrap, folder: Path, functions: Mapping[str, Callable[..., Any]], main: bool
) -> dict[str, Any]:
    from rlhf_kit.runs.bootstrap import run_bootstrap

    progress = ProgressCallback(folder.name) if main else None
    run = StageRun(folder, recipe.seed, functions=functions, progress=progress.show_work if progress else None)
    with closing(progress) if progress else nullcontext():
        results = run_bootstrap(
            stage, run, lambda step, where, name: _run_in(recipe, name, step, where, functions, main)
        )
    if main:
        write_whole(folder / RESULT_FILE, json.dumps(results, indent=2))
    return results


def _run_in(
    recipe: Recipe,
    name: str,
    stage: StageConfig,
    folder: Path,
    functions: Mapping[str, Callable[..., Any]],
    main: bool,
) -> dict[str, Any]:
    """Run a stage in a folder, watched and tracked, and record its results there."""
    if main and not isinstance(stage, Eval) and _is_finished(recipe.run_folder):
        write_manifest(recipe.run_folder, finished=None, **this_launch())
    watchers = _watchers(folder, name) if main else ()
    run = StageRun(
        folder=folder,
        seed=recipe.seed,
        recipe=recipe.name,
        callbacks=watchers,
        functions=functions,
        log_samples=partial(_log_samples, folder) if main else None,
        progress=watchers[1].show_work if watchers else None,
    )
    with tracked(recipe, name, stage, folder) if main else nullcontext(), ExitStack() as stack:
        for watcher in watchers:
            stack.enter_context(closing(watcher))
        return recorded(folder, main, partial(_runner(stage), stage, run))  # before a tracker is waited for


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
    if stage.type == "eval":
        return _run_evaluations
    if stage.type == "pairs":
        return _run_pairs
    from rlhf_kit.trainers.run_ppo import run_ppo

    return run_ppo


def _run_pairs(stage: Pairs, run: StageRun) -> dict[str, Any]:
    from rlhf_kit.pairs.stage import run_pairs

    return run_pairs(
        stage, run.folder, seed=run.seed, recipe=run.recipe, functions=run.functions, progress=run.on_batch
    )


def _run_evaluations(stage: Eval, run: StageRun) -> dict[str, Any]:
    from rlhf_kit.evals.run import run_eval
    from rlhf_kit.trainers.sampling import sample_completions

    sampler = partial(sample_completions, on_batch=run.on_batch("sampling"))
    return run_eval(stage, run.folder, seed=run.seed, sampler=sampler, functions=run.functions, progress=run.on_batch)


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
    for name, stage in recipe.stages.items():
        if isinstance(stage, Eval) and name in results:
            _print_evaluations(console, recipe.stage_folder(name))
    console.print(f"report: {recipe.run_folder / REPORT_FILE}", soft_wrap=True, markup=False)


def _print_evaluations(console: Console, folder: Path) -> None:
    """The first table of each evaluation; the others are in the report."""
    for content in read_evaluations(folder):
        for first in content["tables"][:1]:
            table = Table(
                *first["columns"], title=f"{content['name']}: {first['title']}", box=None, title_justify="left"
            )
            for row in first["rows"]:
                table.add_row(*(shown(cell) for cell in row))
            console.print(table)


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
