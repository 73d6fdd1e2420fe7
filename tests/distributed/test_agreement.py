"""What one process alone meets, all of them know of, so that none waits for another."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import launch


def test_a_failure_and_a_metric_of_one_process_reach_the_other(tmp_path: Path) -> None:
    launch("cpu_ddp", str(Path(__file__).parent / "disagreeing.py"), str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["said"].startswith("reward source 'ratio' failed on another process")
    assert second["said"] == "reward source 'ratio' failed on this process: no tokens"
    assert first["metrics"] == second["metrics"] == {"everywhere": 0.5, "here": 5.0}
