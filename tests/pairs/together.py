"""Runs stages in each of several processes: JSON of stages and folders; writes what each said, if it failed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from rlhf_kit.errors import RunError
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.pairs.stage import run_pairs


def failing_on_the_second(completions: list[str], **_: object) -> list[float]:
    """A judge that only one process cannot reach."""
    if PartialState().process_index == 1:
        raise ConnectionError("no route to the judge")
    return [0.0 for _ in completions]


chunks: list[int] = []


def told(done: int, total: int) -> None:
    """How many chunks are this process's own."""
    chunks.append(total)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for place, fields in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        folder = Path(sys.argv[2], str(place))
        functions = {"failing": failing_on_the_second}
        chunks.clear()
        try:
            stage = Pairs.model_validate(fields)
            results = run_pairs(stage, folder, recipe="run", functions=functions, progress=lambda what: told)
            said = [results, chunks[-1]]
        except RunError as error:
            said = str(error)
        Path(sys.argv[2], f"{place}-{PartialState().process_index}.json").write_text(json.dumps(said))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
