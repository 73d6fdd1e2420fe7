"""Objectives that TRL's own trainers compute."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import NonNegativeFloat

from rlhf_kit.config import Config
from rlhf_kit.objectives.base import PAIRED


class TrlObjective(Config):
    """What TRL's trainer is given, in its own words; whatever else it takes goes into `trainer.args`.

    `columns_read` are the columns that a row must have.
    """

    columns_read: ClassVar[tuple[str, ...]]

    type: str

    def args(self) -> dict[str, Any]:
        """TRL's arguments."""
        return self.model_dump(exclude={"type"}, exclude_none=True)


class Dpo(TrlObjective):
    """Direct preference optimisation (arXiv 2305.18290) and its relatives: any of TRL's `loss_type`s, or their sum
    with `loss_weights`."""

    columns_read: ClassVar = PAIRED

    type: Literal["dpo"]
    beta: NonNegativeFloat = 0.1
    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: NonNegativeFloat = 0.0

    def args(self) -> dict[str, Any]:
        given = super().args()
        return given | {name: list(given[name]) for name in ("loss_type", "loss_weights") if name in given}


class Kto(TrlObjective):
    """Kahneman-Tversky optimisation (arXiv 2402.01306) on single completions with a label."""

    columns_read: ClassVar = ("prompt", "completion", "label")

    type: Literal["kto"]
    beta: NonNegativeFloat = 0.1
    desirable_weight: NonNegativeFloat = 1.0
    undesirable_weight: NonNegativeFloat = 1.0
