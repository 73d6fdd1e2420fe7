"""What every configuration object in a recipe is made of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict

READ = "names a file or model that is read"
SEED_STRIDE = 1_000_003  # between derived seeds: more than rounds, ranks or steps, and far from seeds of a user's own

# A file, a folder or a hub id that is read; "~" is the home folder.
Location = Annotated[str, AfterValidator(os.path.expanduser), READ]
# A file or folder that is written, or of which parts are read.
Place = Annotated[str, AfterValidator(os.path.expanduser)]
# A text, or the file that holds it.
TextOrFile = Annotated[str, READ]


class Config(BaseModel):
    """A validated, immutable part of a recipe; an unknown key or a number that is not finite is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


def files_read(content: Any) -> Iterator[tuple[str, str]]:
    """The files and models on this machine that a configuration names, by field."""
    # `exists` says no to a text that is too long for a path.
    return ((field, value) for field, value in files_named(content) if os.path.exists(value))


def files_named(content: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """The files and models that a configuration names, by field (`data.path`, `rewards.1.path`), there or not."""
    if isinstance(content, Config):
        named = _fields_that_name(type(content))
        parts = {name: (getattr(content, name), name in named) for name in type(content).model_fields}
    elif isinstance(content, Mapping | list | tuple):
        items = content.items() if isinstance(content, Mapping) else enumerate(content)
        parts = {str(name): (value, False) for name, value in items}
    else:
        return
    for name, (value, is_named) in parts.items():
        inner = f"{field}.{name}" if field else name
        values = enumerate(value) if is_named and isinstance(value, list | tuple) else ((None, value),)
        for index, one in values:
            if is_named and isinstance(one, str):
                yield inner if index is None else f"{inner}.{index}", one
            else:
                yield from files_named(one, inner)


@cache
def _fields_that_name(config: type[Config]) -> frozenset[str]:
    fields = config.model_fields.items()
    return frozenset(name for name, field in fields if READ in field.metadata or _is_read(field.annotation))


def _is_read(annotation: Any) -> bool:
    return READ in getattr(annotation, "__metadata__", ()) or any(map(_is_read, get_args(annotation)))
