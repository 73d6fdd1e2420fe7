"""The files and models that a recipe names: whether they are there."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from rlhf_kit.data.config import DataBase, Gsm8kSolutions, Jsonl, Parquet, QaFeedback, Sampled, ToxicSpans
from rlhf_kit.data.files import is_address
from rlhf_kit.evals.stage import Eval
from rlhf_kit.models.config import Pretrained, Scratch
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.config import SourceConfig
from rlhf_kit.trainers.config import Bootstrap, Ppo, Preference, Reward, Stage


def missing_files(stage: Stage, earlier: Collection[Path], recipe_path: Path) -> Iterator[Problem]:
    """Data files and local models that do not exist."""
    for path, value, is_model in _paths(stage):
        location = Path(value)
        if location in earlier or location.exists() or (_may_be_remote(value) if is_model else is_address(value)):
            continue
        beside = recipe_path.parent / value
        if beside.exists():
            remedy = f"paths start from the current directory: write {os.path.relpath(beside)}"
        elif is_model:
            remedy = "give a folder or a hub id (owner/name)"
        else:
            remedy = f"paths start from the current directory, {Path.cwd()}"
        yield Problem(path, "no such model folder" if is_model else "no such file", value, remedy)


def _data_paths(field: str, data: DataBase) -> Iterator[tuple[str, str, bool]]:
    if isinstance(data, Sampled):
        yield f"{field}.model", data.model, True
    if isinstance(data, Jsonl | Parquet | Gsm8kSolutions | ToxicSpans | QaFeedback):
        yield f"{field}.path", data.path, False
    for name, part in data.parts.items():
        yield from _data_paths(f"{field}.{name}", part)


def _paths(stage: Stage) -> Iterator[tuple[str, str, bool]]:
    """Every file or model that the stage reads, as (field, value, whether it is a model)."""
    if isinstance(stage, Eval):
        yield from _eval_paths(stage)
        return
    if isinstance(stage, Bootstrap):
        if stage.reference is not None:
            yield "reference", stage.reference, True
        if stage.evaluation is not None:
            yield from _data_paths("evaluation.data", stage.evaluation.data)
        return
    if isinstance(stage, Pairs):
        yield from _data_paths("data", stage.data)
        yield from _model_paths(stage.model, stage.rewards)
        yield from ((f"builder.{field}", value, is_model) for field, value, is_model in stage.builder.files())
        return
    for field in ("data", "eval_data"):
        if (data := getattr(stage, field)) is not None:
            yield from _data_paths(field, data)
    yield from _model_paths(stage.model, stage.rewards if isinstance(stage, Ppo) else ())
    if isinstance(stage, Preference) and stage.evaluation is not None:
        yield from _data_paths("evaluation.data", stage.evaluation.data)
    if isinstance(stage, Reward | Preference) and stage.reference:
        yield "reference.path", stage.reference.path, True
    if isinstance(stage, Reward) and stage.step_evaluation:
        yield "step_evaluation.path", stage.step_evaluation.path, False
    if isinstance(stage, Ppo) and stage.critic and stage.critic.path:
        yield "critic.path", stage.critic.path, True


def _model_paths(
    model: Pretrained | Scratch | None, rewards: Sequence[SourceConfig]
) -> Iterator[tuple[str, str, bool]]:
    if isinstance(model, Pretrained):
        yield "model.path", model.path, True
        if model.tokenizer:
            yield "model.tokenizer", model.tokenizer, True
    for index, source in enumerate(rewards):
        yield from ((f"rewards.{index}.{field}", value, is_model) for field, value, is_model in source.files())


def _eval_paths(stage: Eval) -> Iterator[tuple[str, str, bool]]:
    yield from _model_paths(stage.model, stage.rewards)
    for name, evaluation in stage.evals.items():
        for field, data, _ in evaluation.data_sets():
            yield from _data_paths(f"evals.{name}.{field}", data)
        yield from ((f"evals.{name}.{field}", value, is_model) for field, value, is_model in evaluation.files())


def _may_be_remote(model: str) -> bool:
    """A hub id is `name` or `owner/name`; anything else is meant as a folder."""
    return not model.startswith((".", "/")) and model.count("/") <= 1
