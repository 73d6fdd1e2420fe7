"""The `sft` stage: supervised fine-tuning with TRL's SFTTrainer."""

from __future__ import annotations

from typing import Any, cast

from datasets import Dataset
from torch import nn
from transformers import set_seed
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rlhf_kit.data.load import load_data
from rlhf_kit.errors import RunError
from rlhf_kit.evals.accuracy import greedy_scores
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.trainers.config import Sft
from rlhf_kit.trainers.export import export_model
from rlhf_kit.trainers.setup import StageRun, build_args, train

LEARNT = ("prompt", "completion", "tools")


def run_sft(stage: Sft, run: StageRun) -> dict[str, Any]:
    """Fine-tune, write `model/`, and return the stage's results.

    Raises:
        RunError: the data have no completions to learn.
    """
    args = build_args(SFTConfig, run, stage.trainer.args)
    set_seed(args.seed)
    tokenizer = load_tokenizer(stage.model)
    data = load_data(stage.data)
    if "completion" not in data.column_names:
        raise RunError(
            f"sft learns completions, and the data have only the columns {', '.join(data.column_names)}: name the one "
            "that holds them, as in data.columns: {completion: answer}"
        )
    evaluates = args.eval_strategy != "no"
    trainer = SFTTrainer(
        model=load_model(stage.model),
        args=args,
        train_dataset=_learnt(data),
        eval_dataset=_learnt(load_data(stage.eval_data)) if stage.eval_data and evaluates else None,
        processing_class=tokenizer,
        callbacks=list(run.callbacks),
    )
    train(trainer, run)
    export_model(trainer, run.folder / "model")
    results: dict[str, Any] = {"updates": trainer.state.global_step}
    if stage.evaluation is not None and stage.eval_data is not None:
        model = cast(nn.Module, trainer.accelerator.unwrap_model(trainer.model))
        held_out = load_data(stage.eval_data)
        scores = greedy_scores(model, tokenizer, held_out, stage.evaluation, on_batch=run.on_batch("evaluation"))
        results["eval_accuracy"] = sum(scores) / len(scores)
        trainer.log({"eval_accuracy": results["eval_accuracy"]})
    return results


def _learnt(data: Dataset) -> Dataset:
    """The columns that TRL renders; a row's tools are told to the chat template."""
    return data.select_columns([name for name in LEARNT if name in data.column_names])
