"""Configuration of the evaluations that run beside training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from rlhf_kit.config import Config, Location

Probability = Annotated[float, Field(ge=0, le=1)]
PartShare = Annotated[float, Field(gt=0, lt=1)]  # of two parts, neither of which is empty
# What each verifier reads of a row.
VERIFIER_COLUMN = {"exact": "answer", "math": "answer", "reasoning_gym": "reasoning_gym_entry", "marketplace": "has"}


class Evaluation(Config):
    """Held-out accuracy by greedy decoding, judged by a verifier."""

    verifier: Literal["exact", "math", "reasoning_gym", "marketplace"]
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 64


class StepTruth(Config):
    """Where the known truth of each step stands, for the step AUC of process rewards; no source is shown it.

    `column` holds the right steps; the completion is cut at `separator` and its k-th step is right while it equals
    the k-th right step. Steps behind the first wrong one are left out.
    """

    column: str = "steps"
    separator: str = " "


class StepEvaluation(Config):
    """First-wrong-step detection on ProcessBench rows (`problem`, `steps`, `label`; arXiv 2412.06559).

    Steps are joined by `separator` into the completion that the PRM reads. The threshold is set on
    `threshold_fraction` of the problems and judged on the others. Rows of the stage's data that are of one of these
    problems are left out.
    """

    path: Location
    separator: str = "\n"
    limit: PositiveInt | None = None
    threshold_fraction: PartShare = 0.5
