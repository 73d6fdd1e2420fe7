"""What the stages that learn from fixed rows share: the reference, and the columns that an objective reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn

from rlhf_kit.errors import RunError
from rlhf_kit.models.config import ModelConfig, Pretrained
from rlhf_kit.models.loading import load_copy
from rlhf_kit.models.scorer import Scorer, add_log_prob_head, base_scorer


def reference_scorer(model: Any, start: ModelConfig, named: Pretrained | None, device: torch.device) -> Scorer:
    """The model as it starts: under LoRA its base, else a frozen copy; or the model that the recipe names."""
    if isinstance(model, PeftModel) and named is None:
        return base_scorer(model)
    copy = load_copy(named or start)
    add_log_prob_head(copy)
    return Scorer(cast(nn.Module, copy).to(device), [])


def check_columns(data: Dataset, columns: Sequence[str], objective: str) -> None:
    """Say which columns an objective misses.

    Raises:
        RunError: there is one.
    """
    missing = [name for name in columns if name not in data.column_names]
    if missing:
        raise RunError(
            f"objective {objective} learns from {', '.join(columns)}, and the data have no "
            f"{' and no '.join(missing)}, only {', '.join(data.column_names)}: name them in `columns` of the data"
        )
