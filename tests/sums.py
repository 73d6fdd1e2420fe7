"""Tiny policies that have seen a little of a generated task: running sums, or any other in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_kit.data.tasks import running_sums, running_sums_vocabulary
from rlhf_kit.models.config import Scratch
from rlhf_kit.models.loading import load_model, load_tokenizer


def save_policy_of_sums(folder: Path, modulus: int, terms: int, updates: int) -> None:
    """Write a one-layer Llama after some updates on 60 problems."""
    save_policy(folder, running_sums_vocabulary(modulus), running_sums(60, terms, modulus, seed=9), updates)


def save_policy(
    folder: Path, vocabulary: Sequence[str], rows: Sequence[Mapping[str, Any]], updates: int, positions: int = 32
) -> None:
    """Write a one-layer Llama after some updates on rows that are equally long."""
    torch.manual_seed(0)
    config = Scratch(
        type="scratch",
        vocabulary=tuple(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=positions,
    )
    model, tokenizer = load_model(config), load_tokenizer(config)
    ids = tokenizer([f"{row['prompt']} {row['completion']} <eos>" for row in rows], return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(updates):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
