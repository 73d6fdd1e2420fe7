"""YAML as recipes use it: the scalars of YAML 1.2, where 1.1 surprises.

`1e-5` is a number; `no`, `off` and `1:30` are text.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("merge", r"<<", "<"),
)


class Loader(yaml.SafeLoader):
    """YAML's safe loader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


class Dumper(yaml.SafeDumper):
    """Writes text in quotes where YAML 1.1 or 1.2 would take it for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.Node:
        """Unicode's line breaks are escaped: PyYAML would read them back as spaces."""
        style = '"' if any(character in data for character in "\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


Dumper.add_representer(str, Dumper.represent_str)

for _name, _pattern, _first in _SCALARS:
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), list(_first))
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT})$"), list("-+.0123456789"))


def dump(content: Any) -> str:
    """The content as YAML that loads back as it is, by way of OmegaConf too."""
    return yaml.dump(_escaped(content), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def _escaped(node: Any) -> Any:
    """The tree with every literal `${` written so that OmegaConf does not take it for an interpolation."""
    if isinstance(node, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", node)
    if isinstance(node, dict):
        return {key: _escaped(value) for key, value in node.items()}
    return [_escaped(value) for value in node] if isinstance(node, list) else node
