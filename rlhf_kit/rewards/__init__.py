"""Reward sources, one file each: its configuration and its class.

To add one, write the file and name its configuration in `RewardConfig`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlhf_kit.rewards.function import FunctionConfig
from rlhf_kit.rewards.implicit_prm import ImplicitPrmConfig
from rlhf_kit.rewards.turns import TurnsConfig
from rlhf_kit.rewards.verifier import VerifierConfig

RewardConfig = Annotated[FunctionConfig | VerifierConfig | ImplicitPrmConfig | TurnsConfig, Field(discriminator="type")]
