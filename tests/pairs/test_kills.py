"""Killed at any point, the same command ends with the same files, bit for bit, and samples no finished chunk again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlhf_kit.pairs.stage import run_pairs

from .conftest import contents, stage

SCRIPT = str(Path(__file__).parent / "killing.py")
DEATHS = (
    "sampling:1",  # nothing is kept
    "written:1",  # chunk 0 is written and not in its place
    "kept:1",  # chunk 0 is kept
    "sampling:3",  # chunks 1 and 2 are kept, 3 is being sampled
    "written:2",  # chunk 3 is kept, and all completions are written and not in their place
    "kept:2",  # the pairs are there, and single completions are not
)


def test_killed_anywhere_the_same_command_ends_with_the_same_files(fields: dict[str, Any], tmp_path: Path) -> None:
    whole, log = tmp_path / "whole", tmp_path / "log"
    run_pairs(stage(fields), whole, seed=3, recipe="run")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"name": "run", "runs_dir": str(tmp_path), "seed": 3, "stages": {"pairs": fields}}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, str(recipe), str(log), *DEATHS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "run" / "pairs") == contents(whole) and len(contents(whole)) == 3
    # 10 prompts in chunks of 3, 4 completions each: chunk 0 was lost once, and nothing else was sampled twice.
    assert list(map(int, log.read_text().split())) == [12, 12, 12, 12, 4]
