"""Real processes: the same stages in one process, and in two under each of the project's configurations."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "worker.py"
WORLDS = ("cpu_ddp", "zero2", "zero3")


def launch(world: str, *command: str, succeeds: bool = True) -> None:
    """Run a script in two processes with one of the project's accelerate configurations, as launch.sh does."""
    if world.startswith("zero") and shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip(f"{world}: DeepSpeed compiles its CPU operators, and there is no C++ compiler")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment |= {"ACCELERATE_USE_CPU": "true"} if world == "cpu_ddp" else {"DS_ACCELERATOR": "cpu"}
    config = ROOT / "accelerate_configs" / f"{world}.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    call([*launcher, *command], environment, succeeds)


def call(command: list[str], environment: Mapping[str, str], succeeds: bool = True) -> None:
    """Run Python, and fail with the end of what it said if it does not end as it should."""
    done = subprocess.run(
        [sys.executable, *command], env=dict(environment), capture_output=True, text=True, timeout=600
    )
    assert (done.returncode == 0) == succeeds, f"{command} exited with {done.returncode}:\n{done.stderr[-6000:]}"


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[dict[str, Any]]], Path]:
    """Run cases in one process; gives the folder of their outcomes."""

    def run(cases: list[dict[str, Any]]) -> Path:
        folder = tmp_path_factory.mktemp("alone")
        (folder / "plan.json").write_text(json.dumps(cases))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        call([str(WORKER), str(folder / "plan.json"), str(folder)], environment)
        return folder

    return run


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, list[dict[str, Any]]], Path]:
    """Run cases in two processes of a world; gives the folder of their outcomes."""

    def run(world: str, cases: list[dict[str, Any]]) -> Path:
        folder = tmp_path_factory.mktemp(world)
        (folder / "plan.json").write_text(json.dumps(cases))
        launch(world, str(WORKER), str(folder / "plan.json"), str(folder))
        return folder

    return run
