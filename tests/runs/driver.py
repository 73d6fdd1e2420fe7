"""Runs recipes as `rlhf-kit train` does, each in a process of its own that may kill itself without warning.

Reads lines of JSON, `[RECIPE.yaml]` or `[RECIPE.yaml, EVENT, COUNT]`, and answers each with the exit code. EVENT is
a key of `METHODS`: at its COUNT-th occurrence the process gets SIGKILL. Processes are forked from this one, which has
imported everything and done nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import Any

import torch

from rlhf_kit.recipe import load_recipe
from rlhf_kit.runs.pipeline import run_pipeline
from rlhf_kit.trainers import reward, run_ppo, sft  # noqa: F401  (so that a fork need not import them)
from rlhf_kit.trainers.ppo import PpoTrainer

METHODS = {
    "generation": "_generate",
    "scoring": "assign_credit",
    "micro_step": "training_step",
    "update": "_get_grad_norm",
    "end": "_finalize_training",
}


def die_at(event: str, count: int) -> None:
    """Let the process be killed in the middle of the `count`-th call of the event's method."""
    method, calls = getattr(PpoTrainer, METHODS[event]), 0

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *args, **kwargs)

    setattr(PpoTrainer, METHODS[event], counted)


def run(recipe: str, *death: Any) -> None:
    """Run the recipe, in a forked process."""
    os.dup2(2, 1)  # standard output is for answers
    code = 1
    try:
        if death:
            die_at(*death)
        run_pipeline(load_recipe(recipe))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(*json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
