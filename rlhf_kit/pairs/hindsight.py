"""Builder of pairs in hindsight: what comes of two completions is simulated, then one is preferred (RLHS).

Feedback that is given at once prefers what sounds good. Here the simulated user reads each completion, decides, and is
shown what comes of it, as far as `mode` says; which of the two helped more is asked only then (arXiv 2501.08617).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from rlhf_kit.errors import RunError
from rlhf_kit.judges.config import JudgeConfig
from rlhf_kit.pairs.builder import Row
from rlhf_kit.pairs.compared import FAILED, NOT_APPLICABLE, TIED, ComparedPairs, Comparing, Judged, judged
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.simulation import Simulation

if TYPE_CHECKING:
    from rlhf_kit.pairs.config import Pairs
    from rlhf_kit.pairs.context import PairsContext
    from rlhf_kit.rewards.simulated_user import Lived, Scene, User


class Hindsight(Simulation, Comparing):
    """Of every two completions of a prompt, the one that its user prefers after what came of each.

    A language model as the user (`judge`) is shown both stories in both orders; a side's score is the probability of
    being preferred, the mean over the orders. The marketplace's rule prefers what satisfied it more, and scores are
    satisfactions: with two completions these are the pairs of `sampled` with the reward `hindsight`. The rows tell
    decisions and outcomes, and in the marketplace the true utilities.
    """

    type: Literal["hindsight"]

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.user_columns, *super().columns)

    @property
    def judged_by(self) -> tuple[JudgeConfig, ...]:
        return tuple(config for config in (self.judge, self.world) if not isinstance(config, str))

    def problems(self, stage: Pairs) -> Iterator[Problem]:
        yield from super().problems(stage)
        yield from (problem.under("builder") for problem in self.simulation_problems())
        if self.prompts.rating is not None:
            yield Problem("builder.prompts.rating", "is never used: nothing is rated", remedy="remove it")

    def build(self, context: PairsContext) -> HindsightPairs:
        return HindsightPairs(context, self)


class HindsightPairs(ComparedPairs):
    """See `Hindsight`."""

    facts_of_sides: ClassVar = ("decision", "outcome", "true_utility")

    def __init__(self, context: PairsContext, config: Hindsight) -> None:
        super().__init__(context, config)
        self._config = config

    @cached_property
    def user(self) -> User:
        """The simulated user."""
        return self._config.user(cast(Any, self.context))  # which has all that `PolicyContext` asks for

    def compare(self, rows: Sequence[Row], pairs: Sequence[tuple[int, int]]) -> list[Judged]:
        """Every completion is lived through once, whatever the number of its pairs."""
        places = sorted({place for pair in pairs for place in pair})
        scenes = {place: scene for place in places if (scene := self._scene(rows[place])) is not None}
        lived = dict(zip(scenes, self.user.live(list(scenes.values()), self._config.mode)(), strict=True))
        whole = {place: one for place, one in lived.items() if one is not None}
        asked = [pair for pair in pairs if set(pair) <= set(whole)]
        given = dict(zip(asked, self.user.compare([(whole[one], whole[other]) for one, other in asked]), strict=True))
        found = []
        for one, other in pairs:
            if (one, other) in given:
                found.append(_judged(whole[one], whole[other], given[one, other]))
            else:
                found.append(Judged(dropped=FAILED if {one, other} <= set(scenes) else NOT_APPLICABLE))
        return found

    def _scene(self, row: Row) -> Scene | None:
        try:
            return self._config.scene(row["prompt"], row["completion"], row, f"prompt {row['prompt_index'] + 1}")
        except ValueError as error:
            raise RunError(str(error)) from error


def _judged(one: Lived, other: Lived, odds: tuple[float, float] | None) -> Judged:
    facts = (_facts(one), _facts(other))
    if one.felt is None or other.felt is None:
        return judged(odds, facts)
    scores = one.felt.satisfaction, other.felt.satisfaction
    return Judged(scores, TIED if scores[0] == scores[1] else "", facts)


def _facts(lived: Lived) -> Row:
    from rlhf_kit.data.customer import true_utility

    market = lived.scene.market
    utility = None if market is None else true_utility(market, lived.bought)
    return {
        "decision": lived.scene.decisions[lived.decision],
        "outcome": lived.outcome or None,
        "true_utility": utility,
    }
