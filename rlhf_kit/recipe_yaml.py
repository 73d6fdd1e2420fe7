"""Reading a recipe's YAML, its overrides and its interpolations into plain Python, before any validation."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from rlhf_kit.problems import Problem, RecipeError, did_you_mean, listed
from rlhf_kit.yaml12 import Loader

REFERENCE = re.compile(r"\$\{stages\.([^.{}\s]+)\.(\w+)\}")
_MERGE = "tag:yaml.org,2002:merge"


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        RecipeError: the file is missing, not UTF-8, not YAML, empty, not a mapping, or has duplicate keys.
    """
    try:
        node = yaml.compose(_read_text(path), Loader=Loader)
        if node is None:
            raise RecipeError(path, [Problem("", "the file is empty", remedy="write at least `type: ...`")])
        problems = list(_key_problems(node))
        if problems:
            raise RecipeError(path, problems)
        content = Loader("").construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(path, [_syntax_problem(error)]) from None
    if content is None:
        raise RecipeError(path, [Problem("", "the file is empty", remedy="write at least `type: ...`")])
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else "a single value"
        remedy = "a recipe is a mapping: `type: ...` of one stage, or `stages: {name: ...}`"
        raise RecipeError(path, [Problem("", f"expected a mapping of keys to values, got {kind}", remedy=remedy)])
    return content


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise RecipeError(path, [Problem("", "is a folder", remedy="name a recipe file")])
    if not path.exists():
        siblings = [file.name for pattern in ("*.yaml", "*.yml") for file in path.parent.glob(pattern)]
        close = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.5)
        remedy = f"did you mean {listed(close)}?" if close else "check the path and the current directory"
        if not close and siblings:
            remedy = f"the folder has {listed(sorted(siblings)[:8])}"
        raise RecipeError(path, [Problem("", "no such recipe file", remedy=remedy)])
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at offset {error.start} is not UTF-8"
        raise RecipeError(path, [Problem("", found, remedy="save the file as UTF-8")]) from None
    except OSError as error:
        problem = Problem("", f"cannot be read: {error.strerror}", remedy="check the file's permissions")
        raise RecipeError(path, [problem]) from None


def _syntax_problem(error: Exception) -> Problem:
    if isinstance(error, RecursionError):
        return Problem("", "nested too deeply", remedy="an anchor must not contain itself")
    mark = getattr(error, "problem_mark", None)
    said = (getattr(error, attribute, None) for attribute in ("context", "problem", "reason"))
    what = ", ".join(str(part) for part in said if part) or str(error)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return Problem("", f"{where}not valid YAML: {what}", remedy="check indentation, colons and quotes there")


def _key_problems(root: yaml.Node) -> Iterator[Problem]:
    """Duplicate keys, keys that are not text and anchors that contain themselves, over the whole document."""
    seen: set[int] = set()

    def walk(node: yaml.Node, path: str, above: tuple[int, ...]) -> Iterator[Problem]:
        if id(node) in above:
            yield Problem(path, "an anchor that contains itself", remedy="write the part out")
        if id(node) in seen:
            return
        seen.add(id(node))
        above = (*above, id(node))
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                yield from walk(item, _join(path, index), above)
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                if key.tag == _MERGE:
                    yield from walk(value, path, above)
                    continue
                name, line = str(key.value), key.start_mark.line + 1
                if key.tag != "tag:yaml.org,2002:str":
                    yield Problem(path, f"line {line}: a key must be text", key.value, "put the key in quotes")
                elif name in lines:
                    twice = f"duplicate key, on lines {lines[name]} and {line}"
                    yield Problem(_join(path, name), twice, remedy="keep one of the two")
                lines.setdefault(name, line)
                yield from walk(value, _join(path, name), above)

    yield from walk(root, "", ())


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """The recipe after each of `key=value` (the value is YAML; nothing is null) and `~key` (delete).

    They are applied in order. Keys are dotted paths; numbers index lists. A value replaces what was there.
    Keys that no stage knows are left for validation, which names the nearest.
    """
    problems = list(_grammar_problems(content))
    if problems:
        return content, problems
    config = OmegaConf.create(content)
    for override in overrides:
        problem = _delete(config, override) if override.startswith("~") else _set(config, override)
        problems += [problem] if problem else []
    return OmegaConf.to_container(config, resolve=False), problems  # pyright: ignore[reportReturnType]


def _set(config: DictConfig, override: str) -> Problem | None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[^\s.=]+(\.[^\s.=]+)*", key):
        remedy = "write key=value, e.g. trainer.args.max_steps=10, or ~key to delete"
        return Problem("", "malformed override", override, remedy)
    try:
        node = yaml.compose(text, Loader=Loader)
        problems = [] if node is None else list(_key_problems(node))
        value = None if node is None else Loader("").construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        problems, value = [_syntax_problem(error)], None
    problems = problems or list(_grammar_problems({key: value}))
    if problems:
        return Problem(key, f"override: {problems[0].message}", text, "the value must be YAML; quote it if need be")
    *parents, last = key.split(".")
    missing = _missing_item(config, [*parents, last], setting=True)
    if missing is None:
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    return missing


def _delete(config: DictConfig, override: str) -> Problem | None:
    parts = override[1:].split(".")
    if "=" in override or not all(parts):
        return Problem("", "malformed override", override, "to delete a key write ~key, without a value")
    missing = _missing_item(config, parts, setting=False)
    if missing is None:
        parent = _child(config, parts[:-1])
        del parent[int(parts[-1]) if isinstance(parent, ListConfig) else parts[-1]]
    return missing


def _child(node: Any, parts: Sequence[str]) -> Any:
    """The node at a path; interpolations on the way are followed."""
    for part in parts:
        node = node[int(part) if isinstance(node, ListConfig) else part]
    return node


def _missing_item(config: DictConfig, parts: Sequence[str], setting: bool) -> Problem | None:
    """What keeps a path from being set (a list has no such item) or deleted (nothing is there)."""
    node: Any = config
    for depth, part in enumerate(parts):
        path, here = ".".join(parts), ".".join(parts[:depth]) or "the recipe"
        if isinstance(node, ListConfig):
            if not part.isdecimal() or int(part) >= len(node):
                remedy = f"{here} has {len(node)} items, numbered from 0"
                return Problem(path, f"override: {here} is a list without item '{part}'", remedy=remedy)
        elif not isinstance(node, DictConfig) or part not in list(node):
            if setting:
                return _missing_stage(config, parts) if depth == 1 and parts[0] == "stages" else None
            keys = [str(key) for key in node] if isinstance(node, DictConfig) else []
            return Problem(path, "override: nothing to delete there", remedy=did_you_mean(part, keys))
        if depth == len(parts) - 1:
            return None
        try:
            node = _child(node, [part])
        except OmegaConfBaseException as error:
            return Problem(".".join(parts[: depth + 1]), f"override: {_first_line(error)}")
    return None


def _missing_stage(config: DictConfig, parts: Sequence[str]) -> Problem | None:
    """A dotted path into a stage that the recipe does not have; a whole new stage may be given."""
    if len(parts) == 2:
        return None
    names = [str(name) for name in config.stages]
    remedy = did_you_mean(parts[1], names, f"the stages are {listed(names)}")
    return Problem(".".join(parts), f"override: no stage '{parts[1]}'", remedy=remedy)


def resolve(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The recipe with every interpolation replaced by its value; what has none becomes null and a problem."""
    problems = list(_grammar_problems(content))
    if problems:
        return dict(content), problems
    config = OmegaConf.create(dict(content))
    broken = list(_broken(config, OmegaConf.to_container(config, resolve=False), ""))
    for _, parent, key in broken:
        parent[key] = None
    problems = [problem for problem, _, _ in broken]
    return OmegaConf.to_container(config, resolve=True), problems  # pyright: ignore[reportReturnType]


def _grammar_problems(node: Any, path: str = "") -> Iterator[Problem]:
    for where, text in _strings(node, path):
        if "${" in text:
            try:
                OmegaConf.create([text])
            except GrammarParseError:
                remedy = "write ${key.of.the.recipe} or ${oc.env:VARIABLE}; a literal '${' is written '\\${'"
                yield Problem(where, "malformed interpolation", text, remedy)


def _broken(config: DictConfig | ListConfig, raw: Any, path: str) -> Iterator[tuple[Problem, Any, Any]]:
    """The leaves whose interpolation fails or that still read `???`, each with its parent and its key there."""
    for key in range(len(config)) if isinstance(config, ListConfig) else list(config):
        where = _join(path, key)
        if OmegaConf.is_missing(config, key):
            yield Problem(where, "has no value yet", raw[key], f"give it one: {where}=..."), config, key
            continue
        try:
            child = config[key]  # pyright: ignore[reportArgumentType]
        except OmegaConfBaseException as error:
            yield Problem(where, _first_line(error), raw[key], _interpolation_remedy(str(error))), config, key
            continue
        if isinstance(child, DictConfig | ListConfig) and not OmegaConf.is_interpolation(config, key):
            yield from _broken(child, raw[key], where)


def _first_line(error: Exception) -> str:
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.sub(r"^\w+ (?:raised )?while resolving interpolation: ", "", line).strip('"')


def _interpolation_remedy(error: str) -> str:
    if "Environment variable" in error:
        return "set it, or give a default: ${oc.env:NAME,default}"
    if "Unsupported interpolation type" in error:
        return "use a key of the recipe or oc.env"
    if "Recursive" in error:
        return "give one of the keys a value"
    return "name an existing key by its full path from the top, e.g. ${seed}"


def _strings(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in the tree with its path."""
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _strings(value, _join(path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _strings(value, _join(path, index))


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def references(content: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Each `${stages.NAME.OUTPUT}` as (path of the field, its text, NAME, OUTPUT)."""
    for path, text in _strings(content):
        for match in REFERENCE.finditer(text):
            yield path, text, match[1], match[2]
