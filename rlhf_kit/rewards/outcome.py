"""One score a completion, on its last action token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf_kit.credit import place_at_last
from rlhf_kit.rollout import Rollout, Status, TokenRewards


def outcome_rewards(scores: Sequence[float | None], rollout: Rollout) -> TokenRewards:
    """Token rewards (B, T) of one score a row.

    `None` means a row of another task (not applicable); a score that is not finite means that judging failed. Both
    leave the row's rewards at 0 and are told apart by its status.
    """
    values = torch.tensor([0.0 if score is None else float(score) for score in scores])
    status = torch.full(values.shape, int(Status.OK))
    status[~values.isfinite()] = int(Status.FAILED)
    status[torch.tensor([score is None for score in scores], dtype=torch.bool)] = int(Status.NOT_APPLICABLE)
    values = torch.where(status == Status.OK, values, 0.0).to(rollout.action_mask.device)
    return TokenRewards(
        tokens=place_at_last(values, rollout.action_mask),
        status=status.to(rollout.action_mask.device),
    )
