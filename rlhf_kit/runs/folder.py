"""Whose a run folder is: one recipe's, one launch's at a time, and the same inputs from begin to end."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from rlhf_kit.data.files import write_whole
from rlhf_kit.errors import RunError
from rlhf_kit.redact import redact
from rlhf_kit.runs.config import Recipe
from rlhf_kit.runs.manifest import describe_run, describe_stage, read_manifest, write_manifest
from rlhf_kit.trainers.setup import StageRun
from rlhf_kit.world_size import launch_of

RESULT_FILE = "result.json"
RECIPE_FILE = "recipe.resolved.yaml"
LOCK_FILE = ".lock"
REPEATING = ("eval", "bootstrap")

logger = logging.getLogger(__name__)


@contextmanager
def opened(recipe: Recipe) -> Iterator[None]:
    """The run folder, made or found to be this recipe's, and locked against a second launch.

    Raises:
        RunError: the folder holds another run, or another process runs in it.
    """
    folder = recipe.run_folder
    _refuse_other_content(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _claim(recipe)
        yield


def record_stage(recipe: Recipe, name: str, begun: bool) -> None:
    """Write what a stage reads into the manifest; a stage that has begun must go on with what it began with.

    Raises:
        RunError: a model or data file has changed since.
    """
    stages = read_manifest(recipe.run_folder).get("stages", {})
    described = describe_stage(recipe, name)
    before, now = stages.get(name, {}).get("inputs", {}), described["inputs"]
    changed = sorted(field for field in {*before, *now} if before.get(field) != now.get(field))
    if begun and changed:
        folder = StageRun(recipe.stage_folder(name)).checkpoints
        raise RunError(
            f"stage '{name}' was begun with other contents of {', '.join(changed)}, and cannot go on with these: put "
            f"the former back, give this run another name (name=...), or remove {folder} to begin the stage anew"
        )
    write_manifest(recipe.run_folder, stages={**stages, name: described})


def this_launch() -> dict[str, Any]:
    """How many processes run and what started them, as the manifest says it."""
    return {"world_size": int(os.environ.get("WORLD_SIZE", "1")), "launch": launch_of()}


def recorded(folder: Path, main: bool, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns and the minutes that it took, written into a stage's folder by the main process."""
    started = time.time()
    results = run()
    results["minutes"] = round((time.time() - started) / 60, 2)
    if main:
        write_whole(folder / RESULT_FILE, json.dumps(results, indent=2))
    return results


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the operating system lets go when the process ends, however it ends."""
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(
                f"{folder} is in use by {file.read().strip() or 'another process'}; wait for it or stop it, or give "
                "this run another name (name=...)"
            ) from None
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s): see to it that nothing else runs in it", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _refuse_other_content(folder: Path) -> None:
    names = {path.name for path in folder.iterdir() if path.suffix != ".partial"} if folder.exists() else set()
    if names - {LOCK_FILE} and RECIPE_FILE not in names:
        raise RunError(f"{folder} is not empty and holds no run; give this run another name (name=...)")


def _claim(recipe: Recipe) -> None:
    folder = recipe.run_folder
    launch = this_launch()
    written, text = folder / RECIPE_FILE, redact(recipe.to_yaml())
    if written.is_file():
        before, now = yaml.safe_load(written.read_text(encoding="utf-8")), yaml.safe_load(text)
        _check_same(folder, _without_evaluations(before), _without_evaluations(now))
        _check_launch(recipe, launch)
        if before != now:
            write_whole(written, text)
    else:
        write_whole(written, text)
    if not read_manifest(folder):
        write_manifest(folder, **describe_run(recipe), **launch)


def _without_evaluations(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe less what stages say that repeat what has changed and nothing else."""
    if recipe.get("type") in REPEATING:
        return {key: recipe[key] for key in ("name", "runs_dir", "seed", "type") if key in recipe}
    stages = recipe.get("stages") or {}
    return {**recipe, "stages": {name: stage for name, stage in stages.items() if stage.get("type") not in REPEATING}}


def _check_same(folder: Path, before: Any, now: Any) -> None:
    changed = sorted(_differences(before, now))
    if changed:
        shown = ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else "")
        raise RunError(
            f"{folder} holds a run of another recipe (differs in {shown}); give this one another name (name=...), or "
            "remove the folder"
        )


def _check_launch(recipe: Recipe, launch: dict[str, Any]) -> None:
    """A checkpoint holds the state of every rank in the form of its launcher, so its stage needs the same again."""
    manifest = read_manifest(recipe.run_folder)
    before = {name: manifest.get(name, value) for name, value in launch.items()}
    for name in recipe.stages:
        stage = recipe.stage_folder(name)
        for folder in (stage, *sorted(stage.glob("round-*/preference"))):  # the latter in a bootstrap
            begun = not (folder / RESULT_FILE).is_file() and any(StageRun(folder).checkpoints.glob("checkpoint-*"))
            if begun and before != launch:
                what = "stage" if folder == stage else "round"
                raise RunError(
                    f"stage '{name}' was begun with {_described(before)} and cannot go on with {_described(launch)}: "
                    f"start {_described(before)} again, or remove {StageRun(folder).checkpoints} to begin the {what} "
                    "anew"
                )
    if before != launch and manifest.get("finished") is None:
        write_manifest(recipe.run_folder, **launch)


def _described(launch: dict[str, Any]) -> str:
    count = launch["world_size"]
    return f"{count} {'process' if count == 1 else 'processes'} ({launch['launch']})"


def _differences(before: Any, now: Any, path: str = "") -> set[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        found = set()
        for key in {*before, *now}:
            found |= _differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        return found
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return _differences(dict(enumerate(before)), dict(enumerate(now)), path)
    return set() if before == now else {path}
