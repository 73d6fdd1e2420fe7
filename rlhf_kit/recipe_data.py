"""What can be known of a recipe's data and reward functions without loading a model.

Files are read, tasks are made, columns are there, functions are installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path

from rlhf_kit.data.config import DataConfig, Gsm8kSolutions, Jsonl, Parquet, QaFeedback, Sampled, ToxicSpans
from rlhf_kit.data.names import naming
from rlhf_kit.evals.config import VERIFIER_COLUMN
from rlhf_kit.evals.first_error import FirstError
from rlhf_kit.evals.stage import Eval
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.problems import Problem, RecipeError, did_you_mean, listed
from rlhf_kit.recipe_bootstrap import HERE, bootstrap_data
from rlhf_kit.recipe_columns import Columns, Files, Known, columns_of, first_row_problem, written_files
from rlhf_kit.recipe_preference import holds_pairs, preference_rows
from rlhf_kit.rewards.config import SourceConfig
from rlhf_kit.rewards.function import ENTRY_POINTS, FunctionConfig
from rlhf_kit.rewards.verifier import VerifierConfig
from rlhf_kit.runs.config import Recipe
from rlhf_kit.trainers.config import Bootstrap, Preference, Reward, Segment, Sft, Stage, TrainingStage


def check_data(recipe: Recipe, source: object) -> None:
    """Read the data that are on this machine, and one row of each generated task, as every stage will.

    It is for runs from the command line, which have no reward functions but the installed ones.

    Raises:
        RecipeError: with every data set that a stage cannot use and every reward function that is not there; `source`
            is what the recipe is called.
    """
    problems: list[Problem] = []
    seen: dict[str, Known] = {}
    files = written_files(recipe)
    for name, stage in recipe.stages.items():
        prefix = "" if recipe.single else f"stages.{name}"
        for field, config, needed in _needs(stage, files):
            key = config.model_dump_json()
            if key not in seen:
                seen[key] = columns_of(config, files)
            problems += [problem.under(prefix) for problem in _problems(field, seen[key], needed)]
        if isinstance(stage, Eval):
            problems += [problem.under(prefix) for problem in _row_problems(stage, files)]
        if isinstance(stage, Segment):
            problems += [problem.under(prefix) for problem in _label_problems(stage, files)]
        if isinstance(stage, Preference):
            problems += [problem.under(prefix) for problem in preference_rows(stage, files)]
        if isinstance(stage, Bootstrap):
            found = preference_rows(stage.preference_of(1, HERE), files)
            problems += [problem.under("preference").under(prefix) for problem in found]
        problems += [problem.under(prefix) for problem in _functions(stage)]
    if problems:
        raise RecipeError(source, problems)


def _problems(field: str, columns: Known, needed: dict[str, str]) -> Iterator[Problem]:
    if isinstance(columns, Problem):
        yield columns.under(field)
        return
    for column, reader in needed.items():
        if columns is not None and columns.lack(column):
            yield Problem(field, f"{reader} reads {column}, and {columns}", remedy=naming(column, columns.names))


def _row_problems(stage: Eval, files: Files) -> Iterator[Problem]:
    """Rows of files at hand that an evaluation cannot use, one by one or together; and broken ProcessBench files."""
    for name, evaluation in stage.evals.items():
        for field, config, needed in evaluation.data_sets():
            if not isinstance(config, Jsonl | Parquet | Gsm8kSolutions):
                continue
            columns = columns_of(config, files)
            if not isinstance(columns, Columns) or not columns.whole or any(columns.lack(name) for name in needed):
                continue
            from rlhf_kit.data.load import load_with_origins

            data, origins = load_with_origins(config)
            rows = data.to_list()
            if (found := first_row_problem(rows, origins, partial(evaluation.row_problem, field))) is not None:
                yield found.under(f"evals.{name}.{field}")
            if (together := evaluation.rows_problem(rows)) is not None:
                yield Problem(f"evals.{name}.{field}", together)
        if isinstance(evaluation, FirstError) and evaluation.path is not None and Path(evaluation.path).is_file():
            from rlhf_kit.evals.steps import load_processbench

            try:
                load_processbench(evaluation.path, evaluation.limit)
            except (ValueError, OSError) as error:
                yield Problem(f"evals.{name}.path", str(error), remedy="give a ProcessBench file")


def _label_problems(stage: Segment, files: Files) -> Iterator[Problem]:
    """Labels that a segment stage would learn, and that no span of its data has, if they are at hand."""
    at_hand = isinstance(stage.data, Jsonl | Parquet | ToxicSpans | QaFeedback)
    columns = columns_of(stage.data, files) if at_hand else None
    if not isinstance(columns, Columns) or not columns.whole or columns.lack("spans"):
        return
    from rlhf_kit.data.annotations import labels_of
    from rlhf_kit.data.load import load_data

    yield from stage.unknown_labels(labels_of(load_data(stage.data)["spans"]))


def _functions(stage: Stage) -> Iterator[Problem]:
    """Reward functions that are no entry points; from Python they could be passed by name."""
    known = sorted(entry_points(group=ENTRY_POINTS).names)
    holder = stage.pairs if isinstance(stage, Bootstrap) else stage
    prefix = "pairs." if isinstance(stage, Bootstrap) else ""
    for index, source in enumerate(getattr(holder, "rewards", ())):
        if isinstance(source, FunctionConfig) and source.function not in known:
            what = f"is no entry point of the group {ENTRY_POINTS} ({listed(known) or 'none is installed'})"
            declare = "declare it as one in your package, or run the recipe in Python with run_pipeline's functions"
            remedy = did_you_mean(source.function, known, declare)
            yield Problem(f"{prefix}rewards.{index}.function", what, source.function, remedy)


def _needs(stage: Stage, files: Files) -> Iterator[tuple[str, DataConfig, dict[str, str]]]:
    """Every data set of a stage: its field, its configuration, and who reads which of its columns."""
    if isinstance(stage, Eval):
        read = _read_by_sources(stage.rewards)
        for name, evaluation in stage.evals.items():
            for field, config, columns in evaluation.data_sets():
                needed = {**columns, **(read if evaluation.may_ask_sources else {})}
                yield from _prompts_of(f"evals.{name}.{field}", config, needed)
        return
    if isinstance(stage, Bootstrap):
        yield "pairs.data", stage.pairs.data, _read_by_sources(stage.pairs.rewards)
        yield from bootstrap_data(stage)
        for field, config, needed in _held_out(stage.preference_of(1, HERE), files):
            yield f"preference.{field}", config, needed
        return
    if isinstance(stage, Pairs):
        builder = dict.fromkeys(stage.builder.columns, f"builder {stage.builder.type}")
        yield "data", stage.data, {**_read_by_sources(stage.rewards), **builder}
        return
    yield from _prompts_of("data", stage.data, _read_in_training(stage))
    if isinstance(stage, Preference) and stage.evaluation is not None:
        verifier = stage.evaluation.verifier
        yield "evaluation.data", stage.evaluation.data, {VERIFIER_COLUMN[verifier]: f"verifier {verifier}"}
    if isinstance(stage, Preference):
        yield from _held_out(stage, files)
    elif stage.eval_data is None:
        return
    elif isinstance(stage, Reward | Segment):
        yield from _prompts_of("eval_data", stage.eval_data, _read_in_training(stage))
    else:
        verifier = stage.evaluation and stage.evaluation.verifier
        yield "eval_data", stage.eval_data, {VERIFIER_COLUMN[verifier]: f"verifier {verifier}"} if verifier else {}


def _held_out(stage: Preference, files: Files) -> Iterator[tuple[str, DataConfig, dict[str, str]]]:
    """Its `eval_data`, and who reads which columns: pairs are judged whatever the stage learns from."""
    if stage.eval_data is not None:
        needed = {} if holds_pairs(stage.eval_data, files) else _read_in_training(stage)
        yield from _prompts_of("eval_data", stage.eval_data, needed)


def _prompts_of(
    field: str, config: DataConfig, needed: dict[str, str]
) -> Iterator[tuple[str, DataConfig, dict[str, str]]]:
    if isinstance(config, Sampled):
        verifier = config.verifier
        yield f"{field}.prompts", config.prompts, {VERIFIER_COLUMN[verifier]: f"verifier {verifier}"}
    yield field, config, needed


def _read_in_training(stage: TrainingStage) -> dict[str, str]:
    if isinstance(stage, Sft):
        return {"completion": "sft"}
    if isinstance(stage, Segment):
        return {"text": "segment", "spans": "segment"}
    if isinstance(stage, Reward):
        columns = ("chosen", "rejected") if stage.objective in ("dpo", "nca") else ("completion", "label")
        return dict.fromkeys(columns, f"objective {stage.objective}")
    if isinstance(stage, Preference):
        return dict.fromkeys(stage.objective.columns_read, f"objective {stage.objective.type}")
    needed = _read_by_sources(stage.rewards)
    return {**needed, **({stage.step_truth.column: "step_truth"} if stage.step_truth else {})}


def _read_by_sources(rewards: Sequence[SourceConfig]) -> dict[str, str]:
    verifiers = [source.verifier for source in rewards if isinstance(source, VerifierConfig)]
    needed = {VERIFIER_COLUMN[verifier]: f"verifier {verifier}" for verifier in verifiers}
    return needed | {column: f"reward '{source.source_name}'" for source in rewards for column in source.columns}
