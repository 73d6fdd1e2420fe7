"""What an offline stage measures on held-out rows before and after training, the same on every process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from rlhf_kit.data.load import load_data
from rlhf_kit.data.outcomes import collate_outcomes
from rlhf_kit.evals.accuracy import greedy_scores
from rlhf_kit.evals.preference import Likelihood, length_only, pair_accuracy, verdicts
from rlhf_kit.evals.resampling import mean_estimate
from rlhf_kit.models.scorer import Scorer, token_outputs
from rlhf_kit.models.zero3 import whole
from rlhf_kit.trainers.config import HeldOutEvaluation
from rlhf_kit.trainers.setup import StageRun

TIE = 0.5  # what a model is worth as a reward when it is compared with itself
SIDES = ("chosen", "rejected")


class HeldOutPairs:
    """Preference accuracy of the model as an implicit reward (`rlhf_kit.evals.preference`).

    Args:
        reference: what it is compared with, if the objective does so.
        rows: `prompt_ids, chosen_ids, rejected_ids`; without them nothing is measured.
        starts_as_reference: whether the model starts as its reference, so that every reward is 0 then.
    """

    def __init__(
        self,
        trainer: Trainer,
        reference: Scorer | None,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset | None,
        starts_as_reference: bool,
        run: StageRun,
    ) -> None:
        self._trainer = trainer
        self._reference = reference
        self._pad = cast(int, tokenizer.pad_token_id)
        self._rows = [] if rows is None else rows.to_list()
        self._starts_as_reference = starts_as_reference and reference is not None
        self._on_batch = run.on_batch("preference accuracy")
        self._before: list[float] = []

    def start(self) -> dict[str, Any]:
        """Before training."""
        if not self._rows:
            return {}
        if self._starts_as_reference:
            self._before = [0.0] * len(self._rows)
            return {"eval_preference_accuracy_start": TIE}
        model = cast(nn.Module, self._trainer.model)
        with whole(model.parameters()):
            self._before = self._margins(model)
        found = pair_accuracy(self._before)
        return {
            "eval_preference_accuracy_start": found.accuracy,
            "eval_preference_accuracy_start_interval": list(found.interval),
        }

    def end(self) -> dict[str, Any]:
        """After it, with what length alone would tell."""
        if not self._rows:
            return {}
        model = cast(nn.Module, self._trainer.accelerator.unwrap_model(self._trainer.model))
        after = self._margins(model)
        found = pair_accuracy(after)
        gains = [new - old for new, old in zip(verdicts(after), verdicts(self._before), strict=True)]
        gain = mean_estimate(gains)
        assert gain is not None  # there are rows
        chosen, rejected = ([len(row[f"{side}_ids"]) for row in self._rows] for side in SIDES)
        lengths = length_only(chosen, rejected)
        return {
            "eval_preference_accuracy": found.accuracy,
            "eval_preference_accuracy_interval": list(found.interval),
            "eval_preference_accuracy_gain": gain.value,
            "eval_preference_accuracy_gain_interval": [gain.low, gain.high],
            "eval_preference_pairs": found.pairs,
            "eval_length_only_accuracy": lengths.accuracy,
            "eval_length_only_prefers": lengths.prefers,
        }

    def _margins(self, model: nn.Module) -> list[float]:
        """Reward of the chosen less that of the rejected completion, pair by pair; ranks share the pairs.

        All ranks take as many batches, so that a divided model does not wait for one that is done.
        """
        accelerator = self._trainer.accelerator
        rank, world, size = accelerator.process_index, accelerator.num_processes, self._trainer.args.eval_batch_size
        share = -(-len(self._rows) // world)
        places = [rank + k * world for k in range(share)]
        was_training = model.training
        model.eval()
        own: list[float] = []
        for start in range(0, share, size):
            self._on_batch(min(start * world, len(self._rows)), len(self._rows))
            batch = [self._rows[place % len(self._rows)] for place in places[start : start + size]]
            own += self._margins_of(model, batch)
        model.train(was_training)
        self._on_batch(len(self._rows), len(self._rows))
        gathered = cast(list[tuple[int, float]], gather_object(list(zip(places, own, strict=True))))
        found = dict(gathered)
        return [found[place] for place in range(len(self._rows))]

    @torch.no_grad()
    def _margins_of(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> list[float]:
        pairs = [
            {"prompt_ids": row["prompt_ids"], "completion_ids": row[f"{side}_ids"]} for side in SIDES for row in rows
        ]
        device = self._trainer.accelerator.device
        batch = {name: tensor.to(device) for name, tensor in collate_outcomes(pairs, self._pad).items()}
        ids = [batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")]
        with self._trainer.accelerator.autocast():
            sums = token_outputs(model, *ids, micro_batch_size=len(pairs))[0].sum(dim=1).tolist()
            references: list[float | None] = [None] * len(pairs)
            if self._reference is not None:
                (log_probs,) = self._reference.outputs(*ids, micro_batch_size=len(pairs))
                references = log_probs.sum(dim=1).tolist()
        lengths = batch["completion_mask"].sum(dim=1).tolist()
        rewards = [Likelihood(*each).reward for each in zip(sums, references, lengths, strict=True)]
        return [rewards[place] - rewards[len(rows) + place] for place in range(len(rows))]


class HeldOutPrompts:
    """Accuracy of greedy completions, where the stage has an `evaluation`."""

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        evaluation: HeldOutEvaluation | None,
        run: StageRun,
    ) -> None:
        self._trainer = trainer
        self._tokenizer = tokenizer
        self._evaluation = evaluation
        self._on_batch = run.on_batch("evaluation")

    def start(self) -> dict[str, float]:
        """Before training."""
        if self._evaluation is None:
            return {}
        model = cast(nn.Module, self._trainer.model)
        with whole(model.parameters()):
            return {"eval_accuracy_start": self._accuracy(model, self._evaluation)}

    def end(self) -> dict[str, float]:
        """After it."""
        if self._evaluation is None:
            return {}
        model = cast(nn.Module, self._trainer.accelerator.unwrap_model(self._trainer.model))
        return {"eval_accuracy": self._accuracy(model, self._evaluation)}

    def _accuracy(self, model: nn.Module, evaluation: HeldOutEvaluation) -> float:
        accelerator = self._trainer.accelerator
        own = greedy_scores(
            model,
            self._tokenizer,
            load_data(evaluation.data),
            evaluation,
            accelerator.process_index,
            accelerator.num_processes,
            self._on_batch,
        )
        scores = cast(list[float], gather_object(own))
        return sum(scores) / len(scores)
