"""Drawing of new prompts in the place of those that are too easy or too hard (DAPO's dynamic sampling)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from rlhf_kit.errors import RunError
from rlhf_kit.trainers.rollouts import Ranks

Row = dict[str, Any]
Generated = tuple[Any, ...]


@dataclass(frozen=True)
class Resampler:
    """Generates until every group of this rank's rows is in the accuracy band, or the rounds are used up.

    Attributes:
        dataset: where new prompts come from.
        group_size: completions a prompt; this rank's rows must be whole groups.
        max_rounds: generations at most, the first included.
        generate: completions for rows, as TRL returns them: lists with one entry a row.
        in_band: (rows,) of generated rows whose group is kept, and what is known of each row since it was judged.
        ranks: all ranks go through the same number of rounds, for generation waits for everyone.
    """

    dataset: Dataset
    group_size: int
    max_rounds: int
    generate: Callable[[list[Row]], Generated]
    in_band: Callable[[list[Row], Generated], tuple[Tensor, list[Any]]]
    ranks: Ranks

    def __call__(self, rows: list[Row], seed: int) -> tuple[list[Row], Generated, list[Any], int]:
        """The rows that were kept, filled up with the last that were not; their completions; what is known; the rounds.

        Raises:
            RunError: the rows are no whole groups.
        """
        if len(rows) % self.group_size:
            raise RunError(
                f"accuracy_band.mode resample needs whole groups on each process, and {len(rows)} rows a process are "
                f"no multiple of num_generations {self.group_size}; change per_device_train_batch_size, or use mask"
            )
        wanted = len(rows) // self.group_size
        generator = torch.Generator().manual_seed(seed)
        kept: list[tuple[list[Row], Generated]] = []
        rejected: list[tuple[list[Row], Generated]] = []
        rounds = 0
        while True:
            rounds += 1
            generated = self.generate(rows)
            inside, known = self.in_band(rows, generated)
            for start in range(0, len(rows), self.group_size):
                stop = start + self.group_size
                group = (rows[start:stop], _rows_of((*generated, known), start, stop))
                (kept if bool(inside[start]) else rejected).append(group)
            missing = torch.tensor([max(wanted - len(kept), 0)], device=inside.device)
            if rounds >= self.max_rounds or self.ranks.sum(missing).item() == 0:
                break
            rows = self._draw(wanted, generator)
        chosen = [*kept[:wanted], *rejected[::-1]][:wanted]
        *generated, known = _concatenate([part for _, part in chosen])
        return [row for group, _ in chosen for row in group], tuple(generated), known, rounds

    def _draw(self, groups: int, generator: torch.Generator) -> list[Row]:
        indices = torch.randint(len(self.dataset), (groups,), generator=generator).tolist()
        return [self.dataset[index] for index in indices for _ in range(self.group_size)]


def _rows_of(generated: Generated, start: int, stop: int) -> Generated:
    return tuple(_slice(part, start, stop) for part in generated)


def _slice(part: Any, start: int, stop: int) -> Any:
    if isinstance(part, dict):
        return {key: _slice(value, start, stop) for key, value in part.items()}
    return part[start:stop] if isinstance(part, list) else part


def _concatenate(parts: Sequence[Generated]) -> Generated:
    return tuple(_joined(column) for column in zip(*parts, strict=True))


def _joined(column: Sequence[Any]) -> Any:
    first = column[0]
    if isinstance(first, list):
        return [value for part in column for value in part]
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in column]) for key in first}
    return first
