"""TRL's DPO and KTO trainers on token ids instead of text."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from rlhf_kit.errors import RunError

logger = logging.getLogger(__name__)


class EncodedDpoTrainer(DPOTrainer):
    """DPOTrainer on rows of `prompt_ids, chosen_ids, rejected_ids`, those of `with_room`.

    TRL's own encoding joins prompt and completion as text first, so that tokens may merge across the border and are not
    those that were sampled.

    Attributes:
        cut: what `max_length` did to the rows, in `with_room`.
    """

    cut: Mapping[str, int] = {}

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset


class EncodedKtoTrainer(KTOTrainer):
    """KTOTrainer on rows of `prompt_ids, completion_ids, label`; see `EncodedDpoTrainer`."""

    cut: Mapping[str, int] = {}

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if not self.calculate_KL:
            return dataset
        size, own = args.per_device_train_batch_size, [row["completion_ids"] for row in dataset.to_list()]
        batches = [own[start : start + size] for start in range(0, len(own), size)]
        # As TRL does: each prompt of a batch with the completion of the one before it.
        rotated = [ids for batch in batches for ids in (batch[-1], *batch[:-1])]
        return dataset.add_column("KL_completion_ids", rotated)


def with_room(rows: Dataset, args: DPOConfig | KTOConfig, name: str) -> tuple[Dataset, dict[str, int]]:
    """The rows that TRL's `max_length` leaves something to learn from; how many it leaves out and how many it cuts off.

    A row whose prompt alone fills `max_length` has no completion left; of another that is longer the rest is cut off.
    `name` (`data`, `eval_data`) is what a warning calls them.

    Raises:
        RunError: there is no such row.
    """
    limit = args.max_length
    if limit is None:
        return rows, {}
    drops = getattr(args, "truncation_mode", "keep_start") == "keep_start"  # the other mode takes of the prompt
    sizes = [(len(row["prompt_ids"]), longest(row)) for row in rows.to_list()]
    kept = [place for place, (prompt, _) in enumerate(sizes) if prompt < limit or not drops]
    if not kept:
        raise RunError(
            f"trainer.args.max_length: the prompts of all {len(rows)} rows of {name} have {limit} tokens or more, so "
            "that no completion is left: write more, or null"
        )
    left_out, cut_off = len(rows) - len(kept), sum(sizes[place][1] > limit for place in kept)
    if left_out or cut_off:
        logger.warning(
            "trainer.args.max_length %d cuts off %d of %d rows of %s, and leaves out %d whose prompt alone fills it",
            *(limit, cut_off, len(rows), name, left_out),
        )
    return rows.select(kept), {"left_out": left_out, "cut_off": cut_off}


def longest(row: Mapping[str, Any]) -> int:
    """Tokens of the longest prompt and completion of a row of ids."""
    ids = {name: len(value) for name, value in row.items() if name.endswith("_ids")}
    prompts = [size for name, size in ids.items() if name.endswith("prompt_ids")]
    return max(prompts) + max(size for name, size in ids.items() if not name.endswith("prompt_ids"))
