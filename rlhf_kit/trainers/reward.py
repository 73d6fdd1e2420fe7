"""The `reward` stage: an implicit process reward model from outcome labels alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.utils import disable_dropout_in_model

from rlhf_kit.credit.implicit import implicit_rewards, log_odds, outcome_cross_entropy
from rlhf_kit.data.load import load_data
from rlhf_kit.data.outcomes import OutcomeRows, collate_outcomes, encode_outcomes
from rlhf_kit.evals.steps import auc
from rlhf_kit.models.adapters import active_adapter
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.models.scorer import Scorer, add_log_prob_head, token_outputs
from rlhf_kit.trainers.config import Reward
from rlhf_kit.trainers.export import export_model, write_prm_record
from rlhf_kit.trainers.sampling import sample_completions
from rlhf_kit.trainers.setup import StageRun, build_args, train


def run_reward(stage: Reward, run: StageRun) -> dict[str, Any]:
    """Train the PRM, write `model/` with `prm.json`, and return the stage's results."""
    build = {"ce": _ce_trainer, "dpo": _paired_trainer, "nca": _paired_trainer, "kto": _kto_trainer}
    trainer, reference_path = build[stage.objective](stage, run)
    train(trainer, run)
    export_model(trainer, run.folder / "model")
    if trainer.is_world_process_zero():
        write_prm_record(run.folder / "model", stage.beta, reference_path)
    results: dict[str, Any] = {"updates": trainer.state.global_step}
    if isinstance(trainer, OutcomeTrainer):
        results |= trainer.held_out()
    if stage.step_evaluation is not None:
        from rlhf_kit.trainers.step_detection import detect_first_errors

        results["step_detection"] = detect_first_errors(stage, trainer, load_tokenizer(stage.model), run.folder)
    if results.keys() - {"updates"}:
        trainer.log({f"eval_{k}": v for k, v in results.items() if isinstance(v, float)})
    return results


class OutcomeTrainer(Trainer):
    """Binary cross-entropy, with logits, of `beta * sum_t log(phi / ref)` against outcome labels.

    arXiv 2412.01981, Eq. 5, with an optional offset (`Reward.offset`).
    """

    def __init__(
        self, *, stage: Reward, reference: Scorer, held_out_data: Dataset | None, tokenizer: Any, **kwargs: Any
    ) -> None:
        super().__init__(processing_class=tokenizer, **kwargs)
        self.stage = stage
        self.reference = reference
        self.held_out_data = held_out_data
        self.model_accepts_loss_kwargs = False

    def token_rewards(self, model: nn.Module, rows: OutcomeRows) -> Tensor:
        """Token rewards (B, T) of a collated batch."""
        arguments = (rows["prompt_ids"], rows["prompt_mask"], rows["completion_ids"], rows["completion_mask"])
        (log_probs,) = token_outputs(model, *arguments, micro_batch_size=len(rows["label"]))
        with torch.no_grad():
            (reference,) = self.reference.outputs(*arguments, micro_batch_size=len(rows["label"]))
        return implicit_rewards(log_probs, reference, rows["completion_mask"], self.stage.beta)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        rewards = self.token_rewards(model, inputs)
        loss = outcome_cross_entropy(rewards, inputs["label"], inputs["offset"]).mean()
        return (loss, {"rewards": rewards}) if return_outputs else loss

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Loss, and area under the ROC curve of the summed reward, on the held-out rows."""
        if self.held_out_data is None:
            return {}
        model = self.accelerator.unwrap_model(self.model).eval()
        scores, labels, losses = [], [], []
        for start in range(0, len(self.held_out_data), self.args.per_device_eval_batch_size):
            rows = self.held_out_data[start : start + self.args.per_device_eval_batch_size]
            batch = self._prepare_inputs(self.data_collator([dict(zip(rows, v)) for v in zip(*rows.values())]))
            rewards = self.token_rewards(model, batch)
            losses += outcome_cross_entropy(rewards, batch["label"], batch["offset"]).tolist()
            scores += rewards.sum(dim=1).tolist()
            labels += batch["label"].tolist()
        area = auc(
            [s for s, label in zip(scores, labels, strict=True) if label >= 0.5],
            [s for s, label in zip(scores, labels, strict=True) if label < 0.5],
        )
        return {"loss": sum(losses) / len(losses)} | ({"outcome_auc": area} if area is not None else {})


def _ce_trainer(stage: Reward, run: StageRun) -> tuple[Trainer, str]:
    args = build_args(TrainingArguments, run, stage.trainer.args, remove_unused_columns=False)
    set_seed(args.seed)
    model, tokenizer = _prm(stage), load_tokenizer(stage.model)
    encode = partial(_encoded, stage=stage, tokenizer=tokenizer)
    trainer = OutcomeTrainer(
        stage=stage,
        reference=_reference(stage, model, args.device),
        held_out_data=encode(load_data(stage.eval_data, sample_completions)) if stage.eval_data else None,
        tokenizer=tokenizer,
        model=model,
        args=args,
        train_dataset=encode(load_data(stage.data, sample_completions)),
        data_collator=partial(collate_outcomes, pad_token_id=tokenizer.pad_token_id),
        callbacks=list(run.callbacks),
    )
    return trainer, _reference_path(stage)


def _encoded(data: Dataset, stage: Reward, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    rows = encode_outcomes(data, tokenizer)
    labels = torch.tensor(rows["label"])
    if stage.offset == "none":
        offsets = torch.zeros(len(rows))
    elif stage.offset == "running":
        offsets = log_odds(labels.mean()).expand(len(rows))
    else:
        offsets = log_odds(_peer_rates(rows["prompt_ids"], labels))
    return rows.add_column("offset", offsets.tolist())


def _peer_rates(prompts: list[list[int]], labels: Tensor) -> Tensor:
    """Success rate of the other rows of the same prompt; 1/2 for a prompt of one row."""
    index: dict[tuple[int, ...], int] = {}
    group = torch.tensor([index.setdefault(tuple(prompt), len(index)) for prompt in prompts])
    totals = torch.zeros(len(index)).index_add(0, group, labels)
    counts = torch.zeros(len(index)).index_add(0, group, torch.ones_like(labels))
    others = counts[group] - 1
    return torch.where(others > 0, (totals[group] - labels) / others.clamp(min=1), 0.5)


def _prm(stage: Reward) -> PreTrainedModel | PeftModel:
    model = load_model(stage.model)
    disable_dropout_in_model(model)
    add_log_prob_head(model.get_base_model() if isinstance(model, PeftModel) else model)
    model.config.use_cache = False
    return model


def _reference(stage: Reward, model: PreTrainedModel | PeftModel, device: torch.device) -> Scorer:
    """The PRM's base with LoRA, unless another reference is named; else a frozen copy."""
    if isinstance(model, PeftModel) and stage.reference is None:
        return Scorer(model, [], partial(active_adapter, model, None))
    frozen = load_model((stage.reference or stage.model).model_copy(update={"peft": None})).requires_grad_(False)
    add_log_prob_head(frozen)
    return Scorer(frozen.eval().to(device), [], nullcontext)


def _reference_path(stage: Reward) -> str:
    config = stage.reference or stage.model
    return getattr(config, "path", "")


def _paired_trainer(stage: Reward, run: StageRun) -> tuple[Trainer, str]:
    loss = {"dpo": "sigmoid", "nca": "nca_pair"}[stage.objective]
    return _trl_trainer(stage, run, DPOTrainer, DPOConfig, ("prompt", "chosen", "rejected"), loss_type=[loss])


def _kto_trainer(stage: Reward, run: StageRun) -> tuple[Trainer, str]:
    return _trl_trainer(stage, run, KTOTrainer, KTOConfig, ("prompt", "completion", "label"))


def _trl_trainer(
    stage: Reward,
    run: StageRun,
    trainer_class: Callable[..., Trainer],
    config_class: type[TrainingArguments],
    columns: tuple[str, ...],
    **defaults: Any,
) -> tuple[Trainer, str]:
    args = build_args(config_class, run, stage.trainer.args, beta=stage.beta, **defaults)
    set_seed(args.seed)
    model = load_model(stage.model)
    reference = None
    if stage.reference is not None or not isinstance(model, PeftModel):
        reference = load_model((stage.reference or stage.model).model_copy(update={"peft": None}))
    trainer = trainer_class(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=load_data(stage.data, sample_completions).select_columns(list(columns)),
        processing_class=load_tokenizer(stage.model),
        callbacks=list(run.callbacks),
    )
    return trainer, _reference_path(stage)
