"""Reward sources, one file each: its configuration and its class.

To add one, write the file and name its configuration in `RewardConfig`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlhf_kit.rewards.decomposed import DecomposedConfig
from rlhf_kit.rewards.dpo_implicit import DpoImplicitConfig
from rlhf_kit.rewards.follow_up import FollowUpConfig
from rlhf_kit.rewards.function import FunctionConfig
from rlhf_kit.rewards.gap import GapConfig
from rlhf_kit.rewards.hindsight import HindsightConfig
from rlhf_kit.rewards.implicit_prm import ImplicitPrmConfig
from rlhf_kit.rewards.lexical import LexicalConfig
from rlhf_kit.rewards.llm_critic import LlmCriticConfig
from rlhf_kit.rewards.segment_model import SegmentModelConfig
from rlhf_kit.rewards.turns import TurnsConfig
from rlhf_kit.rewards.verifier import VerifierConfig
from rlhf_kit.rewards.yes_no import YesNoConfig

RewardConfig = Annotated[
    FunctionConfig
    | VerifierConfig
    | DpoImplicitConfig
    | FollowUpConfig
    | GapConfig
    | HindsightConfig
    | ImplicitPrmConfig
    | LexicalConfig
    | LlmCriticConfig
    | SegmentModelConfig
    | TurnsConfig
    | DecomposedConfig
    | YesNoConfig,
    Field(discriminator="type"),
]
