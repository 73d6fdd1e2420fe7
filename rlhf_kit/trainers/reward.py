"""The `reward` stage: an implicit process reward model from outcome labels alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer

from rlhf_kit.credit.implicit import implicit_rewards, log_odds, outcome_cross_entropy
from rlhf_kit.data.config import DataConfig
from rlhf_kit.data.load import Origins, Sampler, load_with_origins
from rlhf_kit.data.outcomes import OutcomeRows, collate_outcomes, encode_outcomes
from rlhf_kit.errors import RunError
from rlhf_kit.evals.steps import auc
from rlhf_kit.models.config import Scratch
from rlhf_kit.models.loading import load_tokenizer
from rlhf_kit.models.scorer import Scorer, token_outputs
from rlhf_kit.objectives.base import PAIRED, Objective
from rlhf_kit.objectives.implicit import Ce
from rlhf_kit.objectives.trl import Dpo, Kto, TrlObjective
from rlhf_kit.trainers.args import argument
from rlhf_kit.trainers.config import Reward
from rlhf_kit.trainers.export import export_model, write_prm_record
from rlhf_kit.trainers.offline import check_columns, offline_trainer, sampler_of, trl_rows, with_sampled_ids
from rlhf_kit.trainers.setup import StageRun, train
from rlhf_kit.trainers.step_detection import detect_first_errors, without_evaluated_problems

LABELLED = ("prompt", "completion", "label")


def run_reward(stage: Reward, run: StageRun) -> dict[str, Any]:
    """Train the PRM, write `model/` with `prm.json`, and return the stage's results.

    Raises:
        RunError: nothing says what the PRM is to be compared with, or its data lack a column.
    """
    reference_path = _reference_path(stage)
    tokenizer = load_tokenizer(stage.model)
    sampler = sampler_of(run)
    evaluates = argument(stage, "eval_strategy") != "no"
    trainer, reference = offline_trainer(
        stage,
        _objective(stage),
        run,
        tokenizer,
        partial(_rows, stage, tokenizer=tokenizer, sampler=sampler),
        stage.eval_data if evaluates else None,
    )
    assert reference is not None  # these objectives all compare
    train(trainer, run)
    if trainer.is_world_process_zero():  # before the model, for it is uploaded with it
        write_prm_record(run.folder / "model", stage.beta, reference_path)
    export_model(trainer, run.folder / "model")
    results: dict[str, Any] = {"updates": trainer.state.global_step}
    prm = TrainedPrm(trainer, reference, stage.beta, tokenizer)
    if stage.eval_data is not None:
        data = _labelled(stage, stage.eval_data, tokenizer, sampler)
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


def _objective(stage: Reward) -> Objective | TrlObjective:
    if stage.objective == "ce":
        return Ce(type="ce", beta=stage.beta)
    if stage.objective == "kto":
        return Kto(type="kto", beta=stage.beta)
    return Dpo(type="dpo", beta=stage.beta, loss_type=("sigmoid" if stage.objective == "dpo" else "nca_pair",))


def _load(stage: Reward, config: DataConfig, sampler: Sampler) -> tuple[Dataset, Origins]:
    """The columns that the objective learns from, less the problems that `step_evaluation` judges."""
    data, origins = load_with_origins(config, sampler)
    numbered = cast(Any, data).add_column("_place", list(origins.places))
    data = without_evaluated_problems(stage, numbered)
    columns = PAIRED if stage.objective in ("dpo", "nca") else LABELLED
    check_columns(data, columns, stage.objective)
    kept = data.select_columns(with_sampled_ids(columns, data))
    return kept, Origins(origins.source, data["_place"][:])


def _rows(stage: Reward, config: DataConfig, tokenizer: PreTrainedTokenizerBase, sampler: Sampler) -> Dataset:
    """Rows as the objective's trainer reads them."""
    if stage.objective != "ce":
        data, origins = _load(stage, config, sampler)
        return trl_rows(data, tokenizer, origins)
    rows = _labelled(stage, config, tokenizer, sampler)
    return rows.rename_columns({name: f"completion.{name}" for name in ("prompt_ids", "completion_ids")})


def _labelled(stage: Reward, config: DataConfig, tokenizer: PreTrainedTokenizerBase, sampler: Sampler) -> Dataset:
    """Labelled rows as token ids, with their offsets; a pair gives a right and a wrong row."""
    data, origins = _load(stage, config, sampler)
    rows, places = cast(Iterable[dict[str, Any]], data), origins.places
    if stage.objective in ("dpo", "nca"):
        rows = [
            {
                "prompt": row["prompt"],
                "completion": row[name],
                "completion_ids": row.get(f"{name}_ids"),
                "tools": row.get("tools"),
                "label": name == "chosen",
            }
            for row in rows
            for name in ("chosen", "rejected")
        ]
        places = [place for place in places for _ in range(2)]
    encoded = encode_outcomes(rows, tokenizer, Origins(origins.source, places))
    labels = torch.tensor(encoded["label"][:])
    if stage.offset == "none":
        offsets = torch.zeros(len(encoded))
    elif stage.offset == "running":
        offsets = log_odds(labels.mean()).expand(len(encoded))
    else:
        offsets = log_odds(peer_rates(encoded["prompt_ids"][:], labels))
    return cast(Any, encoded).add_column("offset", offsets.tolist())


def peer_rates(prompts: Sequence[Sequence[int]], labels: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Success rate of the other rows of the same prompt; 1/2 for a prompt of one row."""
    index: dict[tuple[int, ...], int] = {}
    group = torch.tensor([index.setdefault(tuple(prompt), len(index)) for prompt in prompts])
    totals = torch.zeros(len(index)).index_add(0, group, labels)
    counts = torch.zeros(len(index)).index_add(0, group, torch.ones_like(labels))
    others = counts[group] - 1
    return torch.where(others > 0, (totals[group] - labels) / others.clamp(min=1), 0.5)


# --- reference ---


def _reference_path(stage: Reward) -> str:
    reference = stage.reference or stage.model
    if isinstance(reference, Scratch):
        raise RunError(
            "an implicit PRM is compared with the weights that it starts from, and those of a model from scratch are "
            "lost: train it by an sft stage first, or set `reference`"
        )
    return reference.path
