"""The `reward` stage: an implicit process reward model from outcome labels alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from datasets import Dataset
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.utils import disable_dropout_in_model

from rlhf_kit.credit.implicit import implicit_rewards, log_odds, outcome_cross_entropy
from rlhf_kit.data.config import DataConfig
from rlhf_kit.data.load import Sampler, load_data
from rlhf_kit.data.outcomes import OutcomeRows, collate_outcomes, encode_outcomes
from rlhf_kit.errors import RunError
from rlhf_kit.evals.steps import auc
from rlhf_kit.models.config import Scratch
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.models.scorer import Scorer, add_log_prob_head, base_scorer, token_outputs
from rlhf_kit.trainers.config import Reward
from rlhf_kit.trainers.export import export_model, write_prm_record
from rlhf_kit.trainers.offline import check_columns, reference_scorer
from rlhf_kit.trainers.sampling import sample_completions
from rlhf_kit.trainers.setup import StageRun, build_args, train
from rlhf_kit.trainers.step_detection import detect_first_errors, without_evaluated_problems

PAIR = ("prompt", "chosen", "rejected")
LABELLED = ("prompt", "completion", "label")


def run_reward(stage: Reward, run: StageRun) -> dict[str, Any]:
    """Train the PRM, write `model/` with `prm.json`, and return the stage's results.

    Raises:
        RunError: nothing says what the PRM is to be compared with, or its data lack a column.
    """
    reference_path = _reference_path(stage)
    tokenizer = load_tokenizer(stage.model)
    build = {"ce": _ce_trainer, "dpo": _dpo_trainer, "nca": _dpo_trainer, "kto": _kto_trainer}
    trainer, reference = build[stage.objective](stage, run, tokenizer)
    train(trainer, run)
    if trainer.is_world_process_zero():  # before the model, for it is uploaded with it
        write_prm_record(run.folder / "model", stage.beta, reference_path)
    export_model(trainer, run.folder / "model")
    results: dict[str, Any] = {"updates": trainer.state.global_step}
    prm = TrainedPrm(trainer, reference, stage.beta, tokenizer)
    if stage.eval_data is not None:
        data = _encoded(stage, stage.eval_data, tokenizer, _sampler(run))
        results |= held_out(prm, data, trainer.args.per_device_eval_batch_size, run.on_batch("evaluation"))
        trainer.log({f"eval_{name}": value for name, value in results.items() if name != "updates"})
    if stage.step_evaluation is not None:
        folder = run.folder if trainer.is_world_process_zero() else None
        on_batch = run.on_batch("step evaluation")
        results["step_detection"] = detect_first_errors(stage, prm.token_rewards, tokenizer, folder, on_batch)
    return results


def token_rewards(model: nn.Module, reference: Scorer, rows: OutcomeRows, beta: float) -> Float[Tensor, "B T"]:
    """`beta * (log phi - log ref)` of a collated batch's completions; gradients flow to `model`."""
    ids = (rows["prompt_ids"], rows["prompt_mask"], rows["completion_ids"], rows["completion_mask"])
    (log_probs,) = token_outputs(model, *ids, micro_batch_size=len(ids[0]))
    with torch.no_grad():
        (reference_log_probs,) = reference.outputs(*ids, micro_batch_size=len(ids[0]))
    return implicit_rewards(log_probs, reference_log_probs, rows["completion_mask"], beta)


class OutcomeTrainer(Trainer):
    """Binary cross-entropy, with logits, of `beta * sum_t log(phi / ref)` against outcome labels.

    arXiv 2412.01981, Eq. 5, with an optional offset (`Reward.offset`).
    """

    def __init__(self, *, reference: Scorer, beta: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reference = reference
        self.beta = beta
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss of a collated batch, and the summed rewards (B,) if `return_outputs`."""
        # The reference is not what accelerate has wrapped, and must compute in the same precision all the same.
        with self.accelerator.autocast():
            rewards = token_rewards(model, self.reference, inputs, self.beta)
        loss = outcome_cross_entropy(rewards, inputs["label"], inputs["offset"]).mean()
        return (loss, {"scores": rewards.sum(dim=1)}) if return_outputs else loss


class TrainedPrm:
    """The PRM that a trainer holds, as a scorer of rows of `encode_row`."""

    def __init__(self, trainer: Trainer, reference: Scorer, beta: float, tokenizer: PreTrainedTokenizerBase) -> None:
        self._accelerator = trainer.accelerator
        self._model = cast(nn.Module, trainer.accelerator.unwrap_model(trainer.model))
        self._reference = reference
        self._beta = beta
        self._pad = cast(int, tokenizer.pad_token_id)

    @torch.no_grad()
    def token_rewards(self, rows: Sequence[Mapping[str, Any]]) -> Float[Tensor, "B T"]:
        """Token rewards of each row's completion, right-padded with 0."""
        batch = collate_outcomes(rows, self._pad)
        on_device = {name: tensor.to(self._accelerator.device) for name, tensor in batch.items()}
        with self._accelerator.autocast():
            return token_rewards(self._model.eval(), self._reference, on_device, self._beta).cpu()


def held_out(
    prm: TrainedPrm,
    data: Dataset,
    batch_size: int,
    on_batch: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, float]:
    """Cross-entropy, and area under the ROC curve, of the summed rewards of labelled rows."""
    scores: list[float] = []
    losses: list[float] = []
    for start in range(0, len(data), batch_size):
        on_batch(start, len(data))
        rows = data.select(range(start, min(start + batch_size, len(data)))).to_list()
        rewards = prm.token_rewards(rows)
        labels, offsets = (torch.tensor([row[name] for row in rows]) for name in ("label", "offset"))
        losses += outcome_cross_entropy(rewards, labels, offsets).tolist()
        scores += rewards.sum(dim=1).tolist()
    on_batch(len(data), len(data))
    right = [score for score, label in zip(scores, data["label"], strict=True) if label >= 0.5]
    wrong = [score for score, label in zip(scores, data["label"], strict=True) if label < 0.5]
    area = auc(right, wrong)
    return {"loss": sum(losses) / len(losses)} | ({"outcome_auc": area} if area is not None else {})


# --- data ---


def _sampler(run: StageRun) -> Sampler:
    return partial(sample_completions, on_batch=run.on_batch("sampling"))


def _load(stage: Reward, config: DataConfig, sampler: Sampler) -> Dataset:
    """The columns that the objective learns from, less the problems that `step_evaluation` judges."""
    data = without_evaluated_problems(stage, load_data(config, sampler))
    columns = PAIR if stage.objective in ("dpo", "nca") else LABELLED
    check_columns(data, columns, stage.objective)
    kept = [name for name in (*columns, "completion_ids") if name in data.column_names]
    return data.select_columns(kept if stage.objective == "ce" else list(columns))


def _encoded(stage: Reward, config: DataConfig, tokenizer: PreTrainedTokenizerBase, sampler: Sampler) -> Dataset:
    """Labelled rows as token ids, with their offsets; a pair gives a right and a wrong row."""
    data = cast(Iterable[dict[str, Any]], _load(stage, config, sampler))
    if stage.objective in ("dpo", "nca"):
        data = [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in data
            for name in ("chosen", "rejected")
        ]
    rows = encode_outcomes(data, tokenizer)
    labels = torch.tensor(rows["label"][:])
    if stage.offset == "none":
        offsets = torch.zeros(len(rows))
    elif stage.offset == "running":
        offsets = log_odds(labels.mean()).expand(len(rows))
    else:
        offsets = log_odds(peer_rates(rows["prompt_ids"][:], labels))
    return cast(Any, rows).add_column("offset", offsets.tolist())


def peer_rates(prompts: Sequence[Sequence[int]], labels: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Success rate of the other rows of the same prompt; 1/2 for a prompt of one row."""
    index: dict[tuple[int, ...], int] = {}
    group = torch.tensor([index.setdefault(tuple(prompt), len(index)) for prompt in prompts])
    totals = torch.zeros(len(index)).index_add(0, group, labels)
    counts = torch.zeros(len(index)).index_add(0, group, torch.ones_like(labels))
    others = counts[group] - 1
    return torch.where(others > 0, (totals[group] - labels) / others.clamp(min=1), 0.5)


# --- trainers ---


def _ce_trainer(stage: Reward, run: StageRun, tokenizer: PreTrainedTokenizerBase) -> tuple[Trainer, Scorer]:
    args = build_args(TrainingArguments, run, stage.trainer.args, remove_unused_columns=False, label_names=["label"])
    set_seed(args.seed)
    model = load_model(stage.model)
    disable_dropout_in_model(cast(nn.Module, model))
    add_log_prob_head(model)
    reference = reference_scorer(model, stage.model, stage.reference, args.device)
    evaluates = stage.eval_data is not None and args.eval_strategy != "no"
    sampler = _sampler(run)
    trainer = OutcomeTrainer(
        reference=reference,
        beta=stage.beta,
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=_encoded(stage, stage.data, tokenizer, sampler),
        eval_dataset=_encoded(stage, stage.eval_data, tokenizer, sampler) if stage.eval_data and evaluates else None,
        data_collator=partial(collate_outcomes, pad_token_id=cast(int, tokenizer.pad_token_id)),
        callbacks=list(run.callbacks),
    )
    return trainer, reference


def _dpo_trainer(stage: Reward, run: StageRun, tokenizer: PreTrainedTokenizerBase) -> tuple[Trainer, Scorer]:
    loss = {"dpo": "sigmoid", "nca": "nca_pair"}[stage.objective]
    return _trl_trainer(stage, run, tokenizer, DPOTrainer, DPOConfig, loss_type=[loss])


def _kto_trainer(stage: Reward, run: StageRun, tokenizer: PreTrainedTokenizerBase) -> tuple[Trainer, Scorer]:
    return _trl_trainer(stage, run, tokenizer, KTOTrainer, KTOConfig)


def _trl_trainer(
    stage: Reward,
    run: StageRun,
    tokenizer: PreTrainedTokenizerBase,
    trainer_class: Callable[..., Trainer],
    config_class: type[TrainingArguments],
    **defaults: Any,
) -> tuple[Trainer, Scorer]:
    """TRL's trainer, whose model carries the head of `add_log_prob_head` once it is built."""
    args = build_args(config_class, run, stage.trainer.args, beta=stage.beta, **defaults)
    set_seed(args.seed)
    model = load_model(stage.model)
    shared = isinstance(model, PeftModel) and stage.reference is None
    evaluates = stage.eval_data is not None and args.eval_strategy != "no"
    frozen = None if shared else _frozen(stage, args.device)
    sampler = _sampler(run)
    trainer = trainer_class(
        model=model,
        ref_model=None if frozen is None else frozen.model,
        args=args,
        train_dataset=_load(stage, stage.data, sampler),
        eval_dataset=_load(stage, stage.eval_data, sampler) if stage.eval_data and evaluates else None,
        processing_class=tokenizer,
        callbacks=list(run.callbacks),
    )
    return trainer, base_scorer(cast(PeftModel, model)) if frozen is None else frozen


# --- reference ---


def _frozen(stage: Reward, device: torch.device) -> Scorer:
    """A model of its own; TRL's trainers add the head themselves, and divide it as they do the PRM."""
    config = (stage.reference or stage.model).model_copy(update={"peft": None})
    return Scorer(cast(nn.Module, load_model(config)).requires_grad_(False).eval().to(device), [])


def _reference_path(stage: Reward) -> str:
    reference = stage.reference or stage.model
    if isinstance(reference, Scratch):
        raise RunError(
            "an implicit PRM is compared with the weights that it starts from, and those of a model from scratch are "
            "lost: train it by an sft stage first, or set `reference`"
        )
    return reference.path
