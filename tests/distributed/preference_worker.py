"""Runs the `preference` stages of a plan in one or several processes: PLAN.json OUT; a case may kill all processes."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import TrainerCallback

from rlhf_kit.trainers.config import Preference
from rlhf_kit.trainers.preference import run_preference
from rlhf_kit.trainers.setup import StageRun


class Die(TrainerCallback):
    """Ends the process without warning at the end of an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(case: dict[str, Any], out: Path) -> None:
    """Run a case in `<out>/<name>`, and write what it gave into `result.json` there."""
    folder = out / case["name"]
    folder.mkdir(parents=True, exist_ok=True)
    death = [Die(case["dies_at"])] if "dies_at" in case else []
    results = run_preference(Preference.model_validate(case["stage"]), StageRun(folder, callbacks=death))
    processes = PartialState()
    if processes.is_main_process:
        results |= {"world_size": processes.num_processes}
        (folder / "result.json").write_text(json.dumps(results))
    processes.wait_for_everyone()
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in json.loads(Path(sys.argv[1]).read_text()):
        run(one, Path(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
