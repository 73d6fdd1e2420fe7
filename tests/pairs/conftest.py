"""A tiny model whose truth is known, and a stage that samples from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_kit.data.tasks import running_sums
from rlhf_kit.trainers.config import StageConfig


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
    from rlhf_kit.data.tasks import running_sums_vocabulary
    from rlhf_kit.models.config import Scratch
    from rlhf_kit.models.loading import load_model, load_tokenizer

    torch.manual_seed(0)
    words = tuple(running_sums_vocabulary(5))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Scratch.model_validate({"type": "scratch", "vocabulary": words, **sizes, "max_position_embeddings": 32})
    model, tokenizer = load_model(config), load_tokenizer(config)
    rows = running_sums(60, 2, 5, seed=9)
    ids = tokenizer([f"{row['prompt']} {row['completion']} <eos>" for row in rows], return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(12):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("sums")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stage(fields: dict[str, Any], **changes: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(StageConfig).validate_python({**fields, **changes})


def contents(folder: Path) -> list[bytes]:
    """The files that a stage has written, as bytes."""
    names = ("completions.parquet", "paired.parquet", "unpaired.parquet")
    return [(folder / name).read_bytes() for name in names if (folder / name).is_file()]
