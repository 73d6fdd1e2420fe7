"""Hindsight: consequences of a completion are simulated first, and then its user is asked (RLHS, arXiv 2501.08617).

Feedback that is given at once rewards what looks good. Here a simulated user reads the dialogue, decides, is shown what
comes of the decision (`rlhf_kit.rewards.simulated_user`), and only then rates the completion or prefers another to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from rlhf_kit.judges.base import Judge
from rlhf_kit.models.config import Pretrained, Scratch
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.config import BuildContext, SourceConfig
from rlhf_kit.rewards.simulation import Simulation
from rlhf_kit.rollout import RewardSource, Rollout, Text, TokenRewards

if TYPE_CHECKING:
    from rlhf_kit.rewards.simulated_user import Lived, Scene, User


class HindsightConfig(Simulation, SourceConfig):
    """Feedback of a simulated user in the light of what came of it, scaled to [-1, 1], on the last action token.

    What the user knows by then, who it is and what it may do says `Simulation`. A `rating` from 1 to 5 is scaled to
    `(rating - 3) / 2`; a `preference` is `2 P(preferred) - 1`, the mean over the other completions of the same prompt
    on this process. The log has `satisfaction` where the user is the rule, or rates: what a language model prefers says
    nothing of how content it is, for over the completions of a prompt the mean of P is 1/2 whatever they are.
    """

    type: Literal["hindsight"]
    feedback: Literal["rating", "preference"] = "rating"

    @property
    def kind(self) -> Literal["outcome", "process"]:
        return "outcome"

    @property
    def columns(self) -> tuple[str, ...]:
        return self.user_columns

    @property
    def feedback_choices(self) -> tuple[str, ...]:
        from rlhf_kit.rewards.simulated_user import RATINGS

        return RATINGS if self.feedback == "rating" else super().feedback_choices

    def problems(self, policy: Pretrained | Scratch, rewards: Sequence[SourceConfig]) -> Iterator[Problem]:
        return self.simulation_problems()

    def build(self, context: BuildContext) -> Hindsight:
        return Hindsight(self, self.user(context))


class Hindsight(RewardSource):
    """Gives each completion the feedback of a user who has lived through what came of it.

    A row whose user, world or feedback failed is `FAILED`. A row without decisions (neither of the marketplace nor with
    `options`), or without another completion to be preferred to, is not applicable; so is any other than the
    marketplace's where its rule is the user or the world is needed. A completion without a text is one that says
    nothing: its user decides all the same.
    """

    kind = "outcome"

    def __init__(self, config: HindsightConfig, user: User) -> None:
        self.name = config.source_name
        self._config = config
        self._user = user
        self._begun: tuple[Sequence[Text], Callable[[], dict[int, Lived | None]]] | None = None

    def judges(self) -> Mapping[str, Judge]:
        return self._user.judges()

    def begin(self, rollout: Rollout) -> None:
        """Ask for the decisions, which a server can take while models score."""
        try:
            self._begun = (rollout.completions, self._live(rollout))
        except Exception:  # it is raised again by `score`, where the ranks agree on it
            self._begun = None

    def score(self, rollout: Rollout) -> TokenRewards:
        """The feedback on the last action token."""
        from rlhf_kit.rewards.outcome import outcome_rewards

        begun, self._begun = self._begun, None
        finish = begun[1] if begun is not None and begun[0] is rollout.completions else self._live(rollout)
        lived = finish()
        whole = {row: one for row, one in lived.items() if one is not None}
        preferring = self._config.feedback == "preference"
        scores = self._preferences(rollout, whole) if preferring else self._ratings(whole)
        failed = {row: float("nan") for row, one in lived.items() if one is None}
        values = {**scores, **failed}
        rewards = outcome_rewards([values.get(row) for row in range(len(rollout))], rollout)
        return replace(rewards, metrics=self._metrics(whole, scores))

    def _live(self, rollout: Rollout) -> Callable[[], dict[int, Lived | None]]:
        """Begin to let the users of the rows that have any decide; gives what they have lived through."""
        scenes = {row: scene for row in range(len(rollout)) if (scene := self._scene(rollout, row)) is not None}
        finish = self._user.live(list(scenes.values()), self._config.mode)
        return lambda: dict(zip(scenes, finish(), strict=True))

    def _scene(self, rollout: Rollout, row: int) -> Scene | None:
        columns = {name: values[row] for name, values in rollout.columns.items()}
        where = f"row {row + 1} of the rollout"
        return self._config.scene(rollout.prompts[row], rollout.completions[row], columns, where)

    def _ratings(self, lived: dict[int, Lived]) -> dict[int, float]:
        ratings = self._user.rate(list(lived.values()))
        return {
            row: float("nan") if rating is None else (rating - 3) / 2
            for row, rating in zip(lived, ratings, strict=True)
        }

    def _preferences(self, rollout: Rollout, lived: dict[int, Lived]) -> dict[int, float]:
        """`2 P - 1`, P the mean probability of being preferred to the other completions of the prompt.

        A comparison that failed is left out; a row is `FAILED` only if all of its own did.
        """
        pairs = [
            (one, other)
            for _, group in groupby(lived, key=lambda row: rollout.prompts[row])
            for rows in [list(group)]
            for place, one in enumerate(rows)
            for other in rows[place + 1 :]
        ]
        given = self._user.prefer([(lived[one], lived[other]) for one, other in pairs])
        shares: dict[int, list[float | None]] = {}
        for (one, other), share in zip(pairs, given, strict=True):
            shares.setdefault(one, []).append(share)
            shares.setdefault(other, []).append(None if share is None else 1 - share)
        found = {row: [share for share in all_of if share is not None] for row, all_of in shares.items()}
        return {row: 2 * fmean(known) - 1 if known else float("nan") for row, known in found.items()}

    def _metrics(self, lived: dict[int, Lived], scores: dict[int, float]) -> dict[str, float]:
        """What the user feels when asked, and in the marketplace what is true of it; so that both can be plotted."""
        from rlhf_kit.data.customer import claims, true_utility

        given = [score for score in scores.values() if math.isfinite(score)]
        metrics = dict(self._user.metrics())
        felt = [one.felt for one in lived.values() if one.felt is not None]
        if felt:
            metrics["satisfaction"] = fmean(experience.satisfaction for experience in felt)
            metrics["immediate_satisfaction"] = fmean(experience.immediate for experience in felt)
        elif given and self._config.feedback == "rating":
            metrics["satisfaction"] = fmean(given)
        markets = [(one, one.scene.market) for one in lived.values() if one.scene.market is not None]
        if not markets:
            return metrics
        metrics["true_utility"] = fmean(true_utility(market, one.bought) for one, market in markets)
        metrics["bought"] = fmean(one.bought is not None for one, _ in markets)
        said = [
            claimed != market.has[market.options.index(option)]
            for one, market in markets
            for option, claimed in claims(one.scene.completion, market).items()
        ]
        return metrics | ({"false_claims": fmean(said)} if said else {})
