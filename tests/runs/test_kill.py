"""A run that is killed anywhere and started again ends bit for bit as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_kit.runs.metrics import read_metrics, read_samples

DRIVER = Path(__file__).parent / "driver.py"
ROOT = Path(__file__).parents[2]
UPDATES = 11  # no multiple of logging_steps or save_steps
CLOCK = ("time", "step_time", "profiling", "train_")  # of the machine, or of the last attempt alone

DECOMPOSED = {
    "type": "decomposed",
    "segments": {"by": "token"},
    "sampled": 2,
    "local": {"source": "implicit_prm"},
    "online": {"learning_rate": 1e-2},
}
RECIPES = {
    "gae": {
        "credit": {"estimator": "gae", "kl": {"coefficient": 0.05, "target": 1.0, "adaptation_horizon": 100}},
        "more": [DECOMPOSED],
    },
    "prime": {
        "credit": {"estimator": "prime"},
        "prm": {"reference": "ema", "online": {"learning_rate": 1e-3}, "normalize": "running"},
    },
    "lora": {
        "model": {"peft": {"type": "lora", "r": 2}},
        "credit": {"estimator": "gae"},
        "prm": {"online": {"learning_rate": 1e-3, "order": "with_policy"}},
    },
}


def recipe(kind: str, policy: Path, folder: Path) -> Path:
    """Four rollouts an epoch, each used in two updates of two micro-batches; checkpoints at 3, 6 and 9.

    Those at 3 and 9 lie between two updates of one rollout, and the one at 9 in epoch 1.
    """
    fields = RECIPES[kind]
    prm = {"type": "implicit_prm", "beta": 0.5, **fields.get("prm", {"online": {"learning_rate": 1e-3}})}
    content = {
        "name": kind,
        "runs_dir": str(folder),
        "type": "ppo",
        "model": {"path": str(policy), **fields.get("model", {})},
        "data": {"type": "running_sums", "size": 8, "terms": 2, "modulus": 5},
        "eval_data": {"type": "running_sums", "size": 4, "terms": 2, "modulus": 5, "seed": 1},
        "evaluation": {"verifier": "exact", "max_new_tokens": 4, "batch_size": 4},
        "rewards": [{"type": "verifier", "verifier": "exact"}, prm, *fields.get("more", [])],
        "credit": fields["credit"],
        "samples": {"every": 4, "count": 2},
        "trainer": {
            "args": {
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "num_generations": 4,
                "num_iterations": 2,
                "max_completion_length": 5,
                "max_steps": UPDATES,
                "learning_rate": 1e-2,
                "logging_steps": 2,
                "save_strategy": "steps",
                "save_steps": 3,
                "eval_strategy": "steps",
                "eval_steps": 4,
            }
        },
    }
    file = folder / f"{kind}.yaml"
    file.write_text(json.dumps(content))
    return file


Start = Callable[..., int]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Runs a recipe in a process of its own, which may have to die; gives its exit code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    log = tmp_path_factory.mktemp("driver") / "log"
    with log.open("w") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        driver = subprocess.Popen([sys.executable, str(DRIVER)], env=environment, text=True, **pipes)

        def run(*request: Any) -> int:
            assert driver.stdin is not None and driver.stdout is not None
            driver.stdin.write(json.dumps([str(request[0]), *request[1:]]) + "\n")
            driver.stdin.flush()
            code = int(driver.stdout.readline())
            assert code in (0, -signal.SIGKILL), log.read_text()[-4000:]
            return code

        yield run
        driver.communicate()


def without_clock(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if not key.startswith(CLOCK)} for line in lines]


def assert_same_run(folder: Path, whole: Path) -> None:
    for file in sorted(whole.glob("**/*.safetensors")):
        if "checkpoints" not in file.parts:
            before, after = load_file(file), load_file(folder / file.relative_to(whole))
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before), file
    assert without_clock(read_metrics(folder)) == without_clock(read_metrics(whole))
    assert read_samples(folder) == read_samples(whole)


@pytest.fixture(scope="module", params=RECIPES)
def whole(
    request: pytest.FixtureRequest, start: Start, small_policy: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """An undisturbed run of each recipe."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(recipe(request.param, small_policy, folder)) == 0
    return request.param, folder / request.param


DEATHS = {
    "in epoch 1, in a rollout": ("generation", 6),
    "in scoring": ("scoring", 3),
    "in the middle of an accumulation": ("micro_step", 16),
    "between two updates of a rollout": ("micro_step", 19),
    "in the last update": ("update", UPDATES),
    "behind the last checkpoint": ("end", 1),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    death: str, whole: tuple[str, Path], start: Start, small_policy: Path, tmp_path: Path
) -> None:
    kind, folder = whole
    file = recipe(kind, small_policy, tmp_path)
    assert start(file, *DEATHS[death]) == -signal.SIGKILL
    assert list((tmp_path / kind / "checkpoints").glob("checkpoint-*")), "killed before there was anything to lose"
    assert start(file) == 0
    assert_same_run(tmp_path / kind, folder)
