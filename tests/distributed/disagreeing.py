"""Two processes of which only one fails, or only one has a metric: prints what each of them makes of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate import Accelerator

from rlhf_kit.errors import RunError
from rlhf_kit.trainers.diagnostics import RolloutLog
from rlhf_kit.trainers.rollouts import Ranks

accelerator = Accelerator()
rank, ranks = accelerator.process_index, Ranks(accelerator)


def judge() -> str:
    """Raises on the second process alone."""
    if rank == 1:
        raise ZeroDivisionError("no tokens")
    return "judged"


try:
    said = ranks.agreed("reward source 'ratio'", judge)
except RunError as error:
    said = str(error)
log = RolloutLog(cast(Any, None), cast(Any, None), ranks, None)
metrics = {"everywhere": float(rank)} | ({"here": 5.0} if rank == 1 else {})
seen = {"said": said, "metrics": log._common(cast(Any, SimpleNamespace(metrics=metrics, totals={})))}
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(seen))
accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()
