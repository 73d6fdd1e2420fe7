"""Two processes give the rows of one, also where they go on from what one has left, and fail together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rlhf_kit.pairs.stage import run_pairs

from ..distributed.conftest import launch
from .conftest import contents, stage

SCRIPT = str(Path(__file__).parent / "together.py")


def test_two_processes_give_the_rows_of_one_and_fail_together(fields: dict[str, Any], tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    results = run_pairs(stage(fields), alone, recipe="run")
    failing = {**fields, "rewards": [{"type": "function", "function": "failing"}]}
    (tmp_path / "stages.json").write_text(json.dumps([fields, fields, failing]))
    shutil.copytree(alone / "work", tmp_path / "1" / "work")
    begun = tmp_path / "1" / "work" / "chunk-000002.parquet"
    for number in (0, 1, 3):
        (tmp_path / "1" / "work" / f"chunk-{number:06d}.parquet").unlink()
    kept = begun.stat().st_mtime_ns
    launch("cpu_ddp", SCRIPT, str(tmp_path / "stages.json"), str(tmp_path))
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(alone) and len(contents(alone)) == 3
    assert begun.stat().st_mtime_ns == kept
    said = [[json.loads((tmp_path / f"{place}-{rank}.json").read_text()) for rank in (0, 1)] for place in range(3)]
    assert said[0] == [[results, 2], [results, 2]]  # each process has built two of the four chunks
    assert said[1] == [[results, 2], [results, 1]]  # and of the three that were missing, two and one
    assert said[2][0] == said[2][1] and "process 1: no route to the judge" in said[2][0]
