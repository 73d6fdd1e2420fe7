"""What every offline objective shares: what it reads of a row, and what its loss sees of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf_kit.config import Config
from rlhf_kit.problems import Problem

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

Need = Literal["prompt", "reference", "kl", "contrast"]


@dataclass(frozen=True)
class Scored:
    """One completion a row, as the model sees it; everything is 0 outside the masks.

    Attributes:
        log_probs: (B, T), log pi of the completion's tokens.
        mask: (B, T), tokens of the completion, its end included.
        prompt_log_probs: (B, P), log pi of the prompt's tokens but its first (`needs` prompt).
        prompt_mask: (B, P), those tokens.
        reference: (B, T), log pi_ref of the completion's tokens (`needs` reference).
        kl: (B, T), KL(pi_ref || pi) of the next token's whole distribution (`needs` kl).
        contrast: (B, T), log pi of a token drawn from the likeliest others (`needs` contrast).
    """

    log_probs: Float[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    prompt_log_probs: Float[Tensor, "B P"] | None = None
    prompt_mask: Bool[Tensor, "B P"] | None = None
    reference: Float[Tensor, "B T"] | None = None
    kl: Float[Tensor, "B T"] | None = None
    contrast: Float[Tensor, "B T"] | None = None

    @property
    def sums(self) -> Float[Tensor, "B"]:
        """log pi(y | x)."""
        return self.log_probs.sum(dim=1)

    @property
    def means(self) -> Float[Tensor, "B"]:
        """Mean log-probability of a token."""
        return self.sums / self.mask.sum(dim=1).clamp(min=1)

    @property
    def log_ratios(self) -> Float[Tensor, "B"]:
        """log pi(y | x) - log pi_ref(y | x)."""
        assert self.reference is not None, "the objective does not need reference"
        return self.sums - self.reference.sum(dim=1)


@dataclass(frozen=True)
class Rows:
    """A batch as an objective sees it.

    Attributes:
        completions: by role (`chosen`, `rejected`, `completion`, ...).
        columns: numbers of the rows (`label`, `weight`, ...), each (B,).
    """

    completions: Mapping[str, Scored]
    columns: Mapping[str, Float[Tensor, "B"]] = field(default_factory=dict)

    def __getitem__(self, role: str) -> Scored:
        return self.completions[role]


@dataclass(frozen=True)
class Loss:
    """The loss of each row (B,), and numbers (B,) for the log, NaN in a row that has none."""

    rows: Float[Tensor, "B"]
    metrics: Mapping[str, Float[Tensor, "B"]] = field(default_factory=dict)


class Objective(Config):
    """A pure loss on log-probabilities; the training loop asks it what it needs and knows nothing else of it.

    `roles` name, for each completion of a row, the columns of its prompt and its text; `numbers` are the columns of
    numbers, with the value of a row that has none (None: every row must have one).
    """

    roles: ClassVar[Mapping[str, tuple[str, str]]]
    numbers: ClassVar[Mapping[str, float | None]] = {}

    type: str

    @property
    def needs(self) -> frozenset[Need]:
        """What must be computed beside the completions' log-probabilities."""
        return frozenset()

    @property
    def compares(self) -> bool:
        """Whether it reads a reference."""
        return bool(self.needs & {"reference", "kl"})

    @property
    def columns_read(self) -> tuple[str, ...]:
        """The columns that a row must have."""
        texts = (column for pair in self.roles.values() for column in pair)
        numbers = (name for name, default in self.numbers.items() if default is None)
        return tuple(dict.fromkeys((*texts, *numbers)))

    @property
    def contrasts(self) -> int:
        """From how many of the likeliest other tokens `Scored.contrast` is drawn."""
        return 0

    def problems(self) -> Iterator[Problem]:
        """Fields that do not go together; paths start at the objective."""
        return iter(())

    def row_problem(self, row: Mapping[str, Any]) -> str | None:
        """What is wrong with a row's numbers."""
        for name, default in self.numbers.items():
            value = default if row.get(name) is None else row[name]
            if value is None:
                return f"{name!r} is missing"
            if not is_number(value):
                return f"{name!r} is {value!r}, and no number"
        return None

    def loss(self, rows: Rows) -> Loss:
        """Loss of each row."""
        raise NotImplementedError

    def ranking(self, rows: Rows) -> Float[Tensor, "B"] | None:
        """By how much the model prefers the chosen completion; None where rows are no pairs."""
        return None


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, or the text of one."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


PAIRED = ("prompt", "chosen", "rejected")
PAIR = {"chosen": ("prompt", "chosen"), "rejected": ("prompt", "rejected")}
SINGLE = {"completion": ("prompt", "completion")}
