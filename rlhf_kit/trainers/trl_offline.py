"""TRL's DPO and KTO trainers on token ids instead of text."""

from __future__ import annotations

from typing import Any

from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer


class EncodedDpoTrainer(DPOTrainer):
    """DPOTrainer on rows of `prompt_ids, chosen_ids, rejected_ids`.

    TRL's own encoding joins prompt and completion as text first, so that tokens may merge across the border and are not
    those that were sampled.
    """

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return _with_room(dataset, args)


class EncodedKtoTrainer(KTOTrainer):
    """KTOTrainer on rows of `prompt_ids, completion_ids, label`; see `EncodedDpoTrainer`."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        dataset = _with_room(dataset, args)
        if not self.calculate_KL:
            return dataset
        size, own = args.per_device_train_batch_size, dataset["completion_ids"][:]
        batches = [own[start : start + size] for start in range(0, len(own), size)]
        # As TRL does: each prompt of a batch with the completion of the one before it.
        rotated = [ids for batch in batches for ids in (batch[-1], *batch[:-1])]
        return dataset.add_column("KL_completion_ids", rotated)


def _with_room(dataset: Any, args: Any) -> Any:
    """Rows whose prompt alone fills `max_length` have nothing left to learn from."""
    if args.max_length is None or getattr(args, "truncation_mode", "keep_start") != "keep_start":
        return dataset
    return dataset.filter(lambda row: len(row["prompt_ids"]) < args.max_length)
