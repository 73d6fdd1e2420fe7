"""What the stages that learn from fixed rows share: their rows as ids, the reference, and the trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.kto_config import KTOConfig

from rlhf_kit.data.config import DataConfig
from rlhf_kit.data.load import Origins, Sampler
from rlhf_kit.data.outcomes import RowEncoder, check_aligned
from rlhf_kit.errors import RunError
from rlhf_kit.models.config import ModelConfig, Pretrained
from rlhf_kit.models.loading import load_copy, load_model
from rlhf_kit.models.scorer import Scorer, add_log_prob_head, base_scorer
from rlhf_kit.objectives.base import Objective
from rlhf_kit.objectives.trl import Dpo, TrlObjective
from rlhf_kit.trainers.config import Preference, Reward
from rlhf_kit.trainers.objective_trainer import ObjectiveTrainer
from rlhf_kit.trainers.sampling import sample_completions
from rlhf_kit.trainers.setup import StageRun, build_args
from rlhf_kit.trainers.trl_offline import EncodedDpoTrainer, EncodedKtoTrainer, with_room

Encode = Callable[[DataConfig], Dataset]


def offline_trainer(
    stage: Reward | Preference,
    objective: Objective | TrlObjective,
    run: StageRun,
    tokenizer: PreTrainedTokenizerBase,
    encode: Encode,
    eval_data: DataConfig | None,
) -> tuple[Trainer, Scorer | None]:
    """The objective's trainer, and the reference that it compares with, if it does.

    `encode` gives the rows of a data set as ids, in the objective's form (`trl_rows`, `objective_rows`).
    """
    build = _trl_trainer if isinstance(objective, TrlObjective) else _objective_trainer
    return build(stage, cast(Any, objective), run, tokenizer, encode, eval_data)


def _objective_trainer(
    stage: Reward | Preference,
    objective: Objective,
    run: StageRun,
    tokenizer: PreTrainedTokenizerBase,
    encode: Encode,
    eval_data: DataConfig | None,
) -> tuple[Trainer, Scorer | None]:
    args = build_args(TrainingArguments, run, stage.trainer.args, remove_unused_columns=False)
    set_seed(args.seed)
    data = encode(stage.data)  # what may be wrong with it is said before a model is loaded
    held_out = None if eval_data is None else encode(eval_data)
    model = load_model(stage.model)
    keep_adapter_dropout(cast(nn.Module, model))
    add_log_prob_head(model)
    reference = None
    if objective.compares:
        reference = reference_scorer(model, stage.model, stage.reference, args.device)
    trainer = ObjectiveTrainer(
        objective=objective,
        reference=reference,
        tokenizer=tokenizer,
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=held_out,
        callbacks=list(run.callbacks),
    )
    return trainer, reference


def _trl_trainer(
    stage: Reward | Preference,
    objective: TrlObjective,
    run: StageRun,
    tokenizer: PreTrainedTokenizerBase,
    encode: Encode,
    eval_data: DataConfig | None,
) -> tuple[Trainer, Scorer]:
    """TRL's trainer, whose model carries the head of `add_log_prob_head` once it is built.

    Its `cut` says what `trainer.args.max_length` did to the rows (`with_room`).
    """
    config, trainer_class = (
        (DPOConfig, EncodedDpoTrainer) if isinstance(objective, Dpo) else (KTOConfig, EncodedKtoTrainer)
    )
    # Unless the recipe says so, nothing is cut off, and dropout is that of the other objectives.
    given = {**stage.trainer.args, **objective.args()}
    args = build_args(config, run, given, max_length=None, disable_dropout=False)
    set_seed(args.seed)
    data, cut = with_room(encode(stage.data), args, "data")
    held_out = None
    if eval_data is not None:
        held_out, cut_of_eval = with_room(encode(eval_data), args, "eval_data")
        cut |= {f"eval_{name}": count for name, count in cut_of_eval.items()}
    model = load_model(stage.model)
    shared = isinstance(model, PeftModel) and stage.reference is None
    frozen = None if shared else _frozen(stage.reference or stage.model, args.device)
    trainer = trainer_class(
        model=cast(Any, model),
        ref_model=None if frozen is None else cast(Any, frozen.model),
        args=cast(Any, args),
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=list(run.callbacks),
    )
    trainer.cut = cut
    if "disable_dropout" not in given:
        keep_adapter_dropout(cast(nn.Module, model))
    return trainer, base_scorer(cast(PeftModel, model)) if frozen is None else frozen


def keep_adapter_dropout(model: nn.Module) -> None:
    """Let no dropout be but that of the LoRA adapter that learns, which the recipe gives.

    A model's own would make noise of what the reference says as well, where the two share their layers.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and not name.endswith("lora_dropout.default"):
            module.p = 0.0


# --- reference ---


def reference_scorer(model: Any, start: ModelConfig, named: Pretrained | None, device: torch.device) -> Scorer:
    """The model as it starts: under LoRA its base, else a frozen copy; or the model that the recipe names."""
    if isinstance(model, PeftModel) and named is None:
        return base_scorer(model)
    copy = load_copy(named or start)
    add_log_prob_head(copy)
    return Scorer(cast(nn.Module, copy).to(device), [])


def _frozen(config: ModelConfig, device: torch.device) -> Scorer:
    """A model of its own; TRL's trainers add the head themselves, and divide it as they do the one that learns."""
    whole = load_model(config.model_copy(update={"peft": None}))
    return Scorer(cast(nn.Module, whole).requires_grad_(False).eval().to(device), [])


# --- rows ---


def check_columns(data: Dataset, columns: Sequence[str], objective: str) -> None:
    """Say which columns an objective misses.

    Raises:
        RunError: there is one.
    """
    missing = [name for name in columns if name not in data.column_names]
    if missing:
        raise RunError(
            f"objective {objective} learns from {', '.join(columns)}, and the data have no "
            f"{' and no '.join(missing)}, only {', '.join(data.column_names)}: name them in `columns` of the data"
        )


def trl_rows(data: Dataset, tokenizer: PreTrainedTokenizerBase, origins: Origins) -> Dataset:
    """Rows of text or messages as ids, for TRL: `prompt_ids`, `chosen_ids, rejected_ids` or `completion_ids, label`.

    Ids that the data have already are those that were sampled, and stay where they spell the text (`encode_row`).

    Raises:
        RunError: a row cannot be encoded; the message names it.
    """
    encoder = RowEncoder(tokenizer)
    roles = ("chosen", "rejected") if "chosen" in data.column_names else ("completion",)

    def encode(row: Mapping[str, Any]) -> dict[str, Any]:
        tools = row.get("tools")
        encoded = {role: encoder(row["prompt"], row[role], row.get(f"{role}_ids"), tools) for role in roles}
        ids = {f"{role}_ids": of["completion_ids"] for role, of in encoded.items()}
        label = {"label": bool(row["label"])} if "completion" in roles else {}
        return {"prompt_ids": encoded[roles[0]]["prompt_ids"], **ids, **label}

    return Dataset.from_list(list(encoder.each_row(data.to_list(), origins, encode)))


def objective_rows(
    data: Dataset, objective: Objective, tokenizer: PreTrainedTokenizerBase, origins: Origins
) -> Dataset:
    """Rows of `<role>.prompt_ids` and `<role>.completion_ids` for every role, and the objective's numbers.

    Raises:
        RunError: a row cannot be encoded, or has a number of no use; the message names it.
    """
    encoder = RowEncoder(tokenizer)

    def encode(row: Mapping[str, Any]) -> dict[str, Any]:
        found = objective.row_problem(row)
        if found is not None:
            raise ValueError(found)
        encoded: dict[str, Any] = {}
        for role, (prompt, completion) in objective.roles.items():
            ids = encoder(row[prompt], row[completion], row.get(f"{completion}_ids"), row.get("tools"))
            encoded |= {f"{role}.{name}": value for name, value in ids.items()}
        check_aligned(encoded, objective.roles)
        for name, default in objective.numbers.items():
            encoded[name] = float(cast(float, default if row.get(name) is None else row[name]))
        return encoded

    return Dataset.from_list(list(encoder.each_row(data.to_list(), origins, encode)))


def with_sampled_ids(columns: Sequence[str], data: Dataset) -> list[str]:
    """The columns, and those of the ids that were sampled for them and of tools, where the data have these."""
    names = (*(name for column in columns for name in (column, f"{column}_ids")), "tools")
    return [name for name in names if name in data.column_names]


def sampler_of(run: StageRun) -> Sampler:
    """Samples the completions of `sampled` data."""
    return partial(sample_completions, on_batch=run.on_batch("sampling"))
