"""The arguments of TRL's and transformers' configurations, read from the source of the installed packages.

Importing TRL takes ten seconds and instantiating its configurations needs the machine that will train (they
refuse bf16 without a GPU), so the dataclasses are parsed, never imported.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_kit.problems import UNSET

_MODULES = {
    "transformers.TrainingArguments": "transformers.training_args",
    "trl.SFTConfig": "trl.trainer.sft_config",
    "trl.DPOConfig": "trl.trainer.dpo_config",
    "trl.KTOConfig": "trl.trainer.kto_config",
    "trl.GRPOConfig": "trl.trainer.grpo_config",
}
_ENUM_MODULES = ("transformers.trainer_utils", "transformers.training_args", "transformers.debug_utils")


@dataclass(frozen=True)
class Argument:
    """A field of a dataclass: its annotation as written, its default (`UNSET` if no literal), its choices."""

    name: str
    annotation: str
    default: Any = UNSET
    choices: tuple[Any, ...] = ()


@cache
def arguments(class_name: str) -> Mapping[str, Argument]:
    """The arguments of a dataclass (`trl.GRPOConfig`) by name, those of its bases included."""
    return _fields(_MODULES[class_name], class_name.rpartition(".")[2])


@cache
def _module(name: str) -> ast.Module:
    """The parsed source of an installed module; the top-level package is looked up, nothing is imported."""
    package, *inner = name.split(".")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed: pip install {package}")
    path = Path(spec.submodule_search_locations[0], *inner).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _fields(module_name: str, class_name: str) -> dict[str, Argument]:
    module = _module(module_name)
    definition = next(n for n in module.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    fields: dict[str, Argument] = {}
    for base in definition.bases:
        origin = _imported_from(module, module_name, ast.unparse(base))
        fields |= _fields(origin, ast.unparse(base)) if origin else {}
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            argument = _argument(statement.target.id, statement)
            if argument is not None:
                fields[argument.name] = argument
    return fields


def _imported_from(module: ast.Module, module_name: str, name: str) -> str | None:
    """The module that a name used in `module` comes from."""
    for statement in module.body:
        if isinstance(statement, ast.ImportFrom) and any(alias.name == name for alias in statement.names):
            if statement.level:
                return ".".join([*module_name.split(".")[: -statement.level], statement.module or ""])
            return _MODULES.get(f"{statement.module}.{name}")
    return None


def _argument(name: str, statement: ast.AnnAssign) -> Argument | None:
    annotation, value = ast.unparse(statement.annotation), statement.value
    if annotation.startswith("ClassVar"):
        return None
    if not (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field")):
        return Argument(name, annotation, _literal(value))
    keywords = {keyword.arg: keyword.value for keyword in value.keywords}
    if _literal(keywords.get("init")) is False:
        return None
    default = _literal(keywords.get("default"))
    factory = keywords.get("default_factory")
    if isinstance(factory, ast.Lambda):
        default = _literal(factory.body)
    elif isinstance(factory, ast.Name) and factory.id in ("list", "dict"):
        default = {"list": [], "dict": {}}[factory.id]
    metadata = keywords.get("metadata")
    items = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
    choices = next((_literal(item) for key, item in items if _literal(key) == "choices"), ())
    return Argument(name, annotation, default, tuple(choices) if isinstance(choices, list) else ())


def _literal(node: ast.expr | None) -> Any:
    try:
        return UNSET if node is None else ast.literal_eval(node)
    except ValueError:
        return UNSET


@cache
def enum_values(name: str) -> tuple[str, ...]:
    """The values of one of transformers' enumerations; empty if it is none."""
    for module in _ENUM_MODULES:
        for statement in _module(module).body:
            if isinstance(statement, ast.ClassDef) and statement.name == name:
                values = (_literal(s.value) for s in statement.body if isinstance(s, ast.Assign))
                return tuple(value for value in values if isinstance(value, str))
    return ()


@cache
def trackers() -> tuple[str, ...]:
    """What `report_to` may name."""
    for statement in _module("transformers.integrations.integration_utils").body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "INTEGRATION_TO_CALLBACK":
            assert isinstance(statement.value, ast.Dict)
            return tuple(str(_literal(key)) for key in statement.value.keys)
    return ()
