"""Recipes: YAML and overrides in, a validated object out, every error at once, in the recipe's words."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_kit.evals.stage import Eval
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.problems import Problem, RecipeError, did_you_mean, listed
from rlhf_kit.recipe_checks import check_links, check_stage
from rlhf_kit.recipe_errors import describe, validate
from rlhf_kit.recipe_yaml import REFERENCE, apply_overrides, read_mapping, references, resolve
from rlhf_kit.runs.config import OUTPUTS, Recipe, file_of
from rlhf_kit.trainers.args import check_args, config_class
from rlhf_kit.trainers.argument_source import arguments
from rlhf_kit.trainers.config import Bootstrap, Ppo, Preference, Reward, Segment, Sft, StageConfig

__all__ = ["Recipe", "RecipeError", "load_recipe"]

TOP_KEYS = ("name", "runs_dir", "seed")
STAGE_CLASSES = {
    "sft": Sft,
    "reward": Reward,
    "segment": Segment,
    "pairs": Pairs,
    "preference": Preference,
    "bootstrap": Bootstrap,
    "ppo": Ppo,
    "eval": Eval,
}
WITHOUT_TRAINER = ("eval", "pairs", "bootstrap")
ALL_OUTPUTS = tuple(dict.fromkeys(output for outputs in OUTPUTS.values() for output in outputs))


def load_recipe(path: str | Path, overrides: Sequence[str] = (), world_size: int = 1) -> Recipe:
    """The recipe in a YAML file after `key=value` and `~key` overrides, for a run of `world_size` processes.

    Nothing heavier than pydantic and OmegaConf is imported, and no model or data set is opened.

    Raises:
        RecipeError: with every problem that can be found without guessing.
    """
    path = Path(path)
    content, problems = apply_overrides(read_mapping(path), overrides)
    content = {"name": path.stem, "runs_dir": "runs", "seed": 0, **content}
    if isinstance(content["runs_dir"], str):
        content["runs_dir"] = os.path.expanduser(content["runs_dir"])
    single = "stages" not in content
    shape_problem = _shape_problem(content)
    if shape_problem:
        raise RecipeError(path, [*problems, shape_problem])
    problems += [] if single else _unknown_top_keys(content)
    content, reference_problems = _replace_references(content)
    content, interpolation_problems = resolve(content)
    problems += reference_problems + interpolation_problems
    recipe, more = _validate(_as_pipeline(content, single), single, world_size, path)
    problems += _not_under(more, problems)
    if problems or recipe is None:
        raise RecipeError(path, problems)
    return recipe


def _not_under(problems: Sequence[Problem], known: Sequence[Problem]) -> list[Problem]:
    """The problems less those that follow from one already known."""
    paths = [problem.path for problem in known if problem.path]
    return [p for p in problems if not any(p.path == path or p.path.startswith(f"{path}.") for path in paths)]


def _shape_problem(content: Mapping[str, Any]) -> Problem | None:
    """Why the recipe is neither one stage nor a pipeline of `stages`; reading on then makes no sense."""
    if "stages" in content:
        stages = content["stages"]
        if isinstance(stages, dict) and stages:
            return None
        got = "an empty mapping" if stages == {} else describe(stages)
        remedy = "write `stages: {sft: {type: sft, ...}, ...}`"
        return Problem("stages", f"expected a mapping of named stages, got {got}", remedy=remedy)
    if "type" in content:
        return None
    near = next((key for key in content if key not in TOP_KEYS and did_you_mean(key, ["type", "stages"])), None)
    if near is not None:
        return Problem(near, "unknown key", content[near], did_you_mean(near, ["type", "stages"]))
    remedy = f"choose one of {listed(STAGE_CLASSES)}, or give `stages: {{name: ...}}`"
    return Problem("type", "required key is missing", remedy=remedy)


def _unknown_top_keys(content: Mapping[str, Any]) -> list[Problem]:
    """Keys beside `stages` that are none of the recipe's own."""
    known, last_stage = (*TOP_KEYS, "stages"), next(reversed(content["stages"]))
    problems = []
    for key, value in content.items():
        if any(key in stage.model_fields for stage in STAGE_CLASSES.values()):
            remedy = f"it belongs to a stage: write stages.{last_stage}.{key}"
        elif any(key in arguments(config) for config in ("trl.SFTConfig", "trl.GRPOConfig")):
            remedy = f"it is an argument of a trainer: write stages.{last_stage}.trainer.args.{key}"
        else:
            remedy = did_you_mean(key, known, f"the keys here are {listed(known)}")
        problems += [] if key in known else [Problem(key, "unknown key", value, remedy)]
    return problems


def _replace_references(content: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The recipe with `${stages.NAME.OUTPUT}` replaced by the output's path."""
    stages = content.get("stages")
    names = list(stages) if isinstance(stages, dict) else []
    problems = []
    for path, text, name, output in references(content):
        problem = _reference_problem(path, name, output, stages or {}, names)
        problems += [Problem(path, problem[0], text, problem[1])] if problem else []
    broken = {problem.value for problem in problems}
    put = partial(_output_path, stages or {})
    return _map_text(content, lambda text: "." if text in broken else REFERENCE.sub(put, text)), problems


def _reference_problem(
    path: str, name: str, output: str, stages: Mapping[str, Any], names: Sequence[str]
) -> tuple[str, str] | None:
    """What is wrong with a reference in the field `path`, and the remedy."""
    if not names:
        return "refers to a stage, and this recipe has none to refer to", "write the folder, or use `stages`"
    if name not in names:
        return f"there is no stage '{name}'", did_you_mean(name, names, f"the stages are {listed(names)}")
    stage = stages[name] if isinstance(stages[name], dict) else {}
    outputs = _outputs_of(stage)
    if output not in ALL_OUTPUTS and output in stage:
        return None  # an ordinary interpolation
    if output not in outputs:
        of = f"stage '{name}' (type {stage.get('type')})"
        return f"{of} has no output '{output}'", did_you_mean(output, outputs, f"it has {listed(outputs)}")
    own = path.split(".")[1] if path.startswith("stages.") else None
    if own == name:
        return "a stage cannot start from its own output", "refer to an earlier stage, or write a folder"
    if own is None:
        return "a stage's output is for later stages alone", "write a folder"
    if names.index(name) > names.index(own):
        return f"stage '{name}' comes later", f"put it before '{own}'; the order is {listed(names)}"
    return None


def _outputs_of(stage: Mapping[str, Any]) -> tuple[str, ...]:
    """What a stage leaves behind; of `pairs` what its builder and its selection write, as far as they are valid."""
    pairs = validate(Pairs, stage)[0] if stage.get("type") == "pairs" else None
    return OUTPUTS.get(str(stage.get("type")), ALL_OUTPUTS) if pairs is None else pairs.outputs


def _output_path(stages: Mapping[str, Any], match: re.Match[str]) -> str:
    """Where an output will be; the recipe's own fields are left to interpolation."""
    if match[2] not in ALL_OUTPUTS:
        return match[0]
    return f"${{runs_dir}}/${{name}}/{match[1]}/{file_of(match[2], _format_of(stages.get(match[1])))}"


def _format_of(stage: Any) -> str:
    """The format of the rows that a stage writes; one that is wrong is told elsewhere."""
    return str(stage.get("format", "parquet")) if isinstance(stage, Mapping) else "parquet"


def _map_text(node: Any, change: Callable[[str], str]) -> Any:
    if isinstance(node, str):
        return change(node)
    if isinstance(node, dict):
        return {key: _map_text(value, change) for key, value in node.items()}
    return [_map_text(value, change) for value in node] if isinstance(node, list) else node


def _as_pipeline(content: Mapping[str, Any], single: bool) -> dict[str, Any]:
    """The recipe's own keys and its stages; the stage of a recipe without `stages` is named by its type."""
    top = {key: content[key] for key in TOP_KEYS}
    if not single:
        return {**top, "stages": content["stages"]}
    stage = {key: value for key, value in content.items() if key not in TOP_KEYS}
    return {**top, "stages": {stage["type"] if str(stage["type"]) in OUTPUTS else "stage": stage}}


def _validate(
    content: Mapping[str, Any], single: bool, world_size: int, path: Path
) -> tuple[Recipe | None, list[Problem]]:
    """The recipe object, or every problem with types, arguments and combinations, stage by stage."""
    stages, problems = {}, []
    for name, stage in content["stages"].items():
        stages[name], found = _with_checked_args(stage, content["seed"])
        inside = "preference." if isinstance(stage, dict) and stage.get("type") == "bootstrap" else ""
        problems += [problem.under(f"stages.{name}.{inside}trainer.args") for problem in found]
    recipe, found = validate(Recipe, {**content, "stages": stages, "single": single})
    problems = [_hint_at_args(problem, stages) for problem in found] + problems
    earlier: set[Path] = set()
    for name, stage in stages.items():
        prefix = f"stages.{name}"
        if not any(problem.path == prefix or problem.path.startswith(f"{prefix}.") for problem in problems):
            valid = recipe.stages[name] if recipe else validate(StageConfig, stage)[0]
            checked = check_stage(valid, world_size, earlier, path)
            problems += [problem.under(prefix) for problem in checked]
        folder = Path(str(content["runs_dir"]), str(content["name"]), name)
        earlier |= {folder / file_of(output, _format_of(stage)) for output in ALL_OUTPUTS}
    problems += check_links(recipe) if recipe and not problems else []
    if single:
        prefix = f"stages.{next(iter(stages))}"
        problems = [
            replace(problem, path=problem.path[len(prefix) + 1 :]) if problem.path.startswith(prefix) else problem
            for problem in problems
        ]
    return recipe, problems


def _with_checked_args(stage: Any, seed: Any) -> tuple[Any, list[Problem]]:
    """The stage with the recipe's seed and numbers of the declared types in `trainer.args`."""
    if isinstance(stage, dict) and stage.get("type") == "bootstrap" and isinstance(stage.get("preference"), dict):
        inner, problems = _with_checked_args({**stage["preference"], "type": "preference"}, seed)
        del inner["type"]
        return {**stage, "preference": inner}, problems
    if not isinstance(stage, dict) or str(stage.get("type")) not in OUTPUTS or stage["type"] in WITHOUT_TRAINER:
        return stage, []
    trainer = stage.get("trainer", {})
    args = trainer.get("args", {}) if isinstance(trainer, dict) else None
    if not isinstance(trainer, dict) or not isinstance(args, dict):
        return stage, []
    checked, problems = check_args(stage["type"], _objective(stage), args)
    seeded = {**checked, "seed": seed} if "seed" not in checked and type(seed) is int else checked
    return {**stage, "trainer": {**trainer, "args": seeded}}, problems


def _objective(stage: Mapping[str, Any]) -> str:
    objective = stage.get("objective", "ce")
    return str(objective.get("type") if isinstance(objective, Mapping) else objective)


def _hint_at_args(problem: Problem, stages: Mapping[str, Any]) -> Problem:
    """An argument of the trainer that stands in the stage or in `trainer` is told where it belongs."""
    stage, *rest = problem.path.removeprefix("stages.").split(".")
    if problem.message != "unknown key" or stage not in stages or rest[:-1] not in ([], ["trainer"]):
        return problem
    if stages[stage]["type"] in WITHOUT_TRAINER:
        return problem
    config = config_class(stages[stage]["type"], _objective(stages[stage]))
    if rest[-1] not in arguments(config):
        return problem
    return replace(problem, remedy=f"it is an argument of {config}: write trainer.args.{rest[-1]}")
