"""Turns of a completion: runs of action tokens, with the text of tools or an environment between them.

`turn_ids` (B, T) number the turns of each row from 0; -1 marks tokens outside every turn (not action tokens).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor

from rlhf_kit.credit.steps import spread_to_tokens


def turn_ids(action_mask: Bool[Tensor, "B T"]) -> Int64[Tensor, "B T"]:
    """The number of the run of action tokens that each action token belongs to; -1 elsewhere."""
    before = torch.cat([torch.zeros_like(action_mask[:, :1]), action_mask[:, :-1]], dim=1)
    starts = action_mask & ~before
    return torch.where(action_mask, starts.cumsum(dim=1) - 1, -1)


def place_at_turn_ends(turn_values: Float[Tensor, "B K"], turns: Int[Tensor, "B T"]) -> Float32[Tensor, "B T"]:
    """Each turn's value on the last token of the turn; 0 elsewhere.

    Raises:
        ValueError: if a turn is not below K, or below -1.
    """
    behind = torch.cat([turns[:, 1:], torch.full_like(turns[:, :1], -1)], dim=1)
    return torch.where(turns != behind, spread_to_tokens(turn_values, turns), 0.0)
