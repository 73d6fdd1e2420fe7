"""Runs stages in each of several processes: JSON of stages and folders; writes what each said, if it failed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from pydantic import TypeAdapter

from rlhf_kit.errors import RunError
from rlhf_kit.pairs.stage import run_pairs
from rlhf_kit.trainers.config import StageConfig


def failing_on_the_second(completions: list[str], **_: object) -> list[float]:
    """A judge that only one process cannot reach."""
    if PartialState().process_index == 1:
        raise ConnectionError("no route to the judge")
    return [0.0 for _ in completions]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for place, fields in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        folder = Path(sys.argv[2], str(place))
        functions = {"failing": failing_on_the_second}
        try:
            said = run_pairs(
                TypeAdapter(StageConfig).validate_python(fields), folder, recipe="run", functions=functions
            )
        except RunError as error:
            said = str(error)
        Path(sys.argv[2], f"{place}-{PartialState().process_index}.json").write_text(json.dumps(said))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
