"""Stepping of a reward source that learns from each rollout, with an optimiser of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_kit.models.zero3 import whole
from rlhf_kit.rollout import RewardSource, Rollout
from rlhf_kit.trainers.rollouts import Ranks


class OnlineUpdate:
    """One optimiser step of a source on each rollout, the same on every rank.

    The source's parameters are outside the policy's engine: they are replicated, frozen for everyone else, and their
    gradients are summed over ranks here. The loss is the mean over the valid rows of all ranks.
    """

    def __init__(self, source: RewardSource, learning_rate: float, max_grad_norm: float, ranks: Ranks) -> None:
        self.source = source
        self._parameters = source.trainable_parameters()
        self._max_grad_norm = max_grad_norm
        self._ranks = ranks
        self.optimizer = torch.optim.AdamW(self._parameters, lr=learning_rate, weight_decay=0.0)
        for parameter in self._parameters:
            parameter.requires_grad_(False)

    def step(self, rollout: Rollout, outcomes: Tensor, valid: Tensor) -> dict[str, float]:
        """Learn from the outcomes (B,) of the valid rows; returns the loss before the step and the gradient's norm.

        A loss or gradient that is not finite leaves the source as it was, and is counted in `skipped`.
        """
        totals = self._ranks.sum(torch.stack([valid.sum().float(), torch.zeros_like(outcomes.sum())]))
        count = totals[0]
        if count == 0:
            return {}
        with self._trainable():
            loss = self._backward(rollout, outcomes, valid, count)
            with whole(self._parameters, modify=True):
                self._reduce_gradients()
                norm = nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
                sound = bool(torch.isfinite(norm) & torch.isfinite(loss))
                if sound:
                    self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item(), "grad_norm": norm.item(), "skipped": float(not sound)}

    def _backward(self, rollout: Rollout, outcomes: Tensor, valid: Tensor, count: Tensor) -> Tensor:
        total = torch.zeros((), device=outcomes.device)
        for start in range(0, len(rollout), rollout.micro_batch_size):
            stop = min(start + rollout.micro_batch_size, len(rollout))
            losses = self.source.loss(rollout.rows(start, stop), outcomes[start:stop])
            assert losses is not None
            share = torch.where(valid[start:stop], losses, 0.0).sum() / count
            share.backward()
            total += share.detach()
        return self._ranks.sum(total)

    def _reduce_gradients(self) -> None:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    @contextmanager
    def _trainable(self) -> Iterator[None]:
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self._parameters:
                parameter.requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Weights and optimiser state as safetensors."""
        save_file(
            {str(i): p.detach().contiguous() for i, p in enumerate(self._parameters)}, folder / "weights.safetensors"
        )
        moments = {
            f"{index}.{name}": value.contiguous()
            for index, state in self.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        save_file(moments, folder / "optimizer.safetensors")
        self.source.save(folder)

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote."""
        weights = load_file(folder / "weights.safetensors")
        with torch.no_grad():
            for index, parameter in enumerate(self._parameters):
                parameter.copy_(weights[str(index)])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(folder / "optimizer.safetensors").items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.source.load(folder)
