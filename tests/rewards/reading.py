"""Texts as a policy that reads any text would have sampled them, for sources that judge text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.rewards.config import BuildContext
from rlhf_kit.rollout import Rollout, Text
from rlhf_kit.trainers.rollouts import decoded


def reader(folder: Path) -> BuildContext:
    """What a source is built with where the policy is the model in a folder."""
    config = Pretrained(path=str(folder))
    return BuildContext(load_model(config), config, 1.0, torch.device("cpu"), tokenizer=load_tokenizer(config))


def rollout_of_texts(context: BuildContext, prompts: Sequence[Text], texts: Sequence[str]) -> Rollout:
    """The tokens of each text, closed by the token that ends it, as they decode."""
    tokenizer: Any = context.tokenizer
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[place < len(row) for place in range(width)] for row in rows])
    empty = torch.zeros(len(rows), 1, dtype=torch.long)
    return decoded(tokenizer, Rollout(list(prompts), list(texts), empty, empty.bool(), ids, mask, mask))
