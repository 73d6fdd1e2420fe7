"""Any TRL reward function, unchanged, as a reward source."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

from rlhf_kit.rewards.config import BuildContext, SourceConfig
from rlhf_kit.rollout import RewardSource, Rollout, TokenRewards

ENTRY_POINTS = "rlhf_kit.rewards"


class FunctionConfig(SourceConfig):
    """A function of one's own: passed in Python by name, or an entry point of the group `rlhf_kit.rewards`.

    `bounded` says that it lies in [0, 1] and judges the outcome, so that an online PRM may learn from it.
    """

    type: Literal["function"]
    function: str
    bounded: bool = False

    @property
    def kind(self) -> Literal["outcome", "process"]:
        return "outcome"

    @property
    def source_name(self) -> str:
        return self.name or self.function

    @property
    def labels_outcomes(self) -> bool:
        """An online PRM may learn from its rewards."""
        return self.bounded

    def build(self, context: BuildContext) -> Function:
        function = context.functions.get(self.function)
        return Function(self.source_name, function or _from_entry_point(self.function), self.bounded)


class Function(RewardSource):
    """`f(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns) -> list[float | None]`.

    Plain or async, as TRL calls it; `trainer_state` has the rollout's `global_step`, what `log_metric` is given is
    logged as the source's, and `log_extra`, which fills TRL's table of completions, does nothing.
    """

    kind = "outcome"

    def __init__(self, name: str, function: Callable[..., Any], bounded: bool = False) -> None:
        self.name = name
        self._bounded = bounded
        self._function = function

    def score(self, rollout: Rollout) -> TokenRewards:
        """The function's score on the last action token; `None` is a row of another task.

        Raises:
            ValueError: it returned another number of scores than there are completions, or one outside [0, 1]
                though it is bounded.
        """
        from rlhf_kit.rewards.outcome import outcome_rewards

        ids = [row[mask].tolist() for row, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)]
        metrics: dict[str, list[float]] = {}
        scores = self._function(
            prompts=list(rollout.prompts),
            completions=list(rollout.completions),
            completion_ids=ids,
            trainer_state=SimpleNamespace(global_step=rollout.step),
            log_extra=lambda column, values: None,
            log_metric=lambda name, value: metrics.setdefault(name, []).append(float(value)),
            **{name: list(values) for name, values in rollout.columns.items()},
        )
        if inspect.isawaitable(scores):
            scores = asyncio.run(_result(scores))
        if len(scores) != len(rollout):
            raise ValueError(
                f"reward function '{self.name}' returned {len(scores)} scores for {len(rollout)} completions; "
                "return one score (or None) per completion"
            )
        self._check_bounds(scores)
        means = {name: sum(values) / len(values) for name, values in metrics.items()}
        return replace(outcome_rewards(scores, rollout), metrics=means)

    def _check_bounds(self, scores: Sequence[float | None]) -> None:
        if not self._bounded:
            return
        outside = [score for score in scores if score is not None and (score < 0 or score > 1)]
        if outside:
            raise ValueError(
                f"reward function '{self.name}' returned {outside[0]}, and with bounded: true its scores are outcomes "
                "in [0, 1]; scale them, or write bounded: false"
            )


async def _result(awaitable: Any) -> Any:
    return await awaitable


def _from_entry_point(name: str) -> Callable[..., Any]:
    from importlib.metadata import entry_points

    points = entry_points(group=ENTRY_POINTS)
    if name not in points.names:
        known = ", ".join(sorted(points.names)) or "none is installed"
        raise ValueError(
            f"no reward function '{name}' (entry points of '{ENTRY_POINTS}': {known}); declare it as an entry point of "
            f"your package, or pass functions={{'{name}': f}} in Python"
        )
    return points[name].load()
