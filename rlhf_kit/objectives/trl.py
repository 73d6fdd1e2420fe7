"""Objectives that TRL's own trainers compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from rlhf_kit.config import Config
from rlhf_kit.objectives.base import PAIRED
from rlhf_kit.problems import Problem, listed

DpoLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")


class TrlObjective(Config):
    """What TRL's trainer is given, in its own words; whatever else it takes goes into `trainer.args`.

    `columns_read` are the columns that a row must have.
    """

    columns_read: ClassVar[tuple[str, ...]]

    numbers: ClassVar[Mapping[str, float | None]] = {}

    type: str

    @property
    def compares(self) -> bool:
        """Whether it reads a reference."""
        return True

    def problems(self) -> Iterator[Problem]:
        """Fields that do not go together; paths start at the objective."""
        return iter(())

    def row_problem(self, row: Mapping[str, Any]) -> str | None:
        """What is wrong with a row's numbers."""
        return None

    def args(self) -> dict[str, Any]:
        """TRL's arguments."""
        return self.model_dump(exclude={"type"}, exclude_none=True)


class Dpo(TrlObjective):
    """Direct preference optimisation (arXiv 2305.18290) and its relatives: any of TRL's `loss_type`s, or their sum
    with `loss_weights`. `label_smoothing`, the probability that a preference is flipped, is read by some of them alone.
    """

    columns_read: ClassVar = PAIRED

    type: Literal["dpo"]
    beta: PositiveFloat = 0.1
    loss_type: Annotated[tuple[DpoLoss, ...], Field(min_length=1)] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0

    def problems(self) -> Iterator[Problem]:
        losses, weights = self.loss_type, self.loss_weights
        if weights is not None and len(weights) != len(losses):
            remedy = f"write {len(losses)}, or leave it out: every loss then weighs 1"
            yield Problem("loss_weights", f"has no weight for each loss of {listed(losses)}", list(weights), remedy)
        if "exo_pair" in losses and self.label_smoothing == 0:
            what = "must be greater than 0 for exo_pair, which takes its logarithm"
            yield Problem("label_smoothing", what, self.label_smoothing, "write 1e-3, its paper's")
        if self.label_smoothing > 0 and not set(losses) & set(SMOOTHED):
            what = f"is never read by {listed(losses)}, only by {listed(SMOOTHED)}"
            yield Problem("label_smoothing", what, self.label_smoothing, "remove it, or use robust")

    def args(self) -> dict[str, Any]:
        given = super().args()
        return given | {name: list(given[name]) for name in ("loss_type", "loss_weights") if name in given}


class Kto(TrlObjective):
    """Kahneman-Tversky optimisation (arXiv 2402.01306) on single completions with a label."""

    columns_read: ClassVar = ("prompt", "completion", "label")

    type: Literal["kto"]
    beta: PositiveFloat = 0.1
    desirable_weight: NonNegativeFloat = 1.0
    undesirable_weight: NonNegativeFloat = 1.0
