"""Runs a recipe in each of several processes: RECIPE.yaml [COUNT]; all of them die as checkpoint COUNT begins."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
from transformers import Trainer

from rlhf_kit.recipe import load_recipe
from rlhf_kit.runs.pipeline import run_pipeline


def die_at_checkpoint(count: int) -> None:
    """Let the process be killed when a trainer is about to save for the `count`-th time."""
    save, calls = Trainer._save_checkpoint, []

    def counted(self: Trainer, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, *args, **kwargs)

    Trainer._save_checkpoint = counted


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        die_at_checkpoint(int(sys.argv[2]))
    run_pipeline(load_recipe(sys.argv[1], world_size=2))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
