"""pydantic's validation errors as problems of a recipe: paths as the file has them, and remedies."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from rlhf_kit.problems import UNSET, Problem, did_you_mean, listed

_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "str": "text",
    "dict": "a mapping",
    "model": "a mapping",
    "model_attributes": "a mapping",
    "tuple": "a list",
    "list": "a list",
    "none_required": "null",
}


def validate(annotation: Any, data: Any) -> tuple[Any, list[Problem]]:
    """The validated object, or `None` and every problem with `data`."""
    try:
        valid = TypeAdapter(annotation).validate_python(data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    else:
        mistaken = list(_numbers_from_booleans(valid, data, ""))
        return (None if mistaken else valid), mistaken
    located = [(_locate(annotation, item["loc"], data), item) for item in errors]
    problems: dict[str, list[Problem]] = {}
    for place, item in located:
        problems.setdefault(place.path, []).append(_problem(place, item))
    paths = [place.path for place, _ in located]
    return None, [problem for path in dict.fromkeys(paths) for problem in _merge(problems[path], path, paths)]


def _numbers_from_booleans(valid: Any, data: Any, path: str) -> Iterator[Problem]:
    """Where `true` or `false` stands for a number: pydantic reads them as 1 and 0."""
    if isinstance(data, bool):
        if not isinstance(valid, bool):
            yield Problem(path, "expected a number, got true or false", data, "write a number")
        return
    items: Any = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        inner = getattr(valid, key) if isinstance(valid, BaseModel) else valid[key]
        yield from _numbers_from_booleans(inner, value, f"{path}.{key}" if path else str(key))


class _Place:
    """Where in the data, and in the schema, an error happened."""

    def __init__(self, annotation: Any, data: Any) -> None:
        self.annotation: Any = annotation
        self.value: Any = data
        self.parts: list[str] = []
        self.owner: type[BaseModel] | None = None

    @property
    def path(self) -> str:
        return ".".join(self.parts)

    def enter(self, part: str | int, annotation: Any) -> None:
        self.parts.append(str(part))
        self.annotation = annotation
        try:
            self.value = self.value[part]
        except (KeyError, IndexError, TypeError):
            self.value = UNSET


def _locate(annotation: Any, loc: Sequence[str | int], data: Any) -> _Place:
    """Follow pydantic's location through the schema, dropping the parts that only name a union's member."""
    place = _Place(annotation, data)
    for part in loc:
        if part == "[key]":  # the key of a mapping, not its value
            place.value = loc[-2]
            break
        members, discriminator = _members(place.annotation)
        if discriminator:
            place.annotation = next(m for m in members if part in _tags([m], discriminator))
            continue
        if len(members) > 1:
            place.annotation = next((m for m in members if _label(m) == part), members[0])
            continue
        member = members[0]
        if isinstance(member, type) and issubclass(member, BaseModel):
            place.owner = member
            field = member.model_fields.get(str(part))
            place.enter(part, _annotated(field) if field else Any)
        else:
            arguments = [argument for argument in get_args(member) if argument is not Ellipsis]
            place.enter(part, arguments[-1] if arguments else Any)
    return place


def _annotated(field: FieldInfo) -> Any:
    return Annotated[field.annotation, field] if field.discriminator else field.annotation


def _members(annotation: Any) -> tuple[list[Any], str | None]:
    """The members of a union (one, if it is none; `None` left out), and the key that tells them apart."""
    discriminator = None
    while get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
        for item in metadata:
            discriminator = getattr(item, "discriminator", None) or discriminator
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not types.NoneType]
        if len(members) == 1:
            inner, inner_discriminator = _members(members[0])
            return inner, discriminator or inner_discriminator
        return members, discriminator
    return [annotation], None


def _label(member: Any) -> str:
    """What pydantic calls a union's member in a location."""
    if get_origin(member) is Literal:
        return f"literal[{','.join(repr(value) for value in get_args(member))}]"
    return member.__name__ if isinstance(member, type) and get_origin(member) is None else str(member)


def _problem(place: _Place, error: Mapping[str, Any]) -> Problem:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(place.path, "unknown key", place.value, _known_keys(place))
    if kind == "missing":
        return Problem(place.path, "required key is missing", remedy=f"add `{place.parts[-1]}: ...`")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _unknown_type(place, context)
    if kind == "literal_error":
        choices = [str(choice) for choice in get_args(_members(place.annotation)[0][0])]
        choices = choices or [context["expected"]]
        near = did_you_mean(place.value, choices)
        remedy = f"{near} (choices: {listed(choices)})".strip()
        return Problem(place.path, "not a valid choice", place.value, remedy)
    if kind == "string_pattern_mismatch" and (place.path == "name" or "[key]" in error["loc"]):
        return Problem(place.path, "must be a plain name", place.value, "use letters, digits, '-' and '_'")
    if kind == "value_error":
        return Problem(place.path, str(context["error"]), _simple(place.value))
    expected = _expected(kind)
    if expected:
        return Problem(place.path, f"expected {expected}, got {describe(place.value)}", *_hint(place, expected))
    if kind == "too_short":
        return Problem(place.path, f"needs at least {context['min_length']} item", place.value)
    return Problem(place.path, error["msg"].replace("Input should", "must"), _simple(place.value))


def _unknown_type(place: _Place, context: Mapping[str, Any]) -> Problem:
    members, key = _members(place.annotation)
    key = key or "type"
    choices = _tags(members, key)
    path = ".".join([*place.parts, key])
    if "tag" not in context:
        return Problem(path, "required key is missing", remedy=f"choose one of {listed(choices)}")
    tag = place.value[key]
    near = did_you_mean(tag, choices)
    return Problem(path, "unknown type", tag, f"{near} (choices: {listed(choices)})".strip())


def _known_keys(place: _Place) -> str:
    keys = list(place.owner.model_fields) if place.owner else []
    return did_you_mean(place.parts[-1], keys, f"the keys here are {listed(keys)}")


def _expected(kind: str) -> str | None:
    if kind == "int_from_float":
        return "an integer"
    for ending in ("_type", "_parsing", ""):
        if kind.endswith(ending) and kind.removesuffix(ending) in _EXPECTED:
            return _EXPECTED[kind.removesuffix(ending)]
    return None


def _hint(place: _Place, expected: str) -> tuple[Any, str]:
    """The value to show and the remedy for a wrong type."""
    value = _simple(place.value)
    if expected == "text" and isinstance(place.value, bool | int | float):
        return value, f'put it in quotes: "{place.value}"'
    if expected == "a list" and not isinstance(place.value, list | Mapping):
        return (
            value,
            f"write [{place.value}]" if place.value is not None else "write [...] or leave the key out",
        )
    if expected == "a mapping":
        return value, _mapping_hint(place)
    return value, f"write {expected}"


def _mapping_hint(place: _Place) -> str:
    members, discriminator = _members(place.annotation)
    models = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
    if isinstance(place.value, str) and any("path" in model.model_fields for model in models):
        types_hint = f"type: {_tags(models, discriminator)[0]}, " if discriminator else ""
        return f"write {{{types_hint}path: {place.value}}}"
    if discriminator:
        return f"write {{{discriminator}: ..., ...}} with one of {listed(_tags(models, discriminator))}"
    return f"its keys are {listed(models[0].model_fields)}" if models else "write `key: value` lines under it"


def _tags(models: Sequence[type[BaseModel]], discriminator: str) -> list[str]:
    return [tag for model in models for tag in get_args(model.model_fields[discriminator].annotation)]


def _simple(value: Any) -> Any:
    """The value where it fits into a line; a large mapping is no help there."""
    return UNSET if isinstance(value, Mapping) and len(value) > 3 else value


def describe(value: Any) -> str:
    """The YAML kind of a value in words."""
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}
    names |= {dict: "a mapping", list: "a list", tuple: "a list"}
    return names.get(type(value), "nothing" if value is UNSET else type(value).__name__)


def _merge(problems: list[Problem], path: str, paths: Sequence[str]) -> list[Problem]:
    """At most one problem a path: a plain union reports each member, a list also its bad items' absence."""
    if path and any(other.startswith(f"{path}.") for other in paths):
        return []
    first = problems[0]
    expected = [problem.message for problem in problems if problem.message.startswith("expected ")]
    if len(expected) < 2:
        return [first]
    wanted = " or ".join(dict.fromkeys(text.removeprefix("expected ").split(", got ")[0] for text in expected))
    got = first.message.split(", got ")[1]
    return [Problem(path, f"expected {wanted}, got {got}", first.value, f"write {wanted}")]
