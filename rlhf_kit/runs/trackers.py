"""Where a stage's numbers go besides its run folder: the trackers that `trainer.args.report_to` names."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rlhf_kit.errors import RunError
from rlhf_kit.evals.stage import Eval
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.redact import redact
from rlhf_kit.runs.config import Recipe
from rlhf_kit.runs.heatmap import heatmap_page
from rlhf_kit.trainers.config import Bootstrap, StageConfig

PROJECT = "rlhf_kit"
TENSORBOARD_FOLDER = "tensorboard"
# transformers takes the folder of the events from the environment alone.
_TENSORBOARD_VARIABLE = "TENSORBOARD_LOGGING_DIR"


@contextmanager
def tracked(recipe: Recipe, name: str, stage: StageConfig, folder: Path) -> Iterator[None]:
    """Give a stage a wandb run and a folder of tensorboard events of its own, as its `report_to` asks for.

    What the user's environment sets (WANDB_PROJECT, WANDB_DIR, TENSORBOARD_LOGGING_DIR) stays, and so does a wandb
    run that is open already.

    Raises:
        RunError: wandb cannot open a run.
    """
    trackers = _report_to(stage)
    with ExitStack() as stack:
        if "tensorboard" in trackers:
            stack.enter_context(_tensorboard_folder(folder / TENSORBOARD_FOLDER))
        if "wandb" in trackers:
            stack.enter_context(_wandb_run(recipe, name, stage, folder))
        yield


def show_samples(samples: Sequence[Mapping[str, Any]]) -> None:
    """Send the heat map of samples to the wandb run that is open, if one is; it goes with the next log."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.log({"samples": wandb.Html(heatmap_page(samples))}, commit=False)


def _report_to(stage: StageConfig) -> set[str]:
    if isinstance(stage, Eval | Pairs | Bootstrap):
        return set()
    given = stage.trainer.args.get("report_to") or []
    names = {given} if isinstance(given, str) else set(given)
    return names | {"tensorboard", "wandb"} if "all" in names else names


@contextmanager
def _tensorboard_folder(folder: Path) -> Iterator[None]:
    if _TENSORBOARD_VARIABLE in os.environ:
        yield
        return
    os.environ[_TENSORBOARD_VARIABLE] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(_TENSORBOARD_VARIABLE, None)


@contextmanager
def _wandb_run(recipe: Recipe, name: str, stage: StageConfig, folder: Path) -> Iterator[None]:
    import wandb

    if wandb.run is not None:  # the caller's, a sweep's say: transformers logs to it, and the caller ends it
        yield
        return
    run_name = None if isinstance(stage, Eval | Pairs | Bootstrap) else stage.trainer.args.get("run_name")
    full_name = recipe.name if recipe.single else f"{recipe.name}/{name}"
    folder.mkdir(parents=True, exist_ok=True)  # wandb would turn to a temporary folder
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            group=recipe.name,
            name=run_name or full_name,
            dir=os.environ.get("WANDB_DIR") or str(folder),
            config={"stage": json.loads(redact(json.dumps(stage.model_dump(mode="json"))))},
        )
    except wandb.Error as error:
        raise RunError(f"wandb opens no run ({error}): log in with 'wandb login', or set WANDB_MODE=offline") from error
    try:
        yield
    except BaseException:  # an interrupt too: the run is shown as failed, and the next one starts afresh
        run.finish(exit_code=1)
        raise
    run.finish()
