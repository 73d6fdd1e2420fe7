"""Whether an update may be applied, agreed by all ranks."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from rlhf_kit.errors import RunError
from rlhf_kit.trainers.rollouts import Ranks


class UpdateGuard:
    """Follows one window of accumulated gradients after the other.

    Attributes:
        skipped: updates that were not applied because something was not finite.
    """

    def __init__(self, limit: int, ranks: Ranks) -> None:
        self.skipped = 0
        self._limit = limit
        self._ranks = ranks
        self._broken = False
        self._live: Tensor | None = None

    def loss_is_finite(self, loss: Tensor) -> bool:
        """Whether the loss of this micro-batch is finite on every rank, asked before its backward pass."""
        broken = self._ranks.sum((~torch.isfinite(loss.detach())).float().reshape(1)).item() > 0
        self._broken |= broken
        return not broken

    def add_live_tokens(self, mask: Bool[Tensor, "B T"]) -> None:
        """Count the tokens that a micro-batch's losses are taken over."""
        count = mask.sum().reshape(1).float()
        self._live = count if self._live is None else self._live + count

    def close_window(self, grad_norm: float | None, step: int) -> Literal["sound", "broken", "empty"]:
        """The verdict on the accumulated gradient: `empty` if no token of any rank was live.

        Raises:
            RunError: more than `limit` updates were broken.
        """
        broken = self._broken or not (grad_norm is None or math.isfinite(grad_norm))
        empty = self._live is not None and self._ranks.sum(self._live).item() == 0
        self._broken, self._live = False, None
        if not broken:
            return "empty" if empty else "sound"
        self.skipped += 1
        if self.skipped > self._limit:
            raise RunError(
                f"{self.skipped} updates were skipped because the loss or its gradient was not finite (step {step}, "
                f"gradient norm {grad_norm}); lower the learning rate or clip more (max_grad_norm), look for extreme "
                "rewards in metrics.jsonl, or raise max_skipped_steps"
            )
        return "broken"
