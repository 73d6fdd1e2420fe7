"""Small models with something to say, and stages that evaluate them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from rlhf_kit.evals.context import EvalContext
from rlhf_kit.evals.stage import Eval
from rlhf_kit.recipe_errors import validate
from rlhf_kit.trainers.sampling import sample_completions

torch.set_num_threads(1)
datasets.disable_progress_bars()
logging.disable_progress_bar()


@pytest.fixture(scope="session")
def prm(small_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small policy with other weights: a process reward model of it."""
    folder = tmp_path_factory.mktemp("prm")
    model = AutoModelForCausalLM.from_pretrained(small_policy)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(small_policy).save_pretrained(folder)
    return folder


@pytest.fixture
def stage(small_policy: Path, prm: Path) -> Callable[..., Eval]:
    """An `eval` stage with the implicit PRM as its source; keyword arguments are its fields."""

    def make(**fields: Any) -> Eval:
        content = {
            "type": "eval",
            "model": {"path": str(small_policy)},
            "rewards": [{"type": "implicit_prm", "path": str(prm), "beta": 0.5}],
            "batch_size": 3,
            **fields,
        }
        valid, problems = validate(Eval, content)
        assert not problems, [str(problem) for problem in problems]
        return valid

    return make


@pytest.fixture
def context(tmp_path: Path) -> Callable[..., EvalContext]:
    """What an evaluation of a stage works with."""

    def make(stage: Eval, functions: Mapping[str, Callable[..., Any]] | None = None) -> EvalContext:
        return EvalContext(stage, tmp_path / "stage", sampler=sample_completions, functions=functions)

    return make


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Data of rows in a file."""

    def write(rows: Sequence[Mapping[str, Any]], name: str = "rows") -> dict[str, Any]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"type": "jsonl", "path": str(path)}

    return write
