"""A tiny model whose truth is known, and a stage that samples from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_kit.trainers.config import StageConfig

from ..judges.conftest import serve as serve
from ..sums import save_policy_of_sums


@pytest.fixture
def fields(talker_of_sums: Path) -> dict[str, Any]:
    return {
        "type": "pairs",
        "model": {"path": str(talker_of_sums)},
        "data": {"type": "running_sums", "size": 10, "terms": 2, "modulus": 5},
        "generation": {"num_generations": 4, "max_new_tokens": 5, "prompts_at_once": 3},
        "rewards": [
            {"type": "verifier", "verifier": "exact"},
            {"type": "lexical", "measure": {"type": "length", "target": 2}, "weight": 0.25},
        ],
        "select": {"type": "best_worst", "truncated": "keep"},
    }


@pytest.fixture(scope="session")
def talker_of_sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a one-layer Llama that has seen a little of the task."""
    folder = tmp_path_factory.mktemp("sums")
    save_policy_of_sums(folder, 5, 2, updates=12)
    return folder


def stage(fields: dict[str, Any], **changes: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(StageConfig).validate_python({**fields, **changes})


def contents(folder: Path) -> list[bytes]:
    """The files that a stage has written, as bytes."""
    names = ("completions.parquet", "paired.parquet", "unpaired.parquet")
    return [(folder / name).read_bytes() for name in names if (folder / name).is_file()]


def built(folder: Path, fields: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The pairs that a stage writes, and its results."""
    from rlhf_kit.pairs.files import read_rows
    from rlhf_kit.pairs.stage import run_pairs

    made = stage(fields)
    assert [str(problem) for problem in made.problems()] == []
    results = run_pairs(made, folder)
    return read_rows(folder / "paired.parquet"), results
