"""What a stage that learns from preferences must say together, and what its objective reads of the rows at hand."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_kit.data.config import DataConfig, Jsonl, Parquet, Sampled
from rlhf_kit.problems import Problem, listed
from rlhf_kit.recipe_columns import Columns, Files, columns_of, first_row_problem
from rlhf_kit.trainers.args import argument, measures_loss
from rlhf_kit.trainers.config import Preference, Reward


def check_preference(stage: Preference) -> Iterator[Problem]:
    """All that is wrong with its fields."""
    objective = stage.objective
    yield from (problem.under("objective") for problem in objective.problems())
    if stage.reference is not None and not objective.compares:
        yield Problem("reference", f"is never read by objective {objective.type}", stage.reference.path, "remove it")
    for path, data in (("data", stage.data), ("eval_data", stage.eval_data)):
        if isinstance(data, Sampled) and "chosen" in objective.columns_read:
            what = f"objective {objective.type} learns from pairs; sampled rows are single completions"
            yield Problem(f"{path}.type", what, "sampled", "make pairs by a pairs stage, or use objective kto")
    if objective.type == "kto":
        yield from check_kto(stage)


def check_kto(stage: Preference | Reward) -> Iterator[Problem]:
    """What TRL's KTO refuses: it estimates a KL from the other completions of a batch, which are paired beforehand."""
    size, strategy = (argument(stage, name) for name in ("per_device_train_batch_size", "train_sampling_strategy"))
    if size < 2:
        what = "leaves kto no other completion of the batch to estimate its KL from"
        yield Problem("trainer.args.per_device_train_batch_size", what, size, "write at least 2")
    if strategy != "sequential":
        what = "would break the batches that kto pairs completions in beforehand"
        yield Problem("trainer.args.train_sampling_strategy", what, strategy, "write sequential")


def preference_rows(stage: Preference, files: Files) -> Iterator[Problem]:
    """The first row of each file at hand that the objective cannot learn from, and pairs that it has no loss on."""
    yield from _unusable(stage, "data", stage.data, files)
    if stage.eval_data is None:
        return
    if not holds_pairs(stage.eval_data, files):
        yield from _unusable(stage, "eval_data", stage.eval_data, files)
    elif measures_loss(stage):
        yield from _loss_on_pairs(stage, stage.eval_data, files)
        yield from _unusable(stage, "eval_data", stage.eval_data, files)


def holds_pairs(config: DataConfig, files: Files) -> bool:
    """Whether a data set is known to have pairs, which a preference stage can judge whatever it learns from."""
    columns = columns_of(config, files)
    return isinstance(columns, Columns) and {"chosen", "rejected"} <= set(columns.names)


def _loss_on_pairs(stage: Preference, config: DataConfig, files: Files) -> Iterator[Problem]:
    columns, objective = columns_of(config, files), stage.objective
    lacking = [name for name in objective.columns_read if isinstance(columns, Columns) and columns.lack(name)]
    if lacking:
        argument = "eval_on_start" if stage.trainer.args.get("eval_on_start") else "eval_strategy"
        what = f"objective {objective.type} has a loss on rows with {listed(lacking)}, and eval_data are pairs"
        remedy = "remove it (preference accuracy is measured all the same), or give eval_data such rows"
        yield Problem(f"trainer.args.{argument}", what, stage.trainer.args[argument], remedy)


def _unusable(stage: Preference, field: str, config: DataConfig, files: Files) -> Iterator[Problem]:
    columns, objective = columns_of(config, files), stage.objective
    if not isinstance(config, Jsonl | Parquet) or not isinstance(columns, Columns) or not columns.whole:
        return
    if not objective.numbers or any(columns.lack(name) for name in objective.columns_read):
        return
    from rlhf_kit.data.load import load_with_origins

    data, origins = load_with_origins(config)
    if (found := first_row_problem(data.to_list(), origins, objective.row_problem)) is not None:
        yield found.under(field)
