"""Pure tensor maths from rewards to advantages.

Rows are completions and columns are completion tokens, `(B, T)`. A mask is True on action tokens; it may have
holes (tool and environment text), and successive action tokens are neighbours in time. What lies outside the
mask is never read, whatever it holds, and results are exactly 0 there. Arithmetic is float32 whatever the
inputs' dtype.

`rlhf_kit.credit.spans` takes rewards from characters to tokens.
"""

from __future__ import annotations

from rlhf_kit.credit.groups import group_centred, prime_advantages, prime_process_advantages, rloo
from rlhf_kit.credit.kl import AdaptiveKl, kl_penalty
from rlhf_kit.credit.masks import last_action_index, masked_mean, masked_var, place_at_last, place_on_actions
from rlhf_kit.credit.returns import gae, reinforce_returns
from rlhf_kit.credit.steps import min_form_returns, place_at_step_ends, spread_to_tokens, steps_present, sum_by_step
from rlhf_kit.credit.turns import place_at_turn_ends, turn_ids
from rlhf_kit.credit.whitening import whiten

__all__ = [
    "AdaptiveKl",
    "gae",
    "group_centred",
    "kl_penalty",
    "last_action_index",
    "masked_mean",
    "masked_var",
    "min_form_returns",
    "place_at_last",
    "place_at_step_ends",
    "place_at_turn_ends",
    "place_on_actions",
    "prime_advantages",
    "prime_process_advantages",
    "reinforce_returns",
    "rloo",
    "spread_to_tokens",
    "steps_present",
    "sum_by_step",
    "turn_ids",
    "whiten",
]
