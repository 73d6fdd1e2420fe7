"""Runs a recipe in each of several processes, which may all kill themselves: RECIPE.yaml [EVENT COUNT]."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "runs"))

from driver import die_at

from rlhf_kit.recipe import load_recipe
from rlhf_kit.runs.pipeline import run_pipeline

if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        die_at(sys.argv[2], int(sys.argv[3]))
    run_pipeline(load_recipe(sys.argv[1], world_size=2))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
