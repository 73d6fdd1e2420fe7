"""Offline objectives, one file each. To add one, write the file and name its class in `ObjectiveConfig`.

`dpo` and `kto` are TRL's: their classes only say how TRL's trainers are set up.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlhf_kit.objectives.c3po import C3po
from rlhf_kit.objectives.cringe import Cringe, PairwiseCringe
from rlhf_kit.objectives.cut import Cut
from rlhf_kit.objectives.i_orpo import IOrpo
from rlhf_kit.objectives.implicit import Ce, Nca
from rlhf_kit.objectives.orpo import Orpo
from rlhf_kit.objectives.pmpo import Pmpo
from rlhf_kit.objectives.trl import Dpo, Kto

OwnObjective = Orpo | Cringe | PairwiseCringe | Pmpo | Cut | IOrpo | C3po | Nca | Ce
ObjectiveConfig = Annotated[Dpo | Kto | OwnObjective, Field(discriminator="type")]
