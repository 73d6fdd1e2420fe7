"""A generated TRL batch as the kit's rollout, and the view over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_kit.credit.spans import token_offsets
from rlhf_kit.errors import RunError
from rlhf_kit.rollout import Rollout, Text

Result = TypeVar("Result")
NOT_COLUMNS = ("prompt", "completion", "completion_ids")


def build_rollout(
    batch: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[Text],
    completions: Sequence[Text],
    *,
    temperature: float,
    group_size: int,
    micro_batch_size: int,
    step: int,
) -> Rollout:
    """The rollout of this rank's rows, still without log-probabilities and offsets."""
    completion_mask = batch["completion_mask"].bool()
    tool_mask = batch.get("tool_mask")
    columns = {key: [row[key] for row in rows] for key in rows[0] if key not in NOT_COLUMNS}
    return Rollout(
        prompts=prompts,
        completions=completions,
        prompt_ids=batch["prompt_ids"],
        prompt_mask=batch["prompt_mask"].bool(),
        completion_ids=batch["completion_ids"],
        completion_mask=completion_mask,
        action_mask=completion_mask if tool_mask is None else completion_mask & tool_mask.bool(),
        temperature=temperature,
        columns=columns,
        group_size=group_size,
        micro_batch_size=micro_batch_size,
        step=step,
    )


def decoded(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> Rollout:
    """The rollout with its texts, and the character range of every sampled token; empty ranges on padding."""
    texts, offsets = [], []
    for row, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True):
        ids = row[mask].tolist()
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
        ranges = token_offsets(tokenizer, ids)
        end = len(texts[-1])
        offsets.append(ranges + [(end, end)] * (len(row) - len(ranges)))
    return replace(rollout, texts=texts, offsets=offsets)


def truncated_rows(
    rollout: Rollout, eos_token_ids: Sequence[int], ended_by_stop_string: Callable[[list[int]], bool]
) -> Bool[Tensor, "B"]:
    """Rows that reached the length limit: without an end-of-sequence token or a stop string at their end."""
    lengths = rollout.completion_mask.sum(dim=1)
    last = rollout.completion_ids.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1)
    ended = torch.isin(last, torch.tensor(list(eos_token_ids), device=last.device))
    rows = zip(rollout.completion_ids, rollout.completion_mask, strict=True)
    stopped = torch.tensor([ended_by_stop_string(ids[mask].tolist()) for ids, mask in rows], device=last.device)
    return ~ended & ~stopped & (lengths > 0)


class Ranks:
    """The rows of all ranks, in the order of the data: rank 0's first."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def all_rows(self, tensor: Tensor) -> Tensor:
        """(B, ...) of every rank concatenated; a ragged second dimension is padded with 0 on the right."""
        if self._accelerator.num_processes == 1:
            return tensor
        if tensor.ndim > 1:
            # accelerate pads a mask by adding an integer, on the ranks that are shorter alone: dtypes would differ.
            tensor = cast(Tensor, self._accelerator.pad_across_processes(tensor, dim=1)).to(tensor.dtype)
        return cast(Tensor, self._accelerator.gather(tensor))

    def own_rows(self, tensor: Tensor, like: Tensor) -> Tensor:
        """This rank's rows of an `all_rows` tensor, cut to the width of `like`."""
        start = self._accelerator.process_index * len(like)
        own = tensor[start : start + len(like)]
        return own[:, : like.shape[1]] if like.ndim > 1 and own.ndim > 1 else own

    def mean(self, tensor: Tensor) -> Tensor:
        """Elementwise mean over ranks."""
        return cast(Tensor, self._accelerator.reduce(tensor, reduction="mean"))

    def agreed(self, what: str, compute: Callable[[], Result]) -> Result:
        """What `compute` gives, once every rank knows that none has failed: the others would wait for it for ever.

        Raises:
            RunError: on every rank, if it raised on any.
        """
        result, error = None, None
        try:
            result = compute()
        except Exception as caught:
            error = caught
        failures = self.sum(torch.tensor([float(error is not None)], device=self._accelerator.device))
        if failures.item() > 0:
            where = "on this process" if error is not None else "on another process"
            raise RunError(f"{what} failed {where}: {error}") from error
        return cast(Result, result)

    def all_objects(self, values: list[Any]) -> list[Any]:
        """Python objects of every rank in one list."""
        return gather_object(values)

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over ranks."""
        return cast(Tensor, self._accelerator.reduce(tensor, reduction="sum"))


def masked_by(mask: Tensor, values: Tensor) -> Tensor:
    """`values` with exactly 0 outside the mask, whatever stood there."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
