"""Two processes under DDP, ZeRO-2 and ZeRO-3 learn from the same rows what one does, also when they are killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .conftest import ROOT, WORLDS, call, launch

WORKER = str(Path(__file__).parent / "preference_worker.py")
LORA = {"peft": {"type": "lora", "r": 2, "alpha": 8}}
ROWS, UPDATE = 9, 4  # the third update of an epoch is short

CASES: dict[str, dict[str, Any]] = {
    "dpo": {"objective": {"type": "dpo"}},
    "nca, LoRA": {"objective": {"type": "nca"}, "model": LORA},
    "pmpo": {"objective": {"type": "pmpo"}},
    "pairwise cringe, LoRA": {"objective": {"type": "pairwise_cringe", "top_k": 1}, "model": LORA},
    "orpo": {"objective": {"type": "orpo", "nll": "prompt_and_completion"}},
}
LONG = "orpo, over epochs"
KILLED = "nca, LoRA, killed"
KILLED_IN = ("cpu_ddp", "zero3")
TOLERANCE = 1e-3  # of an update's size


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Prompts and completions of several lengths, so that two processes pad their rows differently."""
    digits = [(i % 7, i // 3 % 7, 3 * i % 7, 5 * i % 7, 2 * i % 7) for i in range(start, start + count)]
    return [
        {
            "prompt": f"{' '.join(map(str, row[: 1 + i % 3]))} =",
            "chosen": " ".join(map(str, row[: 1 + i % 5])),
            "rejected": " ".join(map(str, row[::-1][: 1 + i % 4])) + " 6",
            "completion": " ".join(map(str, row[: 1 + i % 4])),
            "label": i % 2 == 0,
            "answer": str(row[0]),
        }
        for i, row in enumerate(digits)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for name, content in (("train", rows(ROWS)), ("held_out", rows(7, start=20))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def case(name: str, policy: Path, data: Path, processes: int, args: dict[str, Any], **more: Any) -> dict[str, Any]:
    fields = CASES.get(name.removesuffix(", killed").removesuffix(", over epochs"), {})
    held_out = {"type": "jsonl", "path": str(data / "held_out.jsonl")}
    given = {
        "per_device_train_batch_size": UPDATE // processes,
        "per_device_eval_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",  # Adam makes noise of gradients that are almost 0
        "max_grad_norm": 1e9,
        "gradient_checkpointing": True,
        "logging_steps": 1,
        **args,
    }
    stage = {
        "type": "preference",
        "objective": fields["objective"],
        "model": {"path": str(policy), **fields.get("model", {})},
        "data": {"type": "jsonl", "path": str(data / "train.jsonl")},
        "eval_data": held_out,
        "evaluation": {"verifier": "exact", "data": held_out, "max_new_tokens": 4, "batch_size": 2},
        "trainer": {"args": given},
    }
    return {"name": name, "stage": stage, **more}


def plan(policy: Path, data: Path, processes: int) -> list[dict[str, Any]]:
    cases = [case(name, policy, data, processes, {}) for name in CASES]
    long = case(LONG, policy, data, processes, {"max_steps": 7})
    whole = case(KILLED, policy, data, processes, {"max_steps": 5, "optim": "adamw_torch"})
    return [*cases, long, whole]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, small_policy: Path, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("one")
    (folder / "plan.json").write_text(json.dumps(plan(small_policy, data, 1)[: len(CASES)]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    call([WORKER, str(folder / "plan.json"), str(folder)], environment)
    return folder


@pytest.fixture(scope="module", params=WORLDS)
def two(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, small_policy: Path, data: Path
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "plan.json").write_text(json.dumps(plan(small_policy, data, 2)))
    launch(request.param, WORKER, str(folder / "plan.json"), str(folder))
    return request.param, folder


def moved(folder: Path, policy: Path) -> dict[str, torch.Tensor]:
    """What training has added to each tensor of a whole model; an adapter as it is."""
    adapter = folder / "model" / "adapter_model.safetensors"
    if adapter.is_file():
        return load_file(adapter)
    before, after = load_file(policy / "model.safetensors"), load_file(folder / "model" / "model.safetensors")
    return {name: after[name] - before[name] for name in after}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_and_measure_what_one_does(
    name: str, one: Path, two: tuple[str, Path], small_policy: Path
) -> None:
    alone, together = (json.loads((folder / name / "result.json").read_text()) for folder in (one, two[1]))
    assert (alone.pop("world_size"), together.pop("world_size")) == (1, 2)
    assert alone.keys() == together.keys() and alone["updates"] == 2
    measured = {key: value for key, value in alone.items() if key.startswith(("eval_pref", "eval_acc", "eval_length"))}
    assert measured["eval_preference_pairs"] == 7
    for key, value in measured.items():
        assert together[key] == (value if isinstance(value, str) else pytest.approx(value)), key
    expected, found = (moved(folder / name, small_policy) for folder in (one, two[1]))
    assert found.keys() == expected.keys()
    size = torch.cat([value.flatten() for value in expected.values()]).norm()
    gap = torch.cat([(found[key] - expected[key]).flatten() for key in expected]).norm()
    assert size > 0 and gap / size <= TOLERANCE


def test_an_odd_number_of_rows_is_gone_through_again_and_again(two: tuple[str, Path]) -> None:
    """Nine rows are two updates of four and one of the last row and the first: in both processes alike."""
    result = json.loads((two[1] / LONG / "result.json").read_text())
    assert result["updates"] == 7
    model = load_file(two[1] / LONG / "model" / "model.safetensors")
    assert all(value.isfinite().all() for value in model.values())


def test_killed_processes_go_on_to_the_same_end(
    two: tuple[str, Path], tmp_path: Path, small_policy: Path, data: Path
) -> None:
    world, folder = two
    if world not in KILLED_IN:
        pytest.skip("two launches each; one data parallel and one divided are enough")
    args = {"max_steps": 5, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    for name, more in (("dies", {"dies_at": 3}), ("again", {})):
        (tmp_path / f"{name}.json").write_text(json.dumps([case(KILLED, small_policy, data, 2, args, **more)]))
        launch(world, WORKER, str(tmp_path / f"{name}.json"), str(tmp_path), succeeds=name == "again")
        assert (tmp_path / KILLED / "checkpoints" / "checkpoint-2").is_dir()
    before, after = (moved(place / KILLED, small_policy) for place in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    results = [json.loads((place / KILLED / "result.json").read_text()) for place in (folder, tmp_path)]
    assert results[0] == results[1]
