"""Builders of pairs, one file each: its configuration and its class.

To add one, write the file and name its configuration here.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlhf_kit.pairs.corrupt_prompt import CorruptPrompt
from rlhf_kit.pairs.counterfactual import Counterfactual
from rlhf_kit.pairs.feedback_mining import FeedbackMining
from rlhf_kit.pairs.hindsight import Hindsight
from rlhf_kit.pairs.sampled import Sampled
from rlhf_kit.pairs.self_reference import SelfReference

BuilderConfig = Annotated[
    Sampled | CorruptPrompt | Counterfactual | FeedbackMining | Hindsight | SelfReference,
    Field(discriminator="type"),
]
