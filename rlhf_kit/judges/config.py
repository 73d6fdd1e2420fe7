"""The judges that a recipe can name."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlhf_kit.judges.local import Local, Policy
from rlhf_kit.judges.server import Server

JudgeConfig = Annotated[Server | Local | Policy, Field(discriminator="type")]
