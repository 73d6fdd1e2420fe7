"""The `preference` stage: DPO, KTO and ORPO, and the offline objectives that TRL does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.utils import disable_dropout_in_model

from rlhf_kit.data.config import DataConfig
from rlhf_kit.data.load import load_data
from rlhf_kit.data.outcomes import encode_row
from rlhf_kit.errors import RunError
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.models.scorer import add_log_prob_head
from rlhf_kit.objectives.base import Objective
from rlhf_kit.objectives.trl import Dpo, TrlObjective
from rlhf_kit.trainers.config import Preference
from rlhf_kit.trainers.export import export_model, write_prm_record
from rlhf_kit.trainers.objective_trainer import ObjectiveTrainer
from rlhf_kit.trainers.offline import check_columns, reference_scorer
from rlhf_kit.trainers.setup import StageRun, build_args, train


def run_preference(stage: Preference, run: StageRun) -> dict[str, Any]:
    """Train, write `model/`, and return the stage's results: with `eval_data`, what was measured on them.

    Raises:
        RunError: the data lack a column that the objective reads.
    """
    tokenizer = load_tokenizer(stage.model)
    if isinstance(stage.objective, TrlObjective):
        trainer = _trl_trainer(stage, stage.objective, run, tokenizer)
    else:
        trainer = _objective_trainer(stage, stage.objective, run, tokenizer)
    train(trainer, run)
    export_model(trainer, run.folder / "model")
    if trainer.is_world_process_zero():  # for who takes the model for an implicit reward
        reference = stage.reference or stage.model
        write_prm_record(run.folder / "model", getattr(stage.objective, "beta", 1.0), reference.path)
    results: dict[str, Any] = {"updates": trainer.state.global_step}
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        results |= {name: value for name, value in metrics.items() if name.startswith(("eval_loss", "eval_rewards/"))}
    return results


def _objective_trainer(
    stage: Preference, objective: Objective, run: StageRun, tokenizer: PreTrainedTokenizerBase
) -> Trainer:
    args = build_args(TrainingArguments, run, stage.trainer.args, remove_unused_columns=False)
    set_seed(args.seed)
    data = _encoded(stage.data, objective, tokenizer)  # what may be wrong with it is said before a model is loaded
    eval_data = None if stage.eval_data is None else _encoded(stage.eval_data, objective, tokenizer)
    model = load_model(stage.model)
    disable_dropout_in_model(cast(nn.Module, model))
    add_log_prob_head(model)
    needed = objective.needs & {"reference", "kl"}
    reference = reference_scorer(model, stage.model, stage.reference, args.device) if needed else None
    return ObjectiveTrainer(
        objective=objective,
        reference=reference,
        tokenizer=tokenizer,
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=eval_data,
        callbacks=list(run.callbacks),
    )


def _trl_trainer(
    stage: Preference, objective: TrlObjective, run: StageRun, tokenizer: PreTrainedTokenizerBase
) -> Trainer:
    """TRL's trainer of an objective that it has."""
    config, trainer = (DPOConfig, DPOTrainer) if isinstance(objective, Dpo) else (KTOConfig, KTOTrainer)
    args = build_args(config, run, {**stage.trainer.args, **objective.args()})
    set_seed(args.seed)
    data = _columns(stage.data, objective.columns_read, objective.type)
    eval_data = None if stage.eval_data is None else _columns(stage.eval_data, objective.columns_read, objective.type)
    model = load_model(stage.model)
    shared = isinstance(model, PeftModel) and stage.reference is None
    copy = None if shared else load_model((stage.reference or stage.model).model_copy(update={"peft": None}))
    return trainer(
        model=cast(Any, model),
        ref_model=cast(Any, copy),
        args=cast(Any, args),
        train_dataset=data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        callbacks=list(run.callbacks),
    )


# --- data ---


def _columns(config: DataConfig, columns: tuple[str, ...], objective: str) -> Dataset:
    """The columns that an objective reads."""
    data = load_data(config)
    check_columns(data, columns, objective)
    return data.select_columns(list(columns))


def _encoded(config: DataConfig, objective: Objective, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rows of `<role>.prompt_ids` and `<role>.completion_ids` for every role, and the objective's numbers."""
    data = load_data(config)
    check_columns(data, objective.columns_read, objective.type)
    rows = []
    for number, row in enumerate(data.to_list(), start=1):
        try:
            rows.append(_encoded_row(row, objective, tokenizer))
        except (TypeError, ValueError) as error:
            raise RunError(f"data, row {number}: {error}") from error
    return Dataset.from_list(rows)


def _encoded_row(row: Mapping[str, Any], objective: Objective, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    encoded: dict[str, Any] = {}
    for role, (prompt, completion) in objective.roles.items():
        ids = encode_row(tokenizer, row[prompt], row[completion])
        encoded |= {f"{role}.{name}": value for name, value in ids.items()}
    for name, default in objective.numbers.items():
        value = default if row.get(name) is None else row[name]
        if value is None:
            raise ValueError(f"{name!r} is missing")
        encoded[name] = float(value)
    return encoded
