"""What every stage's trainer is given: its arguments, its folder, its callbacks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from rlhf_kit.errors import RunError
from rlhf_kit.trainers.checkpoints import newest_checkpoints, write_contents

logger = logging.getLogger(__name__)
Args = TypeVar("Args", bound=TrainingArguments)


@dataclass(frozen=True)
class StageRun:
    """Where and how a stage runs.

    Attributes:
        folder: the stage's run folder.
        seed: the recipe's seed.
        callbacks: loggers and the progress display.
        functions: reward functions by name.
        log_samples: receives the samples of a rollout.
        progress: is told what is being done beside training, how much of it is done, and of how much.
        recipe: the recipe's name.
    """

    folder: Path
    seed: int = 0
    callbacks: Sequence[TrainerCallback] = ()
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    log_samples: Callable[[int, list[dict[str, Any]]], object] | None = None
    progress: Callable[[str, int, int], object] | None = None
    recipe: str = ""

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint."""
        return newest_checkpoints(self.checkpoints)[0]

    def on_batch(self, what: str) -> Callable[[int, int], object]:
        """`progress` of one kind of work."""
        return partial(self.progress, what) if self.progress is not None else lambda done, total: None


def build_args(cls: type[Args], run: StageRun, given: Mapping[str, Any], **defaults: Any) -> Args:
    """TRL's arguments: the recipe's, over the kit's defaults, over TRL's own.

    The kit logs to its run folder alone unless `report_to` says more, and uses bfloat16 only where the machine
    computes in it.
    """
    kit = {
        "report_to": "none",
        "seed": run.seed,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
        "ddp_find_unused_parameters": False,
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    }
    merged = {**kit, **defaults, **given, "output_dir": str(run.checkpoints)}
    if merged.get("fp16"):
        merged["bf16"] = False
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        # DeepSpeed on a CPU: without a backend each process takes itself for the only one, and with `use_cpu`
        # accelerate falls back to plain data parallelism.
        merged = {"ddp_backend": "gloo", **merged}
        if merged["bf16"]:
            raise RunError("trainer.args.bf16: DeepSpeed on a CPU trains in float32; write bf16: false")
    elif not torch.cuda.is_available() and "use_cpu" not in merged:
        merged["use_cpu"] = True
    try:
        return cls(**merged)
    except (ValueError, TypeError) as error:
        raise RunError(f"trainer.args: {error}") from error


def without_printing(trainer: Trainer) -> None:
    """Drop transformers' printing of every log line, which would only repeat what the kit's loggers show."""
    trainer.remove_callback(PrinterCallback)


def train(trainer: Trainer, run: StageRun) -> None:
    """Train from the newest whole checkpoint, if there is one."""
    checkpoint, broken = newest_checkpoints(run.checkpoints)
    if broken and trainer.is_world_process_zero():
        logger.warning(
            "%s %s not whole (killed while it was written, or the disk was full): going on from %s",
            ", ".join(path.name for path in broken),
            "is" if len(broken) == 1 else "are",
            checkpoint.name if checkpoint else "the start of the stage",
        )
    without_printing(trainer)
    trainer.add_callback(_StopIfTrained())
    trainer.add_callback(_ListContents())
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except _AlreadyTrained:
        if trainer.args.load_best_model_at_end:
            trainer._load_best_model()
        log_what_is_left = getattr(trainer, "log_what_is_left", None)
        if log_what_is_left is not None:
            log_what_is_left()
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)


class _ListContents(TrainerCallback):
    """Lists what is in a checkpoint, so that a file that is lost later is missed."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_contents(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class _AlreadyTrained(Exception):
    """The checkpoint is that of the last step."""


class _StopIfTrained(TrainerCallback):
    """Without it, a stage that was stopped behind its last checkpoint would take one step too many."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise _AlreadyTrained
