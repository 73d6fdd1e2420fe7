"""What every configuration object in a recipe is made of."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

# A file, a folder or a hub id; "~" is the home folder.
Location = Annotated[str, AfterValidator(os.path.expanduser)]


class Config(BaseModel):
    """A validated, immutable part of a recipe; an unknown key or a number that is not finite is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
