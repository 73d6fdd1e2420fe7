"""A tiny policy that is right now and then: it has seen a little of running sums."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_kit.data.tasks import running_sums, running_sums_vocabulary
from rlhf_kit.models.config import Scratch
from rlhf_kit.models.loading import load_model, load_tokenizer


def save_policy_of_sums(folder: Path, modulus: int, terms: int, updates: int) -> None:
    """Write a one-layer Llama after some updates on 60 problems."""
    torch.manual_seed(0)
    config = Scratch(
        type="scratch",
        vocabulary=tuple(running_sums_vocabulary(modulus)),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model, tokenizer = load_model(config), load_tokenizer(config)
    rows = running_sums(60, terms, modulus, seed=9)
    ids = tokenizer([f"{row['prompt']} {row['completion']} <eos>" for row in rows], return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(updates):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
