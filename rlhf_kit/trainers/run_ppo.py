"""The `ppo` stage: from its configuration to a trained policy."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed
from trl.chat_template_utils import add_response_schema, supports_tool_calling
from trl.trainer.grpo_config import GRPOConfig

from rlhf_kit.data.load import load_data
from rlhf_kit.data.messages import is_messages
from rlhf_kit.errors import RunError
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.trainers.args import batch_of, check_batch
from rlhf_kit.trainers.config import Ppo
from rlhf_kit.trainers.export import export_model, export_sources
from rlhf_kit.trainers.ppo import PpoTrainer
from rlhf_kit.trainers.setup import StageRun, build_args, train, without_printing

PPO_DEFAULTS = {
    "beta": 0.0,  # the KL belongs to credit.kl
    "loss_type": "dapo",
    "remove_unused_columns": False,  # sources read the data's columns
    "disable_dropout": True,  # or the ratio of the policy to itself is not 1
    "metric_for_best_model": "eval_accuracy",
    "greater_is_better": True,
}


def run_ppo(stage: Ppo, run: StageRun) -> dict[str, Any]:
    """Train the policy, write `model/` (and `prm/`), and return the stage's results."""
    trainer = build_ppo_trainer(stage, run)
    without_printing(trainer)
    evaluates = stage.evaluation is not None
    results: dict[str, Any] = {}
    if evaluates and run.last_checkpoint() is None:
        trainer.evaluate()
    train(trainer, run)
    if evaluates and trainer.last_evaluated != trainer.state.global_step:
        trainer.evaluate()
    export_model(trainer, run.folder / "model")
    export_sources(trainer, run.folder)
    results |= {"updates": trainer.state.global_step, "skipped_updates": trainer.guard.skipped}
    accuracies = trainer.evaluations
    if accuracies:
        step, accuracy = accuracies[-1]
        if trainer.args.load_best_model_at_end and trainer.state.best_global_step:
            step, accuracy = trainer.state.best_global_step, trainer.state.best_metric
            results["eval_accuracy_last"] = accuracies[-1][1]
        results |= {"eval_accuracy_start": accuracies[0][1], "eval_accuracy": accuracy, "eval_step": step}
    return results | _step_auc(trainer.state.log_history)


def _step_auc(history: list[dict[str, Any]]) -> dict[str, float]:
    """Mean step AUC over the logs of the run, and the lowest mean of ten logs in a row (one rollout has few errors).

    Of the lowest source, if there are several.
    """
    by_source: dict[str, list[float]] = {}
    for logs in history:
        for name, value in logs.items():
            if name.endswith("/step_auc") and value is not None:
                by_source.setdefault(name, []).append(value)
    if not by_source:
        return {}
    values = min(by_source.values(), key=fmean)
    windows = [fmean(values[start : start + 10]) for start in range(max(len(values) - 9, 1))]
    return {"step_auc_min": min(windows), "step_auc_mean": fmean(values)}


def build_ppo_trainer(stage: Ppo, run: StageRun) -> PpoTrainer:
    """The trainer of a `ppo` stage."""
    args = ppo_args(stage, run)
    set_seed(args.seed)
    train_dataset = load_data(stage.data)  # what may be wrong with it is said before a model is loaded
    eval_dataset = load_data(stage.eval_data) if stage.eval_data is not None else None
    tokenizer = load_tokenizer(stage.model)
    if stage.tools:
        _check_tools(train_dataset, tokenizer)
    return PpoTrainer(
        config=stage,
        model=load_model(stage.model),
        processing_class=tokenizer,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        functions=run.functions,
        callbacks=run.callbacks,
        log_samples=run.log_samples,
    )


def _check_tools(data: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say what TRL would only find out in the first rollout, or say of its own classes.

    Raises:
        RunError: prompts are text, or the tokenizer cannot write tool calls and read them back.
    """
    for number, prompt in enumerate(data["prompt"], start=1):
        if not is_messages(prompt):
            raise RunError(f"data: row {number} has a prompt of text, and tools need messages: write data.chat: true")
    if not supports_tool_calling(tokenizer):
        raise RunError(
            "tools: the chat template of the model cannot write tool calls and their answers: give model.chat_template "
            "one that does, or take a model that was trained to call tools"
        )
    if getattr(tokenizer, "response_template", None) is None:
        try:
            add_response_schema(tokenizer)
        except ValueError as error:
            raise RunError(
                "tools: TRL does not know how tool calls look in the model's chat template: take a model whose "
                "template it knows (Qwen 2.5 and 3, Llama 3.1 and 3.2, ...), or save its tokenizer with a "
                "response_template"
            ) from error


def ppo_args(stage: Ppo, run: StageRun) -> GRPOConfig:
    """TRL's GRPOConfig for a stage."""
    given = dict(stage.trainer.args)
    single = given.get("num_generations") == 1
    if single:
        # TRL refuses groups of one when it is built, though nothing in it needs more once advantages are ours. Groups
        # of two suit any batch of two steps; what was meant is set below.
        given |= {"num_generations": 2, "num_generations_eval": 1}
        given |= {"generation_batch_size": None, "steps_per_generation": 2}
    if stage.stop_strings and given.get("use_vllm"):
        given["generation_kwargs"] = {"stop": list(stage.stop_strings), **(given.get("generation_kwargs") or {})}
    args = build_args(GRPOConfig, run, given, **PPO_DEFAULTS)
    if single:
        problems = [str(problem.under("trainer.args")) for problem in check_batch(stage, args.world_size)]
        if problems:
            raise RunError("\n".join(problems))
        args.num_generations = 1
        args.generation_batch_size = batch_of(stage, args.world_size).rollout
        args.steps_per_generation = args.generation_batch_size // (args.per_device_train_batch_size * args.world_size)
    return args
