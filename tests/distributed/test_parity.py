"""Two processes under DDP, ZeRO-2 and ZeRO-3 learn what one process learns from the same rollouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .conftest import WORLDS

ROWS_PER_UPDATE = 16
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
LORA = {"peft": {"type": "lora", "r": 2, "alpha": 8}}


def prm(**fields: Any) -> dict[str, Any]:
    return {"type": "implicit_prm", "beta": 0.5, "online": {"learning_rate": 1.0, **fields.pop("online", {})}, **fields}


def decomposed(**fields: Any) -> dict[str, Any]:
    return {"type": "decomposed", "segments": {"by": "token"}, "online": {"learning_rate": 1.0}, **fields}


CASES: dict[str, dict[str, Any]] = {
    "value head and online PRM": {
        "rewards": [prm()],
        "credit": {"estimator": "gae", "kl": {"coefficient": 0.05}},
    },
    "LoRA, accumulated, two iterations, chat template": {
        "model": {**LORA, "chat_template": CHAT},
        "data": {"chat": True},
        "rewards": [prm(reference="initial", offset="prompt")],
        "credit": {"estimator": "gae", "kl": {"coefficient": 0.05, "where": "loss", "estimator": "k3"}},
        "args": {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 4},
    },
    "PRM in the policy's engine": {
        "rewards": [prm(online={"order": "with_policy"})],
        "credit": {"estimator": "gae"},
    },
    "LoRA PRM in the policy's engine, accumulated, prompts outside the band masked": {
        "model": LORA,
        "rewards": [prm(online={"order": "with_policy"})],
        "credit": {"estimator": "gae"},
        "accuracy_band": {"low": 0.2, "high": 0.8},
        "args": {"gradient_accumulation_steps": 2},
    },
    "prime, average as reference, prompts outside the band masked": {
        "rewards": [prm(reference="ema")],
        "credit": {"estimator": "prime"},
        "accuracy_band": {"low": 0.2, "high": 0.8},
        "truncation": {"policy": "mask"},
    },
    "completions of other lengths in each process": {
        "rewards": [prm()],
        "credit": {"estimator": "gae", "kl": {"coefficient": 0.05}},
        "args": {"max_completion_length": 32},
    },
    "bfloat16": {
        "rewards": [prm()],
        "credit": {"estimator": "gae", "kl": {"coefficient": 0.05}},
        "args": {"bf16": True},
    },
    "segments that are sampled, with a local signal": {
        "rewards": [prm(), decomposed(sampled=2, local={"source": "implicit_prm"})],
        "credit": {"estimator": "prime"},
    },
    "LoRA, segments, accumulated": {
        "model": LORA,
        "rewards": [decomposed()],
        "credit": {"estimator": "gae"},
        "args": {"gradient_accumulation_steps": 2},
    },
    "LoRA, prime, average as reference": {
        "model": LORA,
        "rewards": [prm(reference="ema")],
        "credit": {"estimator": "prime", "horizon": "immediate"},
    },
}

# Of an update's size, and of a token's rewards, returns and advantages (up to 5). In bfloat16 batches of another shape
# round otherwise, by up to 2 ** -8 an operation.
TOLERANCES = {name: (1e-3, 1e-5) for name in CASES} | {"bfloat16": (0.2, 0.2)}


def can_run(name: str, world: str) -> bool:
    """transformers refuses bfloat16 for DeepSpeed on a CPU."""
    return CASES[name].get("args", {}).get("bf16") is None or world == "cpu_ddp"


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of prompts of several lengths, each once."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    digits = [(i % 7, i // 7, 3 * i % 7, 5 * i % 7)[: 2 + i % 3] for i in range(40)]
    file.write_text("".join(json.dumps({"prompt": f"{' '.join(map(str, row))} ="}) + "\n" for row in digits))
    return file


BROKEN = "a loss that is not finite in one process"


def case(name: str, policy: Path, prompts: Path, processes: int, replay: Path | None = None) -> dict[str, Any]:
    """A case of the plan, with the same rows an update in every world and TRL's default of checkpointing."""
    fields = CASES[name]
    accumulated = fields.get("args", {}).get("gradient_accumulation_steps", 1)
    args = {
        "per_device_train_batch_size": ROWS_PER_UPDATE // accumulated // processes,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 3,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        **fields.get("args", {}),
    }
    stage = {
        "type": "ppo",
        **{key: value for key, value in fields.items() if key != "args"},
        "model": {"path": str(policy), **fields.get("model", {})},
        "data": {"type": "jsonl", "path": str(prompts), **fields.get("data", {})},
        "rewards": [{"type": "function", "function": "odd", "bounded": True}, *fields["rewards"]],
        "trainer": {"args": args},
    }
    number = str(list(CASES).index(name))
    return {"name": number, "stage": stage, **({"replay": str(replay / f"{number}.rollouts.json")} if replay else {})}


Outcome = Callable[[str], tuple[dict[str, torch.Tensor], dict[str, Any]]]


def outcomes(folder: Path) -> Outcome:
    def read(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        number = BROKEN if name == BROKEN else list(CASES).index(name)
        return load_file(folder / f"{number}.safetensors"), json.loads((folder / f"{number}.json").read_text())

    return read


@pytest.fixture(scope="session")
def one_folder(alone: Any, small_policy: Path, prompts: Path) -> Path:
    return alone([case(name, small_policy, prompts, 1) for name in CASES])


@pytest.fixture(scope="session", params=WORLDS)
def two(
    request: pytest.FixtureRequest, together: Any, small_policy: Path, prompts: Path, one_folder: Path
) -> tuple[str, Outcome]:
    cases = [case(name, small_policy, prompts, 2, one_folder) for name in CASES if can_run(name, request.param)]
    broken = case("value head and online PRM", small_policy, prompts, 2)
    cases.append({**broken, "name": BROKEN, "nan_at": 1})
    return request.param, outcomes(together(request.param, cases))


@pytest.fixture(scope="session")
def one(one_folder: Path) -> Outcome:
    return outcomes(one_folder)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_does(name: str, one: Outcome, two: tuple[str, Outcome]) -> None:
    world, outcome = two
    if not can_run(name, world):
        pytest.skip("transformers refuses bfloat16 for DeepSpeed on a CPU")
    update, token = TOLERANCES[name]
    (expected, alone), (found, together) = one(name), outcome(name)
    stage = {"cpu_ddp": None, "zero2": 2, "zero3": 3}[world]
    assert (alone["world_size"], alone["distributed_type"]) == (1, "NO")
    assert (together["world_size"], together["zero_stage"]) == (2, stage)
    assert together["distributed_type"] == ("MULTI_CPU" if stage is None else "DEEPSPEED")
    assert together["checkpointing"] and together["steps"] == alone["steps"] >= 3

    assert found.keys() == expected.keys()
    for key in expected:
        if key.startswith("moved."):
            size = expected[key].norm()
            assert size > 0, key
            assert (found[key] - expected[key]).norm() / size <= update, key
        else:
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=token, msg=key)


def test_processes_may_have_completions_of_other_lengths(two: tuple[str, Outcome]) -> None:
    first, second = two[1]("completions of other lengths in each process")[1]["widths"]
    assert first != second  # or the case of that name shows nothing


def test_a_loss_that_is_not_finite_in_one_process_breaks_no_weight(two: tuple[str, Outcome]) -> None:
    moved, facts = two[1](BROKEN)
    assert facts["steps"] == 3 and facts["skipped"] == 1
    assert all(value.isfinite().all() and value.norm() > 0 for key, value in moved.items() if key.startswith("moved."))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_log_what_one_does(name: str, one: Outcome, two: tuple[str, Outcome]) -> None:
    world, outcome = two
    if name == "bfloat16" or not can_run(name, world):
        pytest.skip("what is logged in bfloat16 differs in its last digits")
    ours = ("rewards/", "credit/", "prm/", "value/", "kl", "reward", "completions/", "accuracy")
    for before, after in zip(one(name)[1]["logs"], outcome(name)[1]["logs"], strict=True):
        compared = [key for key in before if key.startswith(ours)]
        assert compared
        for key in compared:
            assert after[key] == pytest.approx(before[key], abs=2e-4, rel=1e-3), key
