"""One training loop for every offline objective of the kit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer

from rlhf_kit.data.outcomes import collate_outcomes
from rlhf_kit.models.scorer import Scorer
from rlhf_kit.models.sequences import (
    Sequences,
    chosen_tokens,
    contrast_tokens,
    distributions,
    joined,
    kl_from,
    token_log_probs,
)
from rlhf_kit.objectives.base import Loss, Objective, Rows, Scored

Batch = dict[str, Any]


class ObjectiveTrainer(Trainer):
    """Minimises the mean over rows of an objective's loss.

    Args:
        objective: says which completions a row has, what must be computed for them, and the loss.
        reference: pi_ref, where the objective needs it.
    """

    def __init__(
        self, *, objective: Objective, reference: Scorer | None, tokenizer: PreTrainedTokenizerBase, **kwargs: Any
    ) -> None:
        self._pad = cast(int, tokenizer.pad_token_id)
        super().__init__(data_collator=self._collate, processing_class=tokenizer, **kwargs)
        self.objective = objective
        self.reference = reference
        self.model_accepts_loss_kwargs = False
        self._logged: dict[str, dict[str, list[Tensor]]] = {"train": {}, "eval": {}}

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss of a collated batch, and the objective's numbers if `return_outputs`."""
        rows = self.rows(model, inputs)
        loss = self.objective.loss(rows)
        numbers = self._numbers(rows, loss)
        for name, values in numbers.items():
            self._logged["train" if model.training else "eval"].setdefault(name, []).append(values)
        return (loss.rows.mean(), numbers) if return_outputs else loss.rows.mean()

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a held-out batch."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, cast(Batch, self._prepare_inputs(inputs))).detach(), None, None

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The held-out loss and the objective's numbers."""
        self._logged["eval"].clear()
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = {f"{metric_key_prefix}_{name}": mean for name, mean in self._means("eval").items()}
        self.log(means)
        return {**metrics, **means}

    def rows(self, model: nn.Module, inputs: Batch) -> Rows:
        """What the objective needs of a batch, from one forward of the model over all completions of its rows."""
        sequences = joined([Sequences(**inputs[role]) for role in self.objective.roles], self._pad)
        # The reference is not what accelerate has wrapped, and must compute in the same precision all the same.
        with self.accelerator.autocast():
            fields = self._score(model, sequences)
        count = len(sequences.prompt_ids) // len(self.objective.roles)
        split = {name: value.split(count) for name, value in fields.items()}
        completions = {
            role: Scored(**{name: parts[number] for name, parts in split.items()})
            for number, role in enumerate(self.objective.roles)
        }
        return Rows(completions, inputs["numbers"])

    def _score(self, model: nn.Module, sequences: Sequences) -> dict[str, Tensor]:
        needs, width = self.objective.needs, sequences.prompt_width
        fields = {"mask": sequences.completion_mask}
        if needs & {"kl", "contrast"}:
            log_p = distributions(model, sequences)
            fields["log_probs"] = chosen_tokens(log_p, sequences)
            if "contrast" in needs:
                fields["contrast"] = contrast_tokens(log_p, sequences, self.objective.contrasts)
            if "kl" in needs:
                with self._reference() as reference:
                    fields["kl"] = kl_from(distributions(reference, sequences), log_p, sequences.completion_mask)
        else:
            log_probs = token_log_probs(model, sequences, with_prompt="prompt" in needs)
            fields["log_probs"] = log_probs[:, width:]
            if "prompt" in needs:
                fields["prompt_log_probs"] = log_probs[:, :width]
                fields["prompt_mask"] = sequences.prompt_mask & (sequences.prompt_mask.cumsum(dim=1) > 1)
        if "reference" in needs:
            with self._reference() as reference:
                fields["reference"] = token_log_probs(reference, sequences)[:, width:]
        return fields

    @contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        assert self.reference is not None, f"{self.objective.type} needs a reference"
        with torch.no_grad(), self.reference.activate():
            yield self.reference.model

    def _collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        batch: Batch = {}
        for role in self.objective.roles:
            ids = [{name: row[f"{role}.{name}"] for name in ("prompt_ids", "completion_ids")} for row in rows]
            batch[role] = collate_outcomes(ids, self._pad)
        numbers = {name: torch.tensor([float(row[name]) for row in rows]) for name in self.objective.numbers}
        return {**batch, "numbers": numbers}

    def _numbers(self, rows: Rows, loss: Loss) -> dict[str, Tensor]:
        """The objective's numbers (B,), TRL's names for what a ranking says, and the completions' log-probabilities."""
        numbers = {name: values.detach() for name, values in loss.metrics.items()}
        numbers |= {f"logps/{role}": rows[role].sums.detach() for role in self.objective.roles}
        margins = self.objective.ranking(rows)
        if margins is not None:
            margins = margins.detach()
            right = torch.where(margins.isnan(), margins, (margins > 0).float())
            numbers |= {"rewards/margins": margins, "rewards/accuracies": right}
        return numbers

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means, over all ranks and the steps since the last log, of the objective's numbers."""
        if "loss" in logs:
            logs = {**logs, **self._means("train")}
        super().log(logs, start_time)

    def _means(self, mode: str) -> dict[str, float]:
        means, logged = {}, self._logged[mode]
        for name in sorted(logged):  # every rank has the same names
            values = torch.cat(logged[name]).float()
            sums = torch.stack([values.nansum(), (~values.isnan()).sum()])
            total, count = cast(Tensor, self.accelerator.reduce(sums)).tolist()
            if count:
                means[name] = total / count
        logged.clear()
        return means
